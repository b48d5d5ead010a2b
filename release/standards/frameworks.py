"""mof.yml and osaid.json, which rate the openness of a release, both computed with reasons.

mof.yml has the components of the Model Openness Framework 1.0 with the class that they reach, and osaid.json the
checklist of the Open Source AI Definition 1.0.

mof.yml has the fields of the register's schema (github.com/lfai/model_openness_tool, schema/mof_schema.json): exactly
these seventeen names. It adds `class` and `missing`. OSAID has no schema: osaid.json is a list of requirements.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.yaml_text import read_trusted
from release import layout
from release.layout import MODEL, WITHOUT_ORDER, numbered
from release.standards.standard_facts import NOT_STATED, StandardFacts, address
from stages.data.acquire.licenses.expressions import AllowedLicenses
from stages.formats.table import row_count

Json = dict[str, Any]
Requirement = tuple[str, str, bool, str, str]
"""Part of the definition, requirement, True if it is met, reason, path of the evidence."""
CODE_LICENSE = "code/LICENSE"
NOT_INCLUDED = "Component not included"
NO_CLASS = "none"
CLASSES = {0: NO_CLASS, 1: "Class I: Open Science", 2: "Class II: Open Tooling", 3: "Class III: Open Model"}
TABLES = read_trusted(Path(__file__).parent / "frameworks.yaml")
"""The components of the framework, and the names of open licenses."""
OSI_APPROVED = frozenset(TABLES["osi_approved"])
"""Licenses of software that the Open Source Initiative approved, as far as releases have used them."""
OPEN_DATA = OSI_APPROVED.union(TABLES["open_data"])
"""Licenses under which data, texts and weights are open."""
UNKNOWN = "LicenseRef-unknown"


@dataclass(frozen=True)
class Component:
    """A component of the framework.

    Attributes:
        name: Its name in the framework.
        description: Its description in mof.yml.
        location: A pattern of paths in the release, or an address.
        level: The class that needs it, 1 to 3; 0 if none does.
        kind: The kind of its license: code, weights, data or document.
    """

    name: str
    description: str
    location: str
    level: int
    kind: str


def _components(facts: StandardFacts) -> list[Component]:
    """Returns the components of the framework; the maker states the addresses of report and paper."""
    rows = [Component(**row) for row in TABLES["components"]]
    stated = {"Technical report": facts.maker.technical_report, "Research paper": facts.maker.research_paper}
    return [replace(row, location=stated.get(row.name, row.location) or "") for row in rows]


def framework(facts: StandardFacts) -> Json:
    """Returns the content of mof.yml."""
    release, rows, missing = facts.release, list[Json](), {level: list[str]() for level in (3, 2, 1)}
    # {kind of license: the license, the path of its text}
    licenses = {
        "code": (release.license.code, CODE_LICENSE),
        "weights": (release.license.weights, f"{MODEL}/LICENSE"),
        "data": (release.license.data_compilation, "dataset/LICENSE"),
        "document": (NOT_STATED, ""),
    }
    for component in _components(facts):
        license, path = licenses[component.kind]
        row = {"name": component.name, "description": component.description}
        if absent := _absent(facts, component, license):
            if component.level:
                missing[component.level].append(f"{component.name}: {absent}")
            rows.append({**row, "description": NOT_INCLUDED, "location": "", "license_name": "", "license_path": ""})
        else:
            url = facts.url_of(path) if path else ""
            rows.append({**row, "location": _url(facts, component), "license_name": license, "license_path": url})

    # A class needs all components of its level and of those above it in number.
    reached = 0
    for level in (3, 2, 1):
        if missing[level]:
            break
        reached = level
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
        "class": CLASSES[reached],
        "missing": {CLASSES[level]: reasons for level, reasons in missing.items()},
    }


def _absent(facts: StandardFacts, component: Component, license: str) -> str:
    """Returns the reason for which a component does not count; "" if it counts."""
    if component.kind == "document":
        return "" if component.location else "the maker states no address of one (release.maker)"
    # One file is enough: the framework asks whether a component is there.
    if next(facts.folder.glob(component.location), None) is None:
        return f"there is no {component.location}"
    # The framework asks for the data itself, and for all of it.
    if component.name == "Datasets" and facts.data.by_reference:
        return f"the texts of {', '.join(facts.data.by_reference)} are by reference"
    if component.name == "Datasets" and facts.published_base:
        return f"the data of {facts.published_base}, which training began with, is not in this release"
    if component.kind == "code":
        return "" if _open(license, OSI_APPROVED) else f"its license {license} is not known to be approved by OSI"
    return "" if _open(license, OPEN_DATA) else f"its license {license} is not known to be open"


def _url(facts: StandardFacts, component: Component) -> str:
    """Returns the address of a component: of the folder, if it is several files."""
    if component.kind == "document":
        return address(component.location)
    return facts.url_of(component.location.partition("*")[0].rstrip("/"))


def _open(expression: str, known: frozenset[str]) -> bool:
    """Returns True if all licenses of an expression are known as open; of alternatives, one."""
    try:
        # License expressions are read as those of the documents are.
        return AllowedLicenses(sorted(known)).allows(expression)
    except (IndexError, RecursionError):
        return False


def framework_text(facts: StandardFacts) -> str:
    return yaml.safe_dump(framework(facts), sort_keys=False, allow_unicode=True, width=100)


def checklist(facts: StandardFacts) -> Json:
    """Returns the content of osaid.json: each requirement with `met`, reason and evidence."""
    requirements = [*_data_requirements(facts), *_code_requirements(facts), *_parameter_requirements(facts)]
    fields = ("part", "requirement", "met", "reason", "evidence")
    items: list[Json] = [dict(zip(fields, row, strict=True)) for row in requirements]
    return {
        "definition": "Open Source AI Definition 1.0",
        "conforms": all(item["met"] for item in items),
        "judged_by": "the release's own files; the Open Source Initiative has not reviewed it",
        "requirements": items,
    }


def _data_requirements(facts: StandardFacts) -> Iterator[Requirement]:
    folder, sources, kept = facts.folder, facts.data.sources, sum(row.kept for row in facts.data.sources.values())
    undeclared = sorted(name for name, row in sources.items() if not row.origin or not row.license_evidence)
    reason = f"{len(sources)} sources with origin and evidence of the license"
    if undeclared:
        reason = f"no origin or evidence of {', '.join(undeclared)}"
    yield "data", "every source is described, with provenance and scope", not undeclared, reason, "dataset/sources"

    as_run = any(folder.glob("code/as-run/**/*.yaml"))
    reason = f"the recipes {'as run' if as_run else 'are missing'}, and a decision for each document"
    yield "data", "how the data was selected and processed is described", as_run, reason, "code/as-run"

    # Texts by reference count as listed, because anybody can get them where the release says.
    rows = sum(row_count(path) for path in layout.all_files(layout.kept_files(folder / "dataset")))
    referenced = sum(sources[name].kept for name in facts.data.by_reference)
    reason = f"the texts of {rows - referenced} of {kept} kept documents are in the release"
    if referenced:
        places = ", ".join(facts.data.by_reference.values())
        reason += f"; `atom rebuild-data` gets the other {referenced} from {places}"
    if base := facts.published_base:
        reason += f"; those of {base}, which training began with, are not"
    listed = rows == kept and not base
    yield "data", "all data of training is listed, and where to get it", listed, reason, "dataset/kept"

    unknown = sorted(text for text in facts.data.documents.licenses if text.startswith(UNKNOWN))
    reason = f"not known: {', '.join(unknown)}" if unknown else "each kept document has one"
    yield "data", "licenses of all documents are known", not unknown, reason, "dataset/kept"

    # A reward model is trained without an order, and samples no answers.
    sampled = [phase for phase in facts.phases if numbered(phase)[0] in WITHOUT_ORDER and phase != "reward"]
    drawn = [phase for phase in sampled if (folder / f"dataset/rl/{phase}/rollouts.parquet").exists()]
    reason = f"every answer of {', '.join(sampled)}" if sampled else "no phase samples answers"
    if drawn != sampled:
        reason = "answers of some phases are missing"
    evidence = "dataset/rl" if sampled else "evidence/training"
    yield "data", "data that the model made for its own training is described", drawn == sampled, reason, evidence


def _code_requirements(facts: StandardFacts) -> Iterator[Requirement]:
    whole = all((facts.folder / f"code/{package}").is_dir() for package in ("pipeline", "stages", "release"))
    reason = "the packages that made the release" if whole else "some of it is missing"
    yield "code", "source code of data processing, training, evaluation and inference", whole, reason, "code"
    recipe = "evidence/recipe.json"
    yield "code", "settings of training", (facts.folder / recipe).is_file(), "the resolved recipe", recipe
    license = facts.release.license.code
    yield "code", "its license is approved by OSI", _open(license, OSI_APPROVED), license, CODE_LICENSE


def _parameter_requirements(facts: StandardFacts) -> Iterator[Requirement]:
    folder, license = facts.folder, facts.release.license.weights
    weights, size = any(folder.glob(f"{MODEL}/*.safetensors")), facts.models[MODEL].parameters.total
    yield "parameters", "weights of the final model", weights, f"{size} parameters", MODEL
    states = any(folder.glob("checkpoints/*/optimizer*"))
    yield "parameters", "checkpoints and states of the optimizer", states, "by phase", "checkpoints/index.json"
    yield "parameters", "the terms are open", _open(license, OPEN_DATA), license, "model/LICENSE"
