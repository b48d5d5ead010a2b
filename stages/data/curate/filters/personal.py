"""Filter `personal_numbers`: phone numbers, accounts, cards and social security numbers, beside PIIFormatter."""

from __future__ import annotations

import re
from functools import partial
from types import ModuleType
from typing import Annotated, Literal

from pipeline.core.bounds import Line, Words
from stages.data.curate.filters.base import Document, Filter, FilterFunction

# Every number that is searched has at least seven digits with few signs between them.
_DIGITS = re.compile(r"\d(?:[ ().\-/]{0,3}\d){6}")
_IBAN = re.compile(r"\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){2,7}(?: ?[A-Z0-9]{1,3})?\b")
# The first digits of Visa, Mastercard, American Express and Discover.
_CARD = re.compile(
    r"(?<![\d.-])(?:4\d|5[1-5]|2[2-7]|3[47]|6[05])\d\d(?:([ -]?)\d{4}\1\d{4}\1\d{4}|([ -]?)\d{6}\2\d{5})(?![\d-])"
)
_SECURITY = re.compile(r"(?<![\d-])\d{3}-\d\d-\d{4}(?![\d-])")


class PersonalNumbers(Filter):
    """Replaces phone numbers (phonenumbers), and numbers of accounts, cards and US social security (python-stdnum).

    The libraries decide whether a number is valid: by length, check digits and the numbers that a region has assigned.
    A phone number is replaced if it is grouped, or begins with a plus.
    """

    step: Literal["personal_numbers"]
    """selects this step"""
    region: Annotated[str, Words(2, "ISO 3166 code of a country, such as US", r"[A-Z]{2}")] = "US"
    """country whose phone numbers are written without a country code"""
    phone_replacement: Line = "555-0100"
    """text in place of a phone number; 555-0100 is kept for fiction"""
    account_replacement: Line = "0000-0000"
    """text in place of another number"""

    def function(self) -> FilterFunction:
        from phonenumbers import Leniency, PhoneNumberMatcher
        from stdnum import iban, luhn
        from stdnum.us import ssn

        checks = ((_IBAN, iban), (_CARD, luhn), (_SECURITY, ssn))

        def without_phones(line: str) -> str:
            # From the end, so that the places of the others stay.
            for match in reversed(list(PhoneNumberMatcher(line, self.region, Leniency.STRICT_GROUPING))):
                # Digits alone are more often another number, such as 2147483647.
                if not match.raw_string.isdigit():
                    line = line[: match.start] + self.phone_replacement + line[match.end :]
            return line

        def function(document: Document) -> str:
            text = document.text
            if not _DIGITS.search(text):
                return text
            for pattern, library in checks:
                text = pattern.sub(partial(self._replace_valid, library), text)
            lines = text.splitlines(keepends=True)
            return "".join(without_phones(line) if _DIGITS.search(line) else line for line in lines)

        return function

    def _replace_valid(self, library: ModuleType, found: re.Match[str]) -> str:
        return self.account_replacement if library.is_valid(re.sub("[ -]", "", found[0])) else found[0]
