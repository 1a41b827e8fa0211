"""Personal data, replaced by placeholders that say what was there.

Numbers that have a checksum are replaced where it is right, so that other long numbers stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document

Kind = Literal["email", "ip", "card", "iban", "chinese_id", "us_ssn", "phone"]

EMAIL = re.compile(
    r"(?<![\w.+-])[A-Za-z0-9._%+-]{1,64}@(?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.)+"
    r"[A-Za-z]{2,24}(?![\w-])"
)
IP = re.compile(
    r"(?<![\w.:])(?:(?:\d{1,3}\.){3}\d{1,3}(?![\w.]*\d)|(?:[0-9A-Fa-f]{0,4}:){2,7}[0-9A-Fa-f]{0,4})(?![\w:])"
)
VERSION = re.compile(
    r"\b(?:version|release|ver\.?|v)\s*$", re.IGNORECASE
)  # of a program, before it
CARD = re.compile(r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d{3,6}){2,4}(?![\d-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])\d{5}[\dXx](?!\d)")
US_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # with a country code
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4}"  # North America
    r"|1[3-9]\d{9}|1[3-9]\d-\d{4}-\d{4}"  # mobile numbers of China
    r"|0\d{2,3}-\d{7,8}"  # landlines of China
    r")(?![\w-])"
)


def passes_luhn(digits: str) -> bool:
    """Returns whether the last digit is right by Luhn's formula (ISO/IEC 7812-1, annex B)."""
    total = 0
    for at, digit in enumerate(reversed(digits)):
        doubled = int(digit) * (1 + at % 2)
        total += doubled - 9 * (doubled > 9)
    return total % 10 == 0


def passes_mod97(iban: str) -> bool:
    """Returns whether the check digits of an account number are right (ISO 13616)."""
    moved = iban[4:] + iban[:4]
    return int("".join(str(int(sign, 36)) for sign in moved)) % 97 == 1


def passes_gb11643(identity: str) -> bool:
    """Returns whether the last sign of a Chinese identity number is right (GB 11643-1999)."""
    weights = [2**power % 11 for power in range(17, 0, -1)]
    total = sum(int(digit) * weight for digit, weight in zip(identity[:17], weights))
    return "10X98765432"[total % 11] == identity[17].upper()


@config
class PersonalData(Step):
    """Replaces addresses and numbers of people: `<email>`, `<phone>`, `<card>` and so on."""

    kinds: tuple[Kind, ...] = Kind.__args__  # what is replaced
    placeholder: str = "<{}>"  # of a kind, whose name takes the place of {}
    # Which addresses of computers: those that the whole internet can reach, or all.
    addresses: Literal["public", "all"] = "public"
    names: tuple[str, ...] = ()  # of people, replaced by <name> where they stand as words

    def validate(self) -> None:
        """Raises UserError for kinds that there are not, or a placeholder without a name."""
        for kind in self.kinds:
            if kind not in Kind.__args__:
                raise UserError(f"kinds: {kind!r} is not one of {', '.join(Kind.__args__)}")
        if "{}" not in self.placeholder:
            raise UserError(f"placeholder={self.placeholder!r} has no {{}} for the kind")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; no document is dropped."""
        text = document.text
        for kind, (pattern, holds) in self._rules().items():
            if kind in self.kinds:
                mark = self.placeholder.format(kind)
                text = pattern.sub(
                    lambda match, mark=mark, holds=holds: mark if holds(match) else match.group(),
                    text,
                )
        if self.names:
            words = "|".join(map(re.escape, sorted(self.names, key=len, reverse=True)))
            text = re.sub(rf"\b(?:{words})\b", self.placeholder.format("name"), text)
        return document if text == document.text else document._replace(text=text)

    def _rules(self) -> dict[Kind, tuple[re.Pattern, Callable[[re.Match], bool]]]:
        """Pattern of each kind, and a test of what it found; longer numbers come before shorter."""
        return {
            "email": (EMAIL, lambda match: True),
            "ip": (IP, self._is_address),
            "iban": (IBAN, lambda match: passes_mod97(match.group().replace(" ", ""))),
            "chinese_id": (CHINESE_ID, lambda match: passes_gb11643(match.group())),
            "card": (CARD, _is_card),
            "us_ssn": (US_SSN, lambda match: True),
            "phone": (PHONE, _is_phone),
        }

    def _is_address(self, match: re.Match) -> bool:
        try:
            address = ipaddress.ip_address(match.group())
        except ValueError:
            return False
        if VERSION.search(match.string[max(0, match.start() - 12) : match.start()]):
            return False
        return self.addresses == "all" or address.is_global


def _is_card(match: re.Match) -> bool:
    digits = re.sub(r"\D", "", match.group())
    return 13 <= len(digits) <= 19 and passes_luhn(digits)


def _is_phone(match: re.Match) -> bool:
    return 7 <= sum(map(str.isdigit, match.group())) <= 15  # E.164
