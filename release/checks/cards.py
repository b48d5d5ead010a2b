"""Checks the cards of a release and the description of its data against its files."""

from __future__ import annotations

import json
from pathlib import Path

from release.cards import card_tables, croissant, plots, render, results
from release.checks.check import BuildContext
from release.checks.findings import Findings, require_file
from release.checks.plots import unexpected
from release.checks.scores import score_problems
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import read_json
from release.layout import CANARY
from release.opened_release import Release
from release.schema import CARD, ReleaseInfo


def cards(release: Release) -> Findings:
    """Checks the cards of a model repository, or of a whole release, against the files."""
    if not release.is_whole:
        return model_card(release.root, release.models[release.root.name])
    findings = Findings(summary="every table and score equals the artifacts'")
    for model in release.model_folders:
        findings.add(model_card(model, release.models[model.name], release.info), f"{model.name}/")
        tables, facts = Findings(), card_tables.release_facts(release, model.name)
        tables.compare_tables((model / CARD).read_text(), card_tables.RELEASE_TABLES, facts)
        findings.add(tables, f"{model.name}/")
    findings.add(data_card(release), "dataset/")
    findings.problems += [
        f"{path} is not the card that the release gives"
        for path, text in render.render_all(release)
        if not (release.root / path).is_file() or (release.root / path).read_bytes() != text.encode()
    ]
    problems = score_problems(release.dataset / "evaluation") + _canary(release)
    findings.problems += [f"dataset/{text}" for text in problems]
    return findings


def model_card(model: Path, facts: ModelFacts, info: ReleaseInfo | None = None) -> Findings:
    """Compares the card of one model repository, its plots, and its results for the Hub with the files beside them.

    Args:
        model: The folder.
        facts: The facts of its files.
        info: The release that it is part of, if that is there.
    """
    card = (model / CARD).read_text()
    findings = Findings([*_model_index(card, facts), *_plots(model)])
    findings.problems += unexpected(model, plots.model_plots(model, facts))
    data_id, version = render.data_of(card), None
    if info is not None:
        data_id, version = render.data_id(info), info.version
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


def data_card(release: Release) -> Findings:
    """Checks the data card against the tables beside it."""
    findings = Findings()
    findings.compare_tables((release.dataset / CARD).read_text(), card_tables.DATA_TABLES, release.data)
    findings.problems += unexpected(release.dataset, plots.data_plots(release.data))
    return findings


def _canary(release: Release) -> list[str]:
    is_equal = read_json(require_file(release.dataset, CANARY)) == release.canary
    return [] if is_equal else [f"{CANARY} is not that of the items"]


def described_data(release: Release) -> Findings:
    """Checks that croissant.json follows from the data of a whole release."""
    expected = croissant.describe_dataset(release.info, release.dataset, release.data, release.digest)
    is_equal = read_json(require_file(release.dataset, croissant.NAME)) == json.loads(json.dumps(expected))
    return Findings([] if is_equal else [f"dataset/{croissant.NAME} is not what the data gives"])


def valid_croissant(build: BuildContext) -> Findings:
    """Checks that mlcroissant finds no error in the description of the data, and loads its records."""
    problems = croissant.problems(build.release.dataset / croissant.NAME)
    return Findings(problems, summary=f"{croissant.NAME}: no error, records load")
