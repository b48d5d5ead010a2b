"""NOTICE of the dataset repository: what the licenses of its documents ask to name, and where it is.

Authors by document are in `attribution/`, the license texts of packages in `notices/`, and the license of the standard
library of Python, which asks to be kept with its texts, in `license_texts/`.
"""

from __future__ import annotations

import os
from pathlib import Path

from pipeline.core.text import escaped
from release.layout import LICENSE_TEXTS
from release.standards.standard_facts import NOT_STATED, StandardFacts
from stages.data.licenses.attribution import asks_for_attribution

STDLIB = ("stdlib-docstrings", "stdlib-source")
"""Readers of the standard library of the interpreter."""
PYTHON = f"{LICENSE_TEXTS}/python.txt"


def python_license() -> bytes | None:
    """The license of this interpreter, from beside its standard library; None if the installation has none."""
    path = Path(os.__file__).parent / "LICENSE.txt"
    return path.read_bytes() if path.is_file() else None


def notice(facts: StandardFacts) -> str:
    release, lines = facts.release, list[str]()
    lines += [escaped(f"{release.title} {release.version}: data"), ""]
    lines += [f"The selection and arrangement of the documents is under {release.license.data_compilation}.", ""]
    lines += ["Every document keeps its own license, which stands in its row of kept/. These sources hold documents"]
    lines += ["whose licenses ask to name authors, or to keep notices:", ""]
    asking = [n for n, row in facts.data.sources.items() if row.kept and any(map(asks_for_attribution, row.licenses))]
    for name in asking:
        row = facts.data.sources[name]
        lines.append(escaped(f"{name}"))
        lines.append(escaped(f"  licenses: {', '.join(text for text in row.licenses if asks_for_attribution(text))}"))
        lines.append(escaped(f"  origin: {row.origin or NOT_STATED}"))
        lines.append(escaped(f"  evidence of the license: {row.license_evidence or NOT_STATED}"))
        if facts.data.documents.attributed.get(name):
            lines.append(
                f"  authors and origins of {facts.data.documents.attributed[name]} documents: attribution/{name}"
            )
        if (facts.folder / "dataset/notices" / name).is_dir():
            lines.append(f"  license texts and notices of its packages: notices/{name}")
        if facts.declared.get(name, {}).get("reader") in STDLIB:
            present = (facts.folder / "dataset" / PYTHON).is_file()
            where = PYTHON if present else "https://docs.python.org/3/license.html"
            lines.append(f"  text of the license, with the notice of copyright: {where}")
        lines.append("")
    return "\n".join(lines if asking else [*lines, "none", ""])
