"""Filter `pii`: email and IPv4 addresses."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from pipeline.core.bounds import Flag
from stages.data.filters.base import Filter, FilterFunction


class Pii(Filter):
    """Replace email and public IPv4 addresses with ones reserved for documentation (RFC 2606, RFC 5737)."""

    step: Literal["pii"] = Field(description="selects this step")
    remove_emails: Flag = Field(True, description="replace email addresses")
    remove_ips: Flag = Field(True, description="replace public IPv4 addresses")

    def function(self) -> FilterFunction:
        """datatrove's patterns with one fixed replacement each: its default rotates through several, so that a
        document's text would depend on the documents before it, and its default addresses are routed ones."""
        from datatrove.pipeline.formatters import PIIFormatter

        replacements = {"email_replacement": "email@example.com", "ip_replacement": "192.0.2.1"}
        both = PIIFormatter(**self.parameters(), **replacements)
        addresses = PIIFormatter(False, self.remove_ips, **replacements)

        def function(text: str) -> str:  # a text without @ has no email address, and the pattern is slow to find none
            edited: str = (both if "@" in text else addresses).format(text)
            return edited

        return function


FILTER = Pii
