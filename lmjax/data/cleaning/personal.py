"""Personal data, replaced by placeholders that say what was there.

Numbers that have a checksum are replaced where it is right, so that other long numbers stay.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import Literal

from lmjax.config import UserError, config
from lmjax.data.cleaning.identity_numbers import (
    AADHAAR,
    CARD,
    CHINESE_ID,
    CPF,
    DNI,
    IBAN,
    NIR,
    US_SSN,
    passes_cpf,
    passes_dni,
    passes_gb11643,
    passes_luhn,
    passes_mod97,
    passes_nir,
    passes_verhoeff,
)
from lmjax.data.cleaning.postal import ADDRESS, name_finder, replace_addresses
from lmjax.data.cleaning.step import Dropped, Step
from lmjax.data.documents import Document
from lmjax.remote import check_path

Kind = Literal[
    "email",
    "ip",
    "card",
    "iban",
    "chinese_id",
    "us_ssn",
    "cpf",
    "dni",
    "aadhaar",
    "nir",
    "address",
    "phone",
]

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
PHONE = re.compile(
    r"(?<![\w.+-])(?:"
    r"\+\d{1,3}[ .-]?(?:\(\d{1,4}\)[ .-]?)?\d{1,4}(?:[ .-]?\d{2,4}){2,4}"  # with a country code
    r"|\(\d{3}\) ?\d{3}[ .-]\d{4}|\d{3}-\d{3}-\d{4}"  # North America
    r"|1[3-9]\d{9}|1[3-9]\d-\d{4}-\d{4}"  # mobile numbers of China
    r"|0\d{2,3}-\d{7,8}"  # landlines of China
    r")(?![\w-])"
)


@config
class PersonalData(Step):
    """Replaces addresses, numbers and names of people: `<email>`, `<phone>`, `<card>` and so on.

    Numbers of identity are those of China, of the USA, of Brazil (cpf), Spain (dni), India
    (aadhaar) and France (nir). Postal addresses are those with a postal code, or with a city,
    street and number in Chinese. Names are replaced where a list has them: a list of first names
    alone would take many words that are none.
    """

    kinds: tuple[Kind, ...] = Kind.__args__  # what is replaced
    placeholder: str = "<{}>"  # of a kind, whose name takes the place of {}
    # Which addresses of computers: those that the whole internet can reach, or all.
    addresses: Literal["public", "all"] = "public"
    names: tuple[str, ...] = ()  # of people, replaced by <name> where they stand as words
    names_list: str | None = None  # file of further names, one a line, # before remarks

    def validate(self) -> None:
        """Raises UserError for kinds that there are not, or a placeholder without a name."""
        for kind in self.kinds:
            if kind not in Kind.__args__:
                raise UserError(f"kinds: {kind!r} is not one of {', '.join(Kind.__args__)}")
        if "{}" not in self.placeholder:
            raise UserError(f"placeholder={self.placeholder!r} has no {{}} for the kind")
        check_path(self.names_list or "", "names_list")

    def __call__(self, document: Document) -> Document | Dropped:
        """See `Step`; no document is dropped."""
        text = document.text
        for kind, (pattern, holds) in self._rules().items():
            if kind == "address" and kind in self.kinds:
                text = replace_addresses(text, self.placeholder.format(kind))
            elif kind in self.kinds:
                mark = self.placeholder.format(kind)
                text = pattern.sub(
                    lambda match, mark=mark, holds=holds: mark if holds(match) else match.group(),
                    text,
                )
        if finder := name_finder(self.names, self.names_list):
            text = finder.replace(text, self.placeholder.format("name"))
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
            "cpf": (CPF, lambda match: passes_cpf(match.group())),
            "dni": (DNI, lambda match: passes_dni(match.group())),
            "aadhaar": (AADHAAR, lambda match: passes_verhoeff(match.group())),
            "nir": (NIR, lambda match: passes_nir(match.group())),
            "address": (ADDRESS, lambda match: True),
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
