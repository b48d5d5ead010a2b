"""Checks the variants of the final model: their figures, their cards, that they follow from its weights, and what other
programs made of them."""

from __future__ import annotations

import json
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from release import scratch
from release.cards import card_tables
from release.checks.findings import Findings
from release.facts.published_tables import read_json
from release.facts.runtimes import REFERENCE, RUNTIMES, problem_of
from release.facts.variant_facts import Original, base_of, compute_loss, read_original, read_variant_facts
from release.layout import LOSS, MODEL, PUBLIC_KEY, SIGNATURE, SUMS, models_of
from release.layout import RUNTIMES as FILE
from release.opened_release import Release

WITH_VARIANT = frozenset({"README.md", "LICENSE", LOSS, SUMS, SIGNATURE, PUBLIC_KEY})
"""Files of a variant's repository beside the converted ones."""


def losses(release: Release) -> Findings:
    """Checks the figures and cards of all variants of a release against their tables and the original's."""
    folder = release.root
    final = models_of(release.info.nodes)[-1]
    original = read_original(folder / MODEL, release.dataset / "evaluation" / final)
    findings, texts = Findings(compared=False), []
    for name in release.variant_names:
        findings.add(_loss(folder / name, original), f"{name}/")
        texts.append(f"{name} {read_json(folder / name / LOSS)['divergence']['value']:.3g}")
    findings.summary = f"mean divergence in nats: {', '.join(texts)}"
    return findings


def loss(release: Release) -> Findings:
    """Checks the figures and the card of one variant against its tables. The original's figures are as stated."""
    return _loss(release.root, None)


def _loss(folder: Path, original: Original | None) -> Findings:
    facts, findings = read_variant_facts(folder), Findings()
    if json.loads(json.dumps(compute_loss(folder, facts.loss, original))) != facts.loss:
        findings.problems.append(f"{LOSS} is not what the tables give")
    findings.compare_tables((folder / "README.md").read_text(), card_tables.VARIANT_TABLES, facts)
    return findings


def conversions(release: Release) -> Findings:
    """Checks that the files of each variant are what the weights of the final model give, byte for byte; and of an
    adapter, that its base in the release and it together are the final model."""
    from stages.export.variants import conversion

    folder, problems, texts = release.root, list[str](), list[str]()
    for name in release.variant_names:
        facts = read_variant_facts(folder / name)
        variant = facts.loss["variant"]
        if facts.base:
            texts.append(_sum(folder, name, problems))
            continue
        published = {path.name for path in (folder / name).iterdir() if path.is_file()} - WITH_VARIANT
        with scratch.folder() as place:
            conversion.write(variant, folder / MODEL, place / "again")  # type: ignore[arg-type]
            written = {path.name: path for path in (place / "again").iterdir()}
            problems += [f"{name}/{file} does not follow from {MODEL}" for file in sorted(published - written.keys())]
            problems += [f"{name}/{file} is missing" for file in sorted(written.keys() - published)]
            problems += [
                f"{name}/{file} is not what {MODEL} gives"
                for file in sorted(written.keys() & published)
                if sha256_file(written[file]) != release.digest(folder / name / file)
            ]
    return Findings(problems, detail="; ".join(filter(None, texts)) or "holds")


def _sum(release: Path, name: str, problems: list[str]) -> str:
    """The sentence on how far an adapter on its base is the final model; "" if it is not, which is a problem."""
    from stages.export.variants import adapter_files

    try:
        return adapter_files.require_sum(base_of(release, release / name), release / name, release / MODEL)
    except (CheckFailed, AtomError, KeyError, ValueError, RuntimeError) as error:
        problems.append(f"{name} is no adapter of {MODEL}: {error}")
        return ""


def runtimes(release: Release) -> Findings:
    """Checks that each run of evidence/runtimes.json passed by its own figures or was skipped for a reason, and that no
    program that reads the final model or a variant is left out."""
    folder, findings = release.root, Findings()
    runs = read_json(folder / FILE)
    for run in runs:
        name = f"{FILE}: {run['folder']} in {run['runtime']}"
        if run["status"] == "skipped":
            findings.problems += [] if run.get("reason") else [f"{name} was skipped without a reason"]
        elif run["status"] == "reference":
            findings.problems += [] if run["runtime"] == REFERENCE else [f"{name} is not the reference"]
        elif problem := problem_of(run) if "bound" in run else run.get("reason", "it has no figures"):
            findings.problems.append(f"{name}: {problem}")
        elif run["status"] != "passed":
            findings.problems.append(f"{name} is called {run['status']}, and its figures keep their bound")
    present = {run["folder"] for run in runs}
    if release.is_whole:
        missing = [name for name in (MODEL, *release.variant_names) if name not in present]
        findings.problems += [f"{FILE} has no run of {name}" for name in missing]
    stated = {run["runtime"] for run in runs if run["folder"] == MODEL}
    readers = [name for name, runtime in RUNTIMES.items() if "safetensors" in runtime.writers]
    findings.problems += [f"{FILE} does not say what {name} makes of {MODEL}" for name in readers if name not in stated]
    counts = {status: sum(run["status"] == status for run in runs) for status in ("passed", "skipped")}
    findings.compared = counts["passed"] > 0
    findings.summary = f"{counts['passed']} runs passed, {counts['skipped']} skipped"
    findings.detail = findings.summary
    return findings
