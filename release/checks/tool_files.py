"""Checks the files that this tool writes without measuring anything: programs, options of servers, chat templates,
texts of licenses. Each must be, byte for byte, what this tool writes, since people run them and rely on them."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import release
from pipeline.core.code_snapshot import roots
from pipeline.core.text import escaped
from pipeline.hub.client import load
from release import schema
from release.cards import render
from release.cards.results import FOLDER as RESULTS
from release.checks import loader_configs
from release.checks.findings import Findings
from release.facts import serving
from release.facts.published_tables import read_json, to_json
from release.layout import CODE_README, FILTER_AGREEMENT, MODEL, NOTICE, RECIPE, RELEASE, SECOND_VERIFIER, STANDARDS
from release.opened_release import Release
from release.published_files import CODE_LICENSE, code_license_text, license_text
from release.schema import CARD
from release.standards import bundle
from stages.data.curation.agreement import read_figures
from stages.export.hf import generation_config, model_tokenizer_config
from stages.formats.chat_templates import INFERENCE_FILE, TRAINING_FILE, inference_template, training_template
from stages.formats.tokenizer import CONFIG_FILE, tokenizer_config
from stages.train.imported_weights import NAME as BASE

OWN_VERIFIER = Path(release.__path__[0], Path(SECOND_VERIFIER).name)
WITH_CARD = {"dataset": [NOTICE], "evidence": [f"{STANDARDS}/"]}
"""Further texts of a repository, by its kind, that follow from the whole release."""
ALONE = {
    "dataset": (
        "croissant.json", "evaluation/canary.json", "evaluation/harness/*/tasks.json", "order/*/meta.json",
        "summary.json", "tokens/meta.json", "tokens/tokenizer_stats.json",
    ),
    "evidence": ("evidence/attestations/evaluation-*.json",),
    "model": ("the numbers of config.json", "evaluation/harness/tasks.json"),
    "variant": ("the numbers of config.json",),
    "repository": ("index.json",),
    "checkpoint": ("state.json",),
}  # fmt: skip
"""Files of a repository, by its kind, whose values nothing beside them shows."""
LICENSE_FIELDS = ("license", "license_name", "license_link")
"""Fields of a card's metadata."""
TAG = re.compile(r"/tree/v([0-9.]+)/evaluation/")
"""The version of a release in the sources of a model's results."""


def tool_files(release: Release) -> Findings:
    """Checks these files of a folder, as far as it shows what they follow from."""
    findings = Findings(summary="programs, options, templates and licenses are as this atom writes them")
    if names := ALONE.get(release.kind):
        findings.skipped["alone"] = f"values: nothing in this repository alone shows those of {', '.join(names)}"
    if release.kind == "checkpoint":  # it has no card
        reason = "LICENSE: nothing in the branch of a checkpoint states the license of its weights"
        return Findings(list(_licenses(release, findings)), {"LICENSE": reason} | findings.skipped)
    if not release.is_whole:
        texts = ", ".join([CARD, *WITH_CARD.get(release.kind, ())])
        findings.skipped["words"] = f"words: those of {texts} are compared where all files of the release are there"
    findings.problems += _problems(release, findings)
    return findings


def _problems(release: Release, findings: Findings) -> Iterator[str]:
    kind = release.kind
    if kind in ("release", "evidence"):
        yield from _of_evidence(release)
    for model in release.model_folders if kind in ("release", "model") else ():
        prefix = f"{model.name}/" if release.is_whole else ""
        yield from (prefix + text for text in _of_model(release, model, findings))
    if release.is_whole:
        for name in release.variant_names:
            yield from (f"{name}/{text}" for text in _of_loader(release.root / name, None, findings))
    elif kind == "variant":
        yield from _of_loader(release.root, None, findings)
    if kind in ("release", "dataset"):
        prefix = "dataset/" if release.is_whole else ""
        yield from (prefix + text for text in _of_data(release, findings))
    yield from _licenses(release, findings)


def _of_evidence(release: Release) -> Iterator[str]:
    """Problems of the verifier, of the README of the code, and of release.json, which follows from the recipe."""
    if _differs(release.root / SECOND_VERIFIER, OWN_VERIFIER.read_bytes()):
        yield f"{SECOND_VERIFIER} is not the verifier of this atom"
    if _differs(release.root / CODE_README, render.code_readme(release.info).encode()):
        yield f"{CODE_README} is not what this atom writes"
    for name, value in schema.stated_by_recipe(release.recipe).items():
        if getattr(release.info, name) != value:
            yield f"{RELEASE} states another {name} than {RECIPE}"


def _of_model(release: Release, model: Path, findings: Findings) -> Iterator[str]:
    """Problems of the files of one model's repository."""
    is_chat = release.models[model.name].is_chat
    repo, version = _names(release, model)
    expected = serving.serve_config(model, repo, version).encode() if is_chat else None
    if _differs(model / serving.NAME, expected):
        if is_chat:
            yield f"{serving.NAME} is not what this atom writes for the model"
        else:
            yield f"{serving.NAME} is there, and the model was not trained to converse"
    yield from _of_loader(model, is_chat, findings)


def _names(release: Release, model: Path) -> tuple[str, str]:
    """The repository of a model, and the version of its release; alone, as its card and its results state them."""
    if release.is_whole:
        return f"{release.info.repository}{model.name.removeprefix(MODEL)}", release.info.version
    card = (model / CARD).read_text()
    data: Any = load().ModelCard(card).data
    results = "".join(path.read_text() for path in sorted((model / RESULTS).glob("*.yaml")))
    version = TAG.search(results)
    return f"{render.data_of(card).partition('/')[0]}/{data.model_name}", version[1] if version else ""


def _of_loader(folder: Path, is_chat: bool | None, findings: Findings) -> Iterator[str]:
    """Problems of the files that loaders read beside the weights. is_chat: whether it converses; None: of a variant,
    which may be either."""
    yield from loader_configs.problems(folder)
    if not (folder / CONFIG_FILE).is_file():  # GGUF, whose file has their content
        return
    templates = {INFERENCE_FILE: inference_template(), TRAINING_FILE: training_template()}
    differing = [name for name, text in templates.items() if _differs(folder / name, text.encode())]
    context = read_json(folder / CONFIG_FILE).get("model_max_length")
    if (folder / "config.json").is_file():
        context = read_json(folder / "config.json")["max_position_embeddings"]
    kinds = (True, False) if is_chat is None else (is_chat,)
    configs = [model_tokenizer_config(tokenizer_config(), context, kind) for kind in kinds]
    texts = [json.dumps(config, indent=1, sort_keys=True) + "\n" for config in configs]
    differing += [CONFIG_FILE] if all(_differs(folder / CONFIG_FILE, text.encode()) for text in texts) else []
    if differing and (folder / BASE).is_file():
        repo = escaped(str(read_json(folder / BASE).get("repo")))
        findings.skipped["templates"] = (
            f"{', '.join(differing)}: taken over from {repo}, and not as this atom writes them"
        )
        differing = []
    yield from (f"{name} is not what this atom writes" for name in differing)
    ids = {token["content"]: int(token["id"]) for token in read_json(folder / "tokenizer.json")["added_tokens"]}
    if all(_differs(folder / "generation_config.json", generation_config(kind, ids)) for kind in kinds):
        yield "generation_config.json is not what this atom writes"


def _of_data(release: Release, findings: Findings) -> Iterator[str]:
    if _differs(release.dataset / FILTER_AGREEMENT, to_json(read_figures())):
        yield f"{FILTER_AGREEMENT} does not have the figures of this atom"
    path = release.dataset / bundle.PYTHON_LICENSE
    if not path.is_file() or not _differs(path, bundle.python_license()):
        return
    python = read_json(release.root / "evidence/environment.json").get("python") if release.is_whole else None
    if python == platform.python_version():
        yield f"{bundle.PYTHON_LICENSE} is not the license of Python {python}"
    else:
        findings.skipped[bundle.PYTHON_LICENSE] = (
            f"{bundle.PYTHON_LICENSE}: it is not the license of Python {platform.python_version()}, which runs here"
        )


def _licenses(release: Release, findings: Findings) -> Iterator[str]:
    """Problems of the license of each repository: its text must be that of the license that is stated."""
    folder = release.root
    if release.kind in ("release", "evidence"):
        for place in [place.folder for place in release.repositories] if release.is_whole else [""]:
            spdx, path = release.license_of(place), f"{place}/LICENSE".lstrip("/")
            if _differs(folder / path, license_text(spdx, release.info.license.code, [folder / "code"])):
                yield f"{path} is not the text of {spdx}"
        return
    text = (folder / "LICENSE").read_bytes()
    stated = re.match(rb"SPDX-License-Identifier: (\S+)\n", text)
    spdx = stated[1].decode() if stated else CODE_LICENSE
    if stated and text != license_text(spdx, "", []):
        yield "LICENSE is not the text that this atom writes"
    elif not stated and text != code_license_text(roots()):
        findings.skipped["LICENSE"] = "LICENSE: its text is not one that this atom writes; read it"
    elif (folder / CARD).is_file():
        card: Any = load().RepoCard((folder / CARD).read_text()).data.to_dict()
        expected = render.license_fields(spdx)
        if expected != {name: card[name] for name in LICENSE_FIELDS if name in card}:
            yield f"{CARD} states another license than LICENSE, which is the text of {spdx}"


def _differs(path: Path, expected: bytes | None) -> bool:
    """Returns True if a file is not the expected one; None: it must not be there."""
    return (path.read_bytes() if path.is_file() else None) != expected
