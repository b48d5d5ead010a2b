"""mof.yml and osaid.json: the components of the Model Openness Framework 1.0 with the class that they reach, and the
checklist of the Open Source AI Definition 1.0, both computed with reasons.

mof.yml has the fields of the register's schema (github.com/lfai/model_openness_tool, schema/mof_schema.json): exactly
these seventeen names. It adds `class` and `missing`. OSAID has no schema: osaid.json is a list of requirements.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from release import data_layout
from release.layout import MODEL, STANDARDS, WITHOUT_ORDER, numbered
from release.standards.standard_facts import NOT_STATED, StandardFacts, address
from stages.data.acquire.licenses.allow import AllowedLicenses
from stages.formats.table import row_count

Json = dict[str, Any]
BOM, CODE_LICENSE = f"{STANDARDS}/bom.cdx.json", "code/LICENSE"
NOT_INCLUDED = "Component not included"
NO_CLASS = "none"
OSI_APPROVED = frozenset({
    "Apache-2.0", "MIT", "MIT-0", "BSD-2-Clause", "BSD-3-Clause", "ISC", "MPL-2.0", "GPL-2.0-only", "GPL-2.0-or-later",
    "GPL-3.0-only", "GPL-3.0-or-later", "LGPL-2.1-only", "LGPL-2.1-or-later", "LGPL-3.0-only", "LGPL-3.0-or-later",
    "AGPL-3.0-only", "AGPL-3.0-or-later", "EUPL-1.2", "Artistic-2.0", "PSF-2.0", "Zlib", "0BSD", "BSL-1.0", "Unlicense",
    "PostgreSQL", "UPL-1.0", "ECL-2.0", "EPL-2.0", "NCSA", "MulanPSL-2.0",
})  # fmt: skip
"""Licenses of software that the Open Source Initiative approved, as far as releases have used them."""
OPEN_DATA = OSI_APPROVED | {
    "CC0-1.0", "CC-BY-4.0", "CC-BY-3.0", "CC-BY-SA-4.0", "CC-BY-SA-3.0", "CDLA-Permissive-1.0", "CDLA-Permissive-2.0",
    "CDLA-Sharing-1.0", "ODC-By-1.0", "ODbL-1.0", "PDDL-1.0", "GFDL-1.3-or-later",
}  # fmt: skip
"""Licenses under which data, texts and weights are open."""
UNKNOWN = "LicenseRef-unknown"


@dataclass(frozen=True)
class Component:
    """A component of the framework. location: a pattern of paths in the release, or an address; level: the class that
    needs it, 1 to 3, 0 if none does; kind: of its license."""

    name: str
    description: str
    location: str
    level: int
    kind: str


def _components(facts: StandardFacts) -> list[Component]:
    architecture = "code/stages/models"
    return [
        Component("Model architecture", "Code of the architecture, and its configuration", architecture, 3, "code"),
        Component("Data preprocessing code", "Code that reads, filters, deduplicates", "code/stages/data", 1, "code"),
        Component("Training code", "Code of every phase", "code/stages/train", 2, "code"),
        Component("Inference code", "Code that draws answers", "code/stages/generation", 2, "code"),
        Component("Evaluation code", "Code of every measurement", "code/stages/evaluation", 2, "code"),
        Component("Supporting libraries and tools", "Packages with versions", BOM, 0, "code"),
        Component("Model parameters (Final)", "Weights of the final model", f"{MODEL}/*.safetensors", 3, "weights"),
        Component("Model parameters (Intermediate)", "Checkpoints", "checkpoints/*/*.safetensors", 1, "weights"),
        Component("Datasets", "Every kept document", "dataset/kept/**/*.parquet", 1, "data"),
        Component("Evaluation data", "Every item of the evaluation", "dataset/evaluation/*.parquet", 2, "data"),
        Component("Model metadata", "Recipe and states of the optimizers", "checkpoints/*/optimizer*", 0, "weights"),
        Component("Sample model outputs", "Outputs of each item", "dataset/evaluation/*/items.parquet", 0, "data"),
        Component("Model card", "Card of the final model", f"{MODEL}/README.md", 3, "weights"),
        Component("Data card", "Card of the data", "dataset/README.md", 3, "data"),
        Component("Technical report", "Report on the model", facts.maker.technical_report or "", 3, "document"),
        Component("Research paper", "Paper on the model", facts.maker.research_paper or "", 1, "document"),
        Component("Evaluation results", "Scores of every model", "dataset/evaluation/*/scores.json", 3, "data"),
    ]  # fmt: skip


def framework(facts: StandardFacts) -> Json:
    """The content of mof.yml."""
    release, rows, missing = facts.release, list[Json](), {1: list[str](), 2: list[str](), 3: list[str]()}
    licenses = {"code": release.license.code, "weights": release.license.weights}
    licenses |= {"data": release.license.data_compilation, "document": NOT_STATED}
    paths = {"code": CODE_LICENSE, "weights": f"{MODEL}/LICENSE", "data": "dataset/LICENSE", "document": ""}
    for component in _components(facts):
        absent = _absent(facts, component, licenses[component.kind])
        if absent and component.level:
            missing[component.level].append(f"{component.name}: {absent}")
        rows.append({
            "name": component.name,
            "description": NOT_INCLUDED if absent else component.description,
            "location": "" if absent else _url(facts, component),
            "license_name": "" if absent else licenses[component.kind],
            "license_path": "" if absent else paths[component.kind] and facts.url_of(paths[component.kind]),
        })  # fmt: skip
    open_models = not missing[3]
    reached = 0 if not open_models else 3 if missing[2] else 2 if missing[1] else 1
    names = {0: NO_CLASS, 1: "Class I: Open Science", 2: "Class II: Open Tooling", 3: "Class III: Open Model"}
    return {
        "framework": {"name": "Model Openness Framework", "version": "1.0", "date": "2024-12-15"},
        "release": {
            "name": release.name,
            "version": release.version,
            "date": facts.maker.market_date or facts.ended[:10],
            "type": "language",
            "architecture": "transformer decoder",
            "treatment": "chat fine-tuned" if facts.models[MODEL].is_chat else "pre-trained",
            "origin": release.name,
            "producer": facts.provider,
            "contact": facts.contact,
            "components": rows,
        },
        "class": names[reached],
        "missing": {names[level]: missing[level] for level in (3, 2, 1)},
    }


def _absent(facts: StandardFacts, component: Component, license: str) -> str:
    """Why a component does not count; "" if it does."""
    if component.kind == "document":
        return "" if component.location else "the maker states no address of one (release.maker)"
    if next(facts.folder.glob(component.location), None) is None:
        return f"there is no {component.location}"
    if component.name == "Datasets" and facts.data.by_reference:
        return f"the texts of {', '.join(facts.data.by_reference)} are by reference"
    if component.name == "Datasets" and facts.published_base:
        return f"the data of {facts.published_base}, which training began with, is not in this release"
    if component.kind == "code":
        return "" if _open(license, OSI_APPROVED) else f"its license {license} is not known to be approved by OSI"
    return "" if _open(license, OPEN_DATA) else f"its license {license} is not known to be open"


def _url(facts: StandardFacts, component: Component) -> str:
    """The address of a component: of the folder, where it is several files."""
    if component.kind == "document":
        return address(component.location)
    return facts.url_of(component.location.partition("*")[0].rstrip("/"))


def _open(expression: str, known: frozenset[str]) -> bool:
    """Whether all licenses of an expression are known as open; of alternatives, one."""
    try:
        return AllowedLicenses(sorted(known)).allows(expression)
    except (IndexError, RecursionError):
        return False


def framework_text(facts: StandardFacts) -> str:
    return yaml.safe_dump(framework(facts), sort_keys=False, allow_unicode=True, width=100)


def checklist(facts: StandardFacts) -> Json:
    """The content of osaid.json: each requirement with `met`, reason and evidence."""
    license, folder = facts.release.license, facts.folder
    sources, kept = facts.data.sources, sum(row.kept for row in facts.data.sources.values())
    rows = sum(row_count(path) for path in data_layout.all_files(data_layout.kept_files(folder / "dataset")))
    referenced = sum(sources[name].kept for name in facts.data.by_reference)
    texts = f"the texts of {rows - referenced} of {kept} kept documents are in the release"
    if referenced:
        texts += f"; `atom rebuild-data` gets the other {referenced} from {', '.join(facts.data.by_reference.values())}"
    if base := facts.published_base:
        texts += f"; those of {base}, which training began with, are not"
    as_run = any(folder.glob("code/as-run/**/*.yaml"))
    undeclared = sorted(name for name, row in sources.items() if not row.origin or not row.license_evidence)
    unknown = sorted(text for text in facts.data.documents.licenses if text.startswith(UNKNOWN))
    sampled = [phase for phase in facts.phases if numbered(phase)[0] in WITHOUT_ORDER]
    drawn = [
        phase for phase in sampled if phase != "reward" and (folder / f"dataset/rl/{phase}/rollouts.parquet").exists()
    ]
    wanted = [phase for phase in sampled if phase != "reward"]
    requirements = [
        _item("data", "every source is described, with provenance and scope", not undeclared,
              f"{len(sources)} sources with origin and evidence of the license" if not undeclared
              else f"no origin or evidence of {', '.join(undeclared)}", "dataset/sources"),
        _item("data", "how the data was selected and processed is described", as_run,
              f"the recipes {'as run' if as_run else 'are missing'}, and a decision for each document",
              "code/as-run"),
        _item("data", "all data of training is listed, and where to get it", rows == kept and not base, texts,
              "dataset/kept"),
        _item("data", "licenses of all documents are known", not unknown,
              "each kept document has one" if not unknown else f"not known: {', '.join(unknown)}", "dataset/kept"),
        _item("data", "data that the model made for its own training is described", drawn == wanted,
              f"every answer of {', '.join(wanted)}" if wanted and drawn == wanted else "no phase samples answers"
              if not wanted else "answers of some phases are missing", "dataset/rl" if wanted else "evidence/training"),
        _item("code", "source code of data processing, training, evaluation and inference", _all_code(facts),
              "the packages that made the release" if _all_code(facts) else "some of it is missing", "code"),
        _item("code", "settings of training", (folder / "evidence/recipe.json").is_file(),
              "the resolved recipe", "evidence/recipe.json"),
        _item("code", "its license is approved by OSI", _open(license.code, OSI_APPROVED), license.code, CODE_LICENSE),
        _item("parameters", "weights of the final model", bool(list((folder / MODEL).glob("*.safetensors"))),
              f"{facts.models[MODEL].parameters.total} parameters", MODEL),
        _item("parameters", "checkpoints and states of the optimizer", any(folder.glob("checkpoints/*/optimizer*")),
              "by phase", "checkpoints/index.json"),
        _item("parameters", "the terms are open", _open(license.weights, OPEN_DATA), license.weights, "model/LICENSE"),
    ]  # fmt: skip
    return {
        "definition": "Open Source AI Definition 1.0",
        "conforms": all(item["met"] for item in requirements),
        "judged_by": "the release's own files; the Open Source Initiative has not reviewed it",
        "requirements": requirements,
    }


def _all_code(facts: StandardFacts) -> bool:
    return all((facts.folder / f"code/{package}").is_dir() for package in ("pipeline", "stages", "release"))


def _item(part: str, requirement: str, met: bool, reason: str, evidence: str) -> Json:
    return {"part": part, "requirement": requirement, "met": met, "reason": reason, "evidence": evidence}
