"""Checks the metadata of the card of one repository, which Hubs and loaders read, against the files beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.hub.client import load
from release import schema
from release.assembly.data_facts import read_data_facts
from release.assembly.model_facts import read_model_facts
from release.assembly.variant_facts import read_variant_facts
from release.cards import render
from release.cards.versions import SCHEMA
from release.checks.check import Subject
from release.checks.findings import Findings
from release.layout import FORMAT
from release.schema import CARD, PublishedLicenses, ReleaseInfo


def card_metadata(subject: Subject) -> Findings:
    """Checks that the metadata have the fields that the build writes, with the values that follow from the files.
    Names, languages and the license are as the card states them."""
    findings = Findings(compared=False)
    stated = schema.stated(subject.folder)
    findings.compare_part("words", stated, lambda: _problems(subject.folder, subject.kind))
    return findings


def _problems(folder: Path, kind: str) -> list[str]:
    text = (folder / CARD).read_text()
    if kind == "model":
        data: Any = load().ModelCard(text).data
        repository = render.data_of(text).removesuffix("-data")
        release = _release(data.to_dict(), repository)
        title = str(data.model_name).removeprefix(release.name).removeprefix("-")
        expected = render.model_metadata(title, release, read_model_facts(folder))
    elif kind == "variant":
        data = load().ModelCard(text).data
        release = _release(data.to_dict(), data.datasets[0].removesuffix("-data"))
        suffix = str(data.to_dict().get("model_name", "")).removeprefix(release.name)
        expected = render.variant_metadata(suffix, release, read_variant_facts(folder))
    else:
        data = load().RepoCard(text).data
        release = _release(data.to_dict())
        expected = render.plain_metadata(release.license.code)
        if kind == "dataset":
            expected = render.data_metadata(release, read_data_facts(folder))
    is_equal = schema.metadata_of(text) == str(expected)
    return [] if is_equal else [f"{CARD}: its metadata are not those that the files beside it give"]


def _release(stated: Mapping[str, Any], repository: str = "/") -> ReleaseInfo:
    """What a card states of its release. stated: its metadata. repository: that of the final model."""
    namespace, _, name = repository.partition("/")
    spdx = str(stated.get("license_name", stated.get("license")))
    return ReleaseInfo(
        format=FORMAT,
        card_schema=SCHEMA,
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
