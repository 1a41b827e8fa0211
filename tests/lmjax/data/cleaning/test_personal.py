"""Personal data is replaced, and what looks like it stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.cleaning.personal import (
    PersonalData,
    passes_gb11643,
    passes_luhn,
    passes_mod97,
)
from lmjax.data.documents import Document


def cleaned(text: str, step: PersonalData | None = None) -> str:
    return (step or PersonalData())(Document(text, "page")).text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Write to ann.lee+news@mail.example.org.", "Write to <email>."),
        ("Server 8.8.8.8 answers", "Server <ip> answers"),
        ("Server 2001:4860:4860::8888 answers", "Server <ip> answers"),
        ("Card 4111 1111 1111 1111, please", "Card <card>, please"),
        ("Card 378282246310005.", "Card <card>."),
        ("Account GB82 WEST 1234 5698 7654 32", "Account <iban>"),
        ("身份证号11010519491231002X。", "身份证号<chinese_id>。"),
        ("SSN 123-45-6789", "SSN <us_ssn>"),
        ("Call +44 20 7946 0958 now", "Call <phone> now"),
        ("Call (212) 555-0123 or 212-555-0123", "Call <phone> or <phone>"),
        ("手机 13812345678，座机 010-12345678", "手机 <phone>，座机 <phone>"),
    ],
)
def test_personal_data_is_replaced(text, expected):
    assert cleaned(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Version 3.11.7.2 came out on 2024-10-01 at 12:30:45.",
        "Ratio 16:9, verse 3:16, std::vector, 10:20:30.",
        "Pi is 3.14159265358979 and 1,234,567,890 is large.",
        "Card 4111 1111 1111 1112",  # the last digit is wrong
        "ISBN 978-0-306-40615-7",
        "Hosts 192.168.0.1 and 127.0.0.1 are private, 999.1.1.1 is none.",
        "user@localhost, @handle, a @ b",
        "SSN 666-45-6789, 000-12-3456",
        "证号110105194912310021",  # the last digit is wrong
        "Commit 1381234567890123, 2024年",
        "Python's __init__@x",
    ],
)
def test_what_looks_like_it_stays(text):
    assert cleaned(text) == text


def test_all_addresses_where_it_is_asked_for():
    step = PersonalData(addresses="all")
    assert cleaned("At 192.168.0.1 and 127.0.0.1", step) == "At <ip> and <ip>"
    assert cleaned("At 12:30:45, 1.2.3.400", step) == "At 12:30:45, 1.2.3.400"


def test_kinds_placeholders_and_names_are_settings():
    step = PersonalData(kinds=("email",), placeholder="[{}]", names=("Ann Lee", "Lee"))
    text = "Ann Lee, a@example.org, 8.8.8.8, Leeds"
    assert cleaned(text, step) == "[name], [email], 8.8.8.8, Leeds"
    with pytest.raises(UserError, match="has no"):
        replace(step, placeholder="x").validate()


@given(st.integers(0, 10**15))
def test_luhn_finds_every_single_wrong_digit(number):
    digits = str(number)
    check = next(d for d in "0123456789" if passes_luhn(digits + d))
    whole = digits + check
    for at, digit in enumerate(whole):
        wrong = str((int(digit) + 1) % 10)
        assert not passes_luhn(whole[:at] + wrong + whole[at + 1 :])


def test_other_checksums_find_a_wrong_digit():
    assert passes_mod97("DE89370400440532013000")
    assert not passes_mod97("DE89370400440532013001")
    assert passes_gb11643("11010519491231002X")
    assert not passes_gb11643("11010519491231003X")
