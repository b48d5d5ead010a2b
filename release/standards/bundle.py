"""The documents of the bundle: one line each, with its place in the release and the function that makes it."""

from __future__ import annotations

from collections.abc import Callable

from release.assembly.assemble import to_json
from release.layout import NOTICE, STANDARDS
from release.standards import (
    citation,
    energy_report,
    eu_summary,
    frameworks,
    ml_bom,
    notices,
    package_list,
    spdx_document,
)
from release.standards.standard_facts import StandardFacts

CYCLONEDX, SPDX = f"{STANDARDS}/bom.cdx.json", f"{STANDARDS}/bom.spdx3.json"
EU_SUMMARY, MOF, CITATION = f"{STANDARDS}/eu_summary.json", f"{STANDARDS}/mof.yml", f"{STANDARDS}/CITATION.cff"
ENERGY, OSAID = f"{STANDARDS}/energy.json", f"{STANDARDS}/osaid.json"
RECORDED = f"{STANDARDS}/{package_list.PACKAGES}"
"""The packages as recorded at the build: the one file of the folder that is an input of the others."""
DOCUMENTS: dict[str, Callable[[StandardFacts], bytes]] = {
    CYCLONEDX: lambda facts: to_json(ml_bom.bill(facts)),
    SPDX: lambda facts: to_json(spdx_document.document(facts)),
    ENERGY: lambda facts: to_json(energy_report.energy(facts)),
    EU_SUMMARY: lambda facts: to_json(eu_summary.summary(facts)),
    f"{STANDARDS}/eu_summary.md": lambda facts: eu_summary.page(facts).encode(),
    MOF: lambda facts: frameworks.framework_text(facts).encode(),
    OSAID: lambda facts: to_json(frameworks.checklist(facts)),
    CITATION: lambda facts: citation.citation(facts).encode(),
    f"dataset/{NOTICE}": lambda facts: notices.notice(facts).encode(),
}
"""{path in the release: its content}. Equal facts give equal bytes."""
