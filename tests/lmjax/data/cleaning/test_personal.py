"""Personal data is replaced, and what looks like it stays."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmjax.config import UserError, replace
from lmjax.data.cleaning.identity_numbers import (
    passes_cpf,
    passes_dni,
    passes_gb11643,
    passes_luhn,
    passes_mod97,
    passes_nir,
    passes_verhoeff,
)
from lmjax.data.cleaning.personal import PersonalData
from lmjax.data.cleaning.postal import ADDRESS, replace_addresses
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
        ("CPF 529.982.247-25 ou", "CPF <cpf> ou"),
        ("DNI 12345678Z, NIE X1234567L.", "DNI <dni>, NIE <dni>."),
        ("Aadhaar 2341 2341 2346.", "Aadhaar <aadhaar>."),
        ("Sécu 2 55 08 14 168 025 38,", "Sécu <nir>,"),
        ("She lives at 12B Baker Street, London NW1 6XE now", "She lives at <address> now"),
        ("To 1600 Elm Park Ave., Apt. 4, Springfield, IL 62704-1234.", "To <address>."),
        ("Anschrift: Berliner Straße 5a, 10115 Berlin, Hof", "Anschrift: <address>, Hof"),
        ("wohnt Lindenweg 12, 8001 Zürich", "wohnt <address>"),
        ("au 10 bis, rue de la Paix, 75002 Paris", "au <address>"),
        ("我住在北京市海淀区中关村大街27号3号楼，很近", "我住在<address>，很近"),
        ("寄到广东省深圳市南山区科技路12号。", "寄到<address>。"),
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
        "CPF 529.982.247-26, 111.111.111-11",
        "DNI 12345678A",
        "Number 2341 2341 2347",
        "Sécu 2 55 08 14 168 025 39",
        "Gate 10 Downing Street is a house in London.",
        "He ran 3 Miles Down The Road and 12345 others did.",
        "这条路27号以前是一家书店，城市很大。",
        "In the Ring 12 were left.",
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


def test_other_identity_numbers_find_a_wrong_digit():
    for passes, number in (
        (passes_cpf, "529.982.247-25"),
        (passes_dni, "12345678Z"),
        (passes_verhoeff, "2363"),
        (passes_nir, "2 55 08 14 168 025 38"),
    ):
        assert passes(number)
        for at, sign in enumerate(number):
            if sign.isdigit():
                wrong = number[:at] + str((int(sign) + 1) % 10) + number[at + 1 :]
                assert not passes(wrong), wrong


@given(st.integers(0, 10**11))
def test_verhoeff_finds_neighbours_that_changed_places(number):
    """By its definition: the digit that is right is the only one, and swaps are found."""
    right = [digit for digit in "0123456789" if passes_verhoeff(f"{number}{digit}")]
    assert len(right) == 1
    whole = f"{number}{right[0]}"
    for at in range(len(whole) - 1):
        if whole[at] != whole[at + 1]:
            swapped = whole[:at] + whole[at + 1] + whole[at] + whole[at + 2 :]
            assert not passes_verhoeff(swapped)


def test_names_of_a_file(tmp_path):
    (tmp_path / "names.txt").write_text("Ann Lee  # a remark\nO'Brien\n王小明\n\n", "utf-8")
    step = PersonalData(names=("Bo",), names_list=str(tmp_path / "names.txt"))
    text = "Ann  Lee and Ann met O'Brien, Bo and Bob.\n老师王小明来了，小明也来了。"
    expected = "<name> and Ann met <name>, <name> and Bob.\n老师<name>来了，小明也来了。"
    assert cleaned(text, step) == expected
    with pytest.raises(UserError, match="more than 4 words"):
        cleaned("x", PersonalData(names=("A B C D E",)))
    (tmp_path / "names.txt").write_text("# none\n")
    with pytest.raises(UserError, match="the list has no name"):
        cleaned("x", PersonalData(names_list=str(tmp_path / "names.txt")))


def test_many_names_cost_no_more_than_few():
    """As many as a telephone directory has: each word is looked up, not each name."""
    names = tuple(f"Name{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}x{n}" for n in range(30_000))
    step = PersonalData(names=tuple(name.rstrip("0123456789") for name in names), kinds=())
    assert cleaned("Nameaax and Nameaa. " * 500, step).count("<name>") == 500


def test_addresses_are_found_wherever_they_stand():
    """Beside one search over the whole text, which is slow."""
    address = "Berliner Straße 5a, 10115 Berlin"
    for before in (0, 1, 50, 150, 159, 160, 161, 400):
        text = (
            f"{'wort ' * before}{address}{' und 7 Mal' * before}\n12 Baker Street, London NW1 6XE"
        )
        assert replace_addresses(text, "<a>") == ADDRESS.sub("<a>", text)
        assert replace_addresses(text, "<a>").count("<a>") == 2
    assert replace_addresses("字" * 500 + "北京市海淀区中关村大街27号", "<a>").endswith("字<a>")
