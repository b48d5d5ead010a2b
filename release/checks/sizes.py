"""Checks the smaller models of the recipe against their statements, their logs and the recipe."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pipeline.core import provenance
from pipeline.core.stage import identity
from release import untrusted
from release.checks.findings import Findings
from release.facts import size_facts, training
from release.facts.size_facts import PRETRAIN, TRAINING
from release.layout import RECIPE, SIZE
from release.opened_release import Release
from stages.models.registry import parse

SHARED = ("tokens", "order")
"""Roles of the inputs that a smaller model has in common with pre-training."""


def sizes(release: Release) -> Findings:
    """Checks that the recipe states every smaller model; that each was trained with the recipe's settings but for those
    that it states, on the rows of pre-training; that it is smaller; and that its figures are those of its log."""
    folder = release.root
    stated = untrusted.read_json(folder / RECIPE, follow=True).get("sizes", [])
    expected, published = [f"{SIZE}-{n + 1}" for n in range(len(stated))], size_facts.names(folder)
    if expected != published:
        words = [", ".join(each) or "none" for each in (expected, published)]
        return Findings([f"{RECIPE} states the smaller models {words[0]}, and {TRAINING} has {words[1]}"])
    configs = _statements(release, [PRETRAIN, *published])
    problems = [
        f"evidence/statements: none is about {name} as it is here"
        for name in (PRETRAIN, *published)
        if name not in configs
    ]
    if not problems:
        base, *trained = release.sizes
        for section, size in zip(stated, trained, strict=True):
            problems += _settings(section, configs[PRETRAIN], configs[size.name], size.name)
            problems += _log(folder, size)
            if size.total >= base.total:
                problems.append(f"{size.name} has {size.total} parameters, and the model of the release {base.total}")
    return Findings(problems, summary=f"{len(published)} smaller models, trained on the rows of {PRETRAIN}")


def _statements(release: Release, names: list[str]) -> dict[str, provenance.Statement]:
    """{node: statement about its artifact as it is here}"""
    manifests = release.manifests
    subjects = {(m.key, m.digest): name for name in names if (m := manifests.get(name)) is not None}
    statements = {}
    for body in release.statements.values():
        for each in body["subject"]:
            if name := subjects.get((each["name"], each["digest"]["sha256"])):
                statements[name] = body
    return statements


def _settings(
    section: dict[str, Any], base: provenance.Statement, size: provenance.Statement, name: str
) -> Iterator[str]:
    """Problems of the settings and the inputs of a smaller model, whose section of the recipe is given."""
    wanted, config = (dict(provenance.parameters_of(each)["config"]) for each in (base, size))
    model, smaller = wanted.pop("model"), config.pop("model")
    try:
        stated = identity(parse(model | section["model"]))
    except ValidationError as error:
        yield f"{RECIPE} states settings of {name} that make no model: {error.errors()[0]['msg']}"
        return
    for key in sorted({*stated, *smaller}):
        if smaller.get(key) != stated.get(key):
            yield f"{name} was trained with {key} = {smaller.get(key)}, and {RECIPE} states {stated.get(key)}"
    phase = dict(wanted.pop("phase"))
    phase |= {"optimizer": section.get("optimizer", phase["optimizer"]), "release_checkpoint_interval": phase["steps"]}
    for key, value in {**wanted, "phase": phase, "name": name}.items():
        if config.get(key) != value:
            yield f"{name} was trained with another {key} than {RECIPE} and {PRETRAIN} state"
    inputs = [provenance.material_keys(each) for each in (base, size)]
    for role in SHARED:
        if inputs[0].get(role) != inputs[1].get(role):
            yield f"{name} read other {role} than {PRETRAIN}"


def _log(folder: Path, size: size_facts.Trained) -> Iterator[str]:
    """Problems of the figures of a smaller model, which its log states too."""
    last: dict[str, Any] = {}
    for line in training.stream(folder / TRAINING / size.name / "training.jsonl"):
        last |= {key: line[key] for key in ("step", "tokens", "heldout_loss") if key in line}
    for key, value in {"step": size.steps, "tokens": size.tokens, "heldout_loss": size.loss}.items():
        if last.get(key) != value:
            yield f"{TRAINING}/{size.name}/summary.json: its {key} is {value}, and the log ends with {last.get(key)}"
