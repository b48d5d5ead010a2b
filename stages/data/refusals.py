"""Documents that are not used although their source is in order: their rows, and what the log says of them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pipeline.core.stage import Report
from stages.data.licenses.maps import UNKNOWN_WEB, UNMAPPED
from stages.data.readers.base import REFUSED_RULES, Refused, Unmapped
from stages.data.table import FailedRow

COUNTS = {
    "license": "documents_unmapped", "opt_out": "documents_opted_out", "page": "documents_unusable",
    "derivatives": "documents_no_derivatives", "generation": "documents_not_generated",
}  # fmt: skip
"""{kind of refusal: its name in the counts of `source.json`}."""


def kind_of(document: Unmapped | Refused) -> str:
    return "license" if isinstance(document, Unmapped) else document.kind


def refused_row(source: str, id: str, document: Unmapped | Refused) -> FailedRow:
    """The row of `failed`. Its license is not that of the source, which covers the documents that are used."""
    if isinstance(document, Refused):
        license, reason = document.license or UNKNOWN_WEB, document.reason
    else:
        stated = document.license.encode(errors="replace").decode()[:500]
        license, reason = UNMAPPED, f"no map knows {stated!r}" if stated else "the document states none"
    return {"id": id, "source": source, "license": license, "reason": f"{kind_of(document)}: {reason}"}


def report_refusals(source: str, refusals: Counter[str], licenses: dict[str, Any], report: Report) -> None:
    """Notes the counts of refusals, and the most frequent license strings that no map knows."""
    for kind, count in sorted(refusals.items()):
        report.note(f"source {source}: {count} documents will be removed by curation: {REFUSED_RULES[kind]}")
    for row in licenses.get("licenses_unmapped", [])[:5]:
        stated = f"the license {row['string']!r}, which no map knows" if row["string"] else "no license"
        report.note(f"source {source}: {row['documents']} documents state {stated}")
