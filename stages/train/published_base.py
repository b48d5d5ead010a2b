"""The published model that a recipe begins with, as its files state it: for `atom init`, and for what can be refused
before anything runs."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline.core.bounds import spdx
from pipeline.core.environment import machine_paths
from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import home_folder, sha256_file
from pipeline.core.text import printable, shown

SUMS = "SHA256SUMS"
CARD = "README.md"
CONFIG = "config.json"
CARD_BYTES, CONFIG_BYTES = 4 << 20, 4 << 20
REPOSITORY = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?")


def section(model: str) -> dict[str, str]:
    """The section start_from for a published model: a model's folder of a release, such as RELEASE/model, or a
    repository of the Hub, with @ and a revision if it is not `main`. Raises AtomError."""
    if Path(model).is_dir():
        return _stated(Path(model), _repository_of(Path(model))) | {"folder": _portable(model)}
    if (match := REPOSITORY.fullmatch(model)) is None:
        raise AtomError(f"{shown(model)} is neither a folder here nor a repository of the Hub such as local/atom-tiny")
    revision = match["revision"] or "main"
    with tempfile.TemporaryDirectory() as folder:
        _pull(match["repo"], revision, Path(folder))
        return _stated(Path(folder), match["repo"]) | ({} if revision == "main" else {"revision": revision})


def license_of(card: Path) -> str:
    """The license that the metadata of a card state; `None` if they state none, or are no YAML."""
    text = card.read_text("utf-8", "replace") if card.is_file() and card.stat().st_size <= CARD_BYTES else ""
    head = re.match(r"\A---\n(.*?)\n---\n", text, re.DOTALL)
    try:
        metadata = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        metadata = None
    fields: Mapping[str, Any] = metadata if isinstance(metadata, Mapping) else {}
    return str(fields.get("license_name") if fields.get("license") == "other" else fields.get("license"))


def dtype_of(folder: Path) -> str | None:
    """The type of the weights that config.json in a folder states; None if it is not there, or says nothing of it."""
    path = folder / CONFIG
    try:
        stated = json.loads(path.read_text("utf-8")) if path.stat().st_size <= CONFIG_BYTES else None
    except (OSError, ValueError):
        return None  # the stage `import` says what is wrong with it
    dtype = (stated.get("dtype") or stated.get("torch_dtype")) if isinstance(stated, dict) else None
    return dtype if isinstance(dtype, str) else None


def require_dtype(repo: str, published: str | None, dtype: str | None) -> str | None:
    """A sentence if the first phase would publish its weights in another type than those of the model; None if not, or
    if one of them is not known."""
    if None in (published, dtype) or published == dtype:
        return None
    return (
        f"start_from: {repo} is published in {printable(str(published))}, and after the first phase of this recipe "
        f"models are published in {dtype}, while a release holds the model that it begins with bit for bit; set the "
        f"precision of that phase to {'fp32' if published == 'float32' else 'bf16'}"
    )


def _stated(folder: Path, repo: str) -> dict[str, str]:
    """The fields that the files of a repository give. Raises CheckFailed."""
    if not (folder / SUMS).is_file():
        raise CheckFailed(f"{folder} has no {SUMS}, which every model that atom published has; name such a model")
    stated = license_of(folder / CARD)
    try:
        license = spdx(stated)
    except ValueError:
        raise CheckFailed(f"the card of {repo} states no license that SPDX knows: {printable(stated)}") from None
    return {"repo": repo, "digest": f"sha256:{sha256_file(folder / SUMS)}", "license": license}


def _portable(folder: str) -> str:
    """A path as a recipe in the present folder may have it, which is published as it is written."""
    is_of_machine = any(Path(folder).is_relative_to(path) for path in machine_paths(home_folder()))
    return os.path.relpath(folder) if is_of_machine else folder


def _repository_of(folder: Path) -> str:
    """The repository of a model's folder of a release, by the release's own statement. Raises AtomError."""
    path, kind = folder.resolve().parent / "evidence/release.json", re.fullmatch("model(|-.+)", folder.resolve().name)
    try:
        about = json.loads(path.read_text("utf-8"))
        return f"{about['namespace']}/{about['name']}{kind[1]}"  # type: ignore[index]
    except (OSError, ValueError, KeyError, TypeError):
        raise AtomError(
            f"{folder} is no model's folder of a release, such as RELEASE/model; name such a folder, or the repository "
            "on the Hub"
        ) from None


def _pull(repo: str, revision: str, target: Path) -> None:
    """Pulls what states the model, not its weights. Raises AtomError."""
    from pipeline.hub.client import RemoteRepository, api, translate_errors

    remote, name = RemoteRepository(repo, "model"), f"{repo}@{revision}"
    with translate_errors(f"reading {name}"):
        commit = remote.commit(revision)
        for path in sorted({SUMS, CARD} & remote.files(commit).keys()):
            api().hf_hub_download(repo, path, repo_type="model", revision=commit, local_dir=target)
