"""Checks the cards of a release and the description of its data against its files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from release import schema
from release.cards import card_tables, croissant, plots, render, results
from release.checks.check import BuildContext, Subject
from release.checks.findings import Findings, require_file
from release.checks.plots import unexpected
from release.checks.scores import score_problems
from release.facts import costs
from release.facts.checkpoint_facts import find_interventions, read_checkpoints
from release.facts.data_facts import canary_of, read_data_facts
from release.facts.model_facts import ModelFacts, read_model_facts
from release.facts.published_tables import read_json
from release.layout import CANARY
from release.repositories import model_folders
from release.schema import ReleaseInfo


def cards(subject: Subject) -> Findings:
    """Checks the cards of a model repository, or of a whole release, against the files."""
    return model_card(subject.folder) if subject.kind == "model" else _cards_of_release(subject.folder)


def _cards_of_release(folder: Path) -> Findings:
    findings = Findings(summary="every table and score equals the artifacts'")
    release, data = schema.read_release(folder), folder / "dataset"
    data_facts = read_data_facts(data)
    interventions = find_interventions(read_checkpoints(folder / "checkpoints"))
    run_costs, models = costs.usage_by_stage(folder), dict[str, ModelFacts]()
    for name in model_folders(folder):
        findings.add(model_card(folder / name, release), f"{name}/")
        model = read_model_facts(folder / name)
        facts = card_tables.release_facts(folder, name, model, data_facts, interventions, run_costs)
        tables = Findings()
        tables.compare_tables((folder / name / "README.md").read_text(), card_tables.RELEASE_TABLES, facts)
        findings.add(tables, f"{name}/")
        models[name] = model
    findings.add(_data_card(data), "dataset/")
    canary = canary_of(release.nodes["items"].digest)
    rendered = render.render_all(folder, release, data_facts, models, interventions, run_costs, canary)
    findings.problems += _other_words(folder, rendered)
    problems = score_problems(data / "evaluation") + _canary(data, canary)
    findings.problems += [f"dataset/{text}" for text in problems]
    return findings


def model_card(model: Path, release: ReleaseInfo | None = None) -> Findings:
    """Checks the card of one model repository, its plots, and its results for the Hub against the files beside them.

    release: the one that it is part of, if that is there.
    """
    card, facts = (model / "README.md").read_text(), read_model_facts(model)
    findings = Findings([*_model_index(card, facts), *_plots(model)])
    findings.problems += unexpected(model, plots.model_plots(model, facts))
    data_id, version = (render.data_of(card), None) if release is None else (render.data_id(release), release.version)
    findings.problems += results.problems(model, facts, data_id, version)
    findings.compare_tables(card, card_tables.MODEL_TABLES, facts)
    return findings


def _model_index(card: str, facts: ModelFacts) -> list[str]:
    return [
        f"README.md: model-index {name} is not the measured one"
        for name in render.mismatched_scores(card, facts.own_scores())
    ]


def _plots(model: Path) -> list[str]:
    drawn = [model / name for name in (plots.EXPERTS, plots.LOSS) if (model / name).exists()]
    return [
        f"{path.name} was not drawn from the logs in training/"
        for path in drawn
        if (plots.entries(path.read_bytes()) or {}).get(plots.SOURCE) != plots.source(model)
    ]


def data_card(subject: Subject) -> Findings:
    """Checks the data card against the tables beside it."""
    return _data_card(subject.folder)


def _data_card(dataset: Path) -> Findings:
    facts, findings = read_data_facts(dataset), Findings()
    findings.compare_tables((dataset / "README.md").read_text(), card_tables.DATA_TABLES, facts)
    findings.problems += unexpected(dataset, plots.data_plots(facts))
    return findings


def _other_words(folder: Path, rendered: Iterable[tuple[str, str]]) -> list[str]:
    """The cards of a release that are not, byte for byte, what its files give. rendered: (path, text) of each."""
    return [
        f"{path} is not the card that the release gives"
        for path, text in rendered
        if not (folder / path).is_file() or (folder / path).read_bytes() != text.encode()
    ]


def _canary(dataset: Path, expected: Mapping[str, str]) -> list[str]:
    is_equal = read_json(require_file(dataset, CANARY)) == expected
    return [] if is_equal else [f"{CANARY} is not that of the items"]


def described_data(subject: Subject) -> Findings:
    """Checks that croissant.json follows from the data of a whole release."""
    folder, dataset = subject.folder, subject.folder / "dataset"
    release, data_facts = schema.read_release(folder), read_data_facts(dataset)
    expected = croissant.describe_dataset(release, dataset, data_facts, subject.digest)
    is_equal = read_json(require_file(dataset, croissant.NAME)) == json.loads(json.dumps(expected))
    return Findings([] if is_equal else [f"dataset/{croissant.NAME} is not what the data gives"])


def valid_croissant(build: BuildContext) -> Findings:
    """Checks that mlcroissant finds no error in the description of the data, and loads its records."""
    problems = croissant.problems(build.folder / "dataset" / croissant.NAME)
    return Findings(problems, summary=f"{croissant.NAME}: no error, records load")
