"""Numbers of people and accounts with checksums: which of them are right."""

from __future__ import annotations

import re

CARD = re.compile(r"(?<![\d.-])[2-6]\d{3}(?:[ -]?\d{3,6}){2,4}(?![\d-])")
IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,4})?\b")
CHINESE_ID = re.compile(r"(?<!\d)[1-9]\d{5}(?:18|19|20)\d{2}(?:0[1-9]|1[0-2])\d{5}[\dXx](?!\d)")
US_SSN = re.compile(r"(?<![\d-])(?!000|666|9)\d{3}-(?!00)\d{2}-(?!0000)\d{4}(?![\d-])")
# The others only as they are usually written: one of ten or a hundred numbers has a right checksum.
CPF = re.compile(r"(?<![\d.-])\d{3}\.\d{3}\.\d{3}-\d{2}(?![\d-])")
DNI = re.compile(r"\b(?:\d{8}|[XYZ]-?\d{7})-?[A-Z]\b")
AADHAAR = re.compile(r"(?<![\d-])[2-9]\d{3}([ -])\d{4}\1\d{4}(?![\d-]| \d)")
NIR = re.compile(r"(?<!\d)[12] \d{2} (?:0[1-9]|1[0-2]) (?:\d{2}|2[AB]) \d{3} \d{3} \d{2}(?!\d)")

# Multiplication in the dihedral group of order 10, and Verhoeff's permutation of digits.
_DIHEDRAL = [
    [(a + b) % 5 if a < 5 and b < 5 else
     5 + (a + b - 5) % 5 if a < 5 else
     5 + (a - 5 - b) % 5 if b < 5 else
     (a - b) % 5 for b in range(10)]
    for a in range(10)
]  # fmt: skip
_PERMUTATION = (1, 5, 7, 6, 2, 8, 3, 0, 9, 4)


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


def passes_cpf(number: str) -> bool:
    """Returns whether both last digits of a Brazilian taxpayer's number are right (modulo 11)."""
    digits = [int(sign) for sign in number if sign.isdigit()]
    if len(digits) != 11 or len({*digits}) == 1:
        return False
    for count in (9, 10):
        total = sum(digit * (count + 1 - at) for at, digit in enumerate(digits[:count]))
        if total * 10 % 11 % 10 != digits[count]:
            return False
    return True


def passes_dni(number: str) -> bool:
    """Returns whether the letter of a Spanish identity number is right (modulo 23)."""
    signs = number.replace("-", "")
    digits = signs[:-1].translate(str.maketrans("XYZ", "012"))
    return "TRWAGMYFPDXBNJZSQVHLCKE"[int(digits) % 23] == signs[-1]


def passes_verhoeff(number: str) -> bool:
    """Returns whether the last digit is right by Verhoeff's method (1969), as of an Aadhaar."""
    check = 0
    for at, sign in enumerate(reversed([sign for sign in number if sign.isdigit()])):
        digit = int(sign)
        for _ in range(at % 8):
            digit = _PERMUTATION[digit]
        check = _DIHEDRAL[check][digit]
    return check == 0


def passes_nir(number: str) -> bool:
    """Returns whether the key of a French social security number is right (97 less the rest)."""
    signs = number.replace(" ", "")
    # Both departments of Corsica have a number of their own.
    body = signs[:13].replace("2A", "19").replace("2B", "18")
    return 97 - int(body) % 97 == int(signs[13:])
