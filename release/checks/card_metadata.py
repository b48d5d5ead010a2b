"""Checks the metadata of cards, which Hubs and loaders read: the stated versions, and all of them against the files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.hub.client import load
from release import schema
from release.cards import render
from release.checks.findings import Findings
from release.facts.variant_facts import read_variant_facts
from release.layout import RELEASE
from release.opened_release import Release
from release.schema import CARD, CARDS, FORMAT, PublishedLicenses, ReleaseInfo


def same_versions(release: Release) -> Findings:
    """Checks that every card of a release or repository states the present versions, and that no file but release.json
    does so too."""
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
    Names, languages and the license are as the card states them."""
    kind, text = release.kind, (release.root / CARD).read_text()
    if kind == "model":
        data: Any = load().ModelCard(text).data
        repository = render.data_of(text).removesuffix("-data")
        stated = _release(data.to_dict(), repository)
        title = str(data.model_name).removeprefix(stated.name).removeprefix("-")
        expected = render.model_metadata(title, stated, release.models[release.root.name])
    elif kind == "variant":
        data = load().ModelCard(text).data
        stated = _release(data.to_dict(), data.datasets[0].removesuffix("-data"))
        suffix = str(data.to_dict().get("model_name", "")).removeprefix(stated.name)
        expected = render.variant_metadata(suffix, stated, read_variant_facts(release.root))
    else:
        data = load().RepoCard(text).data
        stated = _release(data.to_dict())
        expected = render.plain_metadata(stated.license.code)
        if kind == "dataset":
            expected = render.data_metadata(stated, release.data)
    is_equal = schema.metadata_of(text) == str(expected)
    return Findings([] if is_equal else [f"{CARD}: its metadata are not those that the files beside it give"])


def _release(stated: Mapping[str, Any], repository: str = "/") -> ReleaseInfo:
    """What a card states of its release. stated: its metadata. repository: that of the final model."""
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
