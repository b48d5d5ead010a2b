"""Checks the parts of a release that people read against its files.

These are cards with their metadata, plots, the description of the data, and the page.
"""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.core.errors import installing
from pipeline.hub.client import load
from release import schema
from release.cards import card_tables, croissant, plots, render, results
from release.cards.plots import NAMES, SOFTWARE, Drawings, entries, model_plots, version
from release.checks.check import BuildContext, Findings, require_file
from release.checks.scores import score_problems
from release.facts.model_facts import ModelFacts
from release.facts.published_tables import read_json
from release.facts.variant_facts import read_variant_facts
from release.layout import CANARY, RELEASE
from release.opened_release import Release
from release.schema import CARD, CARDS, FORMAT, PublishedLicenses, ReleaseInfo
from release.web_page import page as web_page


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
    findings = Findings(_plots(model))
    findings.problems += unexpected(model, model_plots(model, facts))
    data_id, version = render.data_of(card), None
    if info is not None:
        data_id, version = render.data_id(info), info.version
    findings.problems += results.problems(model, facts, data_id, version)
    findings.compare_tables(card, card_tables.MODEL_TABLES, facts)
    return findings


def _plots(model: Path) -> list[str]:
    path = model / plots.LOSS
    if not path.exists() or (entries(path.read_bytes()) or {}).get(plots.SOURCE) == plots.source(model):
        return []
    return [f"{path.name} was not drawn from the logs in training/"]


def data_card(release: Release) -> Findings:
    """Checks the data card against the tables beside it."""
    findings = Findings()
    findings.compare_tables((release.dataset / CARD).read_text(), card_tables.DATA_TABLES, release.data)
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


ROUNDED = 16
"""The largest difference of a color, of 256, that another processor may round."""


def drawn_plots(release: Release) -> Findings:
    """Checks that the plots of a folder look like those that its numbers give, if the same matplotlib drew them."""
    findings = Findings(compared=False)
    for model in release.model_folders:
        _compare_plots(model, model_plots(model, release.models[model.name]), findings)
    return findings


def unexpected(folder: Path, drawings: Drawings) -> list[str]:
    """Returns sentences about plots that a repository lacks, or should not have.

    `drawings` are those that it should have.
    """
    present = {name for name in NAMES if (folder / name).is_file()}
    missing = [f"{name} is missing" for name in sorted(drawings.keys() - present)]
    return missing + [f"{name} shows what is not here" for name in sorted(present - drawings.keys())]


def _compare_plots(folder: Path, drawings: Drawings, findings: Findings) -> None:
    """Compares the plots of one repository."""
    for name in sorted(name for name in drawings if (folder / name).is_file()):
        published = (folder / name).read_bytes()
        stated = entries(published) or {}
        if importlib.util.find_spec("matplotlib") is None:
            findings.skipped["plots"] = f"plots: drawing them again needs matplotlib; {installing('report')}"
        elif stated.get(SOFTWARE) != version():
            findings.skipped["plots"] = f"plots: drawn by {stated.get(SOFTWARE)}, and here is {version()}"
        else:
            findings.compared = True
            drawn = drawings[name]()
            if published != drawn and not (stated == entries(drawn) and _look_alike(published, drawn)):
                findings.problems.append(f"{folder.name}/{name} does not show the numbers beside it")


def _look_alike(published: bytes, drawn: bytes) -> bool:
    """Returns True if two pictures differ in no pixel by more than ROUNDED."""
    from PIL import Image, ImageChops

    pictures = [Image.open(io.BytesIO(data), formats=["PNG"]).convert("RGBA") for data in (published, drawn)]
    if pictures[0].size != pictures[1].size:
        return False
    # A histogram counts the pixels by their difference, so no loop over pixels is needed.
    bands = ImageChops.difference(*pictures).split()
    return not any(any(band.histogram()[ROUNDED + 1 :]) for band in bands)


def same_versions(release: Release) -> Findings:
    """Checks that every card of a release or repository states the present versions.

    Apart from the cards, release.json at the root is the only file that may state them.
    """
    problems = []
    for path in release.files:
        place, _, name = path.rpartition("/")
        stated = schema.of_card(release.root / place) if name == CARD else None
        if stated is not None and stated != schema.Stated():
            versions = f"format {stated.format} and card schema {stated.cards}"
            problems.append(f"{path} states {versions}, which are not those of the release")
        elif path.endswith(f"/{RELEASE}"):
            problems.append(f"{path} states versions, which {RELEASE} alone does")
    return Findings(problems, detail=f"format {FORMAT}, card schema {CARDS}")


def card_metadata(release: Release) -> Findings:
    """Checks that the metadata have the fields that the build writes, with the values that follow from the files.

    Names, languages and the license are as the card states them.
    """
    kind, text = release.kind, (release.root / CARD).read_text()
    if kind == "model":
        data: Any = load().ModelCard(text).data
        repository = render.data_of(text).removesuffix("-data")
        stated = _stated_release(data.to_dict(), repository)
        title = str(data.model_name).removeprefix(stated.name).removeprefix("-")
        expected = render.model_metadata(title, stated, release.models[release.root.name])
    elif kind == "variant":
        data = load().ModelCard(text).data
        stated = _stated_release(data.to_dict(), data.datasets[0].removesuffix("-data"))
        suffix = str(data.to_dict().get("model_name", "")).removeprefix(stated.name)
        expected = render.variant_metadata(suffix, stated, read_variant_facts(release.root))
    else:
        data = load().RepoCard(text).data
        stated = _stated_release(data.to_dict())
        expected = render.plain_metadata(stated.license.code)
        if kind == "dataset":
            expected = render.data_metadata(stated, release.data)
    # Compared as texts, which also shows duplicate keys and comments, which a parser drops.
    is_equal = schema.metadata_of(text) == str(expected)
    return Findings([] if is_equal else [f"{CARD}: its metadata are not those that the files beside it give"])


def _stated_release(stated: Mapping[str, Any], repository: str = "/") -> ReleaseInfo:
    """Returns the release as a card states it.

    Args:
        stated: The metadata of the card.
        repository: The repository of the final model.
    """
    namespace, _, name = repository.partition("/")
    spdx = str(stated.get("license_name", stated.get("license")))
    return ReleaseInfo(
        format=FORMAT,
        card_schema=CARDS,
        name=name,
        version="",
        title=str(stated.get("pretty_name")).removesuffix(render.OF_DATA),
        description="",
        namespace=namespace,
        contact=None,
        languages=tuple(stated.get("language") or ()),
        license=PublishedLicenses(spdx, spdx, spdx),
        commit=None,
        dirty=False,
        stale=(),
        nodes={},
    )


def whole_page(release: Release) -> Findings:
    """Checks the page; of one whose release is not here, only that it runs nothing."""
    if release.kind != "release":
        reason = "page: what it shows is compared where all files of the release are there; it runs nothing"
        return Findings(web_page.foreign_scripts(release), {"page": reason})
    return Findings(web_page.problems(release))
