"""The documents of the bundle: for each its place in the release and the function that makes it.

The short ones are made here: the citation and the notices.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.text import escaped
from release.facts.published_tables import to_json
from release.layout import LICENSE_TEXTS, NOTICE, STANDARDS
from release.standards import eu_summary, frameworks, ml_bom, spdx_document, standard_facts
from release.standards.standard_facts import NOT_STATED, StandardFacts, address, energy
from stages.data.acquire.licenses.expressions import asks_for_attribution

CYCLONEDX, SPDX = f"{STANDARDS}/bom.cdx.json", f"{STANDARDS}/bom.spdx3.json"
EU_SUMMARY, MOF, CITATION = f"{STANDARDS}/eu_summary.json", f"{STANDARDS}/mof.yml", f"{STANDARDS}/CITATION.cff"
ENERGY, OSAID = f"{STANDARDS}/energy.json", f"{STANDARDS}/osaid.json"
RECORDED = f"{STANDARDS}/{standard_facts.PACKAGES}"
"""The packages as recorded at the build: the one file of the folder that is an input of the others."""
IDENTIFIER = re.compile(r"(?!LicenseRef-)[A-Za-z0-9.-]+")
STDLIB = ("stdlib-docstrings", "stdlib-source")
"""Readers of the standard library of the interpreter."""
PYTHON_LICENSE = f"{LICENSE_TEXTS}/python.txt"


def citation(facts: StandardFacts) -> str:
    """Returns CITATION.cff of the release, in the Citation File Format 1.2.0 (citation-file-format.github.io).

    There is a date only if the maker states one.
    """
    release, license = facts.release, facts.release.license.weights
    body: dict[str, Any] = {
        "cff-version": "1.2.0",
        "message": "If you use this release, please cite it as below.",
        # The format knows software and datasets, and no models: weights are software, since one runs them.
        "type": "software",
        "title": release.title,
        "version": release.version,
        "authors": [{"name": facts.maker.provider or f"the maker of {release.repository}, who states no name"}],
        "abstract": release.description,
        "url": address(facts.model_url()),
        "repository-artifact": address(facts.evidence_url),
    }
    # A license that is no single identifier of SPDX has its address in place of an identifier.
    if IDENTIFIER.fullmatch(license):
        body["license"] = license
    else:
        body["license-url"] = address(f"{facts.model_url()}/blob/main/LICENSE")
    if facts.maker.market_date:
        body["date-released"] = facts.maker.market_date
    if not release.description:
        del body["abstract"]
    return yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=100)


def python_license() -> bytes | None:
    """Returns the license of this interpreter, which its standard library holds; None without such a file."""
    path = Path(os.__file__).parent / "LICENSE.txt"
    return path.read_bytes() if path.is_file() else None


def notice(facts: StandardFacts) -> str:
    """Returns NOTICE of the dataset repository: what the licenses of its documents ask to name, and where it is.

    Authors by document are in `attribution/`, the license texts of packages in `notices/`, and the license of the
    standard library of Python, which asks to be kept with its texts, in `license_texts/`.
    """
    release, lines = facts.release, list[str]()
    for name, row in facts.data.sources.items():
        licenses = [license for license in row.licenses if asks_for_attribution(license)]
        if not row.kept or not licenses:
            continue
        lines.append(escaped(name))
        lines.append(escaped(f"  licenses: {', '.join(licenses)}"))
        lines.append(escaped(f"  origin: {row.origin or NOT_STATED}"))
        lines.append(escaped(f"  evidence of the license: {row.license_evidence or NOT_STATED}"))
        if documents := facts.data.documents.attributed.get(name):
            lines.append(f"  authors and origins of {documents} documents: attribution/{name}")
        if (facts.folder / "dataset/notices" / name).is_dir():
            lines.append(f"  license texts and notices of its packages: notices/{name}")
        if facts.declared.get(name, {}).get("reader") in STDLIB:
            # Not every installation of Python has its license as a file.
            present = (facts.folder / "dataset" / PYTHON_LICENSE).is_file()
            where = PYTHON_LICENSE if present else "https://docs.python.org/3/license.html"
            lines.append(f"  text of the license, with the notice of copyright: {where}")
        lines.append("")
    sources = "\n".join(lines or ["none", ""])
    title = escaped(f"{release.title} {release.version}: data")
    return f"""{title}

The selection and arrangement of the documents is under {release.license.data_compilation}.

Every document keeps its own license, which stands in its row of kept/. These sources hold documents
whose licenses ask to name authors, or to keep notices:

{sources}"""


DOCUMENTS: dict[str, Callable[[StandardFacts], bytes]] = {
    CYCLONEDX: lambda facts: to_json(ml_bom.bill(facts)),
    SPDX: lambda facts: to_json(spdx_document.document(facts)),
    ENERGY: lambda facts: to_json(energy(facts)),
    EU_SUMMARY: lambda facts: to_json(eu_summary.summary(facts)),
    f"{STANDARDS}/eu_summary.md": lambda facts: eu_summary.page(facts).encode(),
    MOF: lambda facts: frameworks.framework_text(facts).encode(),
    OSAID: lambda facts: to_json(frameworks.checklist(facts)),
    CITATION: lambda facts: citation(facts).encode(),
    f"dataset/{NOTICE}": lambda facts: notice(facts).encode(),
}
"""{path in the release: the function that makes its content}. Equal facts give equal bytes."""
