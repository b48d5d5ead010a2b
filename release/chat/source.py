"""The model that is talked to: found in a release, in a folder or on the Hub, with what its publisher states of it."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped, printable
from pipeline.hub.client import api, translate_errors
from release import schema
from release.layout import MODEL, RELEASE, SUMS
from release.repositories import model_folders, read_sums
from stages.generation.chat_models import OTHER_JSON

# The prompts that are suggested at the start.
SUGGESTIONS = 4
# In the dataset repository, the problems of the evaluation in conversation.
ITEMS = "evaluation/chat.jsonl"
# The ends of the names of files that loaders read.
LOADED = (".safetensors", ".json", ".jinja", ".model", ".txt")
# The license, and the first dataset, in the metadata of a card.
LICENSE, DATASET = r"^license: (.+)$", r"^datasets:\n *- (.+)$"
# Bytes that are hashed at the start: more would take longer than some seconds.
MOST_HASHED = 4 << 30


class Suggestion(NamedTuple):
    """A problem of the evaluation.

    Attributes:
        prompt: What the user says.
        expected: The right answer; None where the problem has no single one.
    """

    prompt: str
    expected: Any


def find(target: str, model: str | None) -> Path:
    """Returns the folder of a model; one on the Hub is downloaded to the client's cache.

    Args:
        target: A release, the folder of a model, or `namespace/name[@revision]`.
        model: The folder of a release's model; None for its final one.

    Raises:
        AtomError: There is no such model.
    """
    path = Path(target)
    folders = model_folders(path) if (path / RELEASE).is_file() else []
    if model not in (None, *folders):
        raise AtomError(
            f"{printable(target)} has no model {printable(model or '')}; it has {', '.join(folders) or 'one'}"
        )
    if folders:
        path /= model or MODEL
    elif not path.exists():
        path = _download(target)
    if not (path / "config.json").is_file():
        raise AtomError(
            f"there is no model in {printable(target)}, which has no config.json; give a release of `atom build`, "
            "a model's folder, a repository NAMESPACE/NAME of the Hub, or the URL of a server"
        )
    return path


def _download(target: str) -> Path:
    name, _, revision = target.partition("@")
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise AtomError(f"there is no folder {printable(target)}; a repository of the Hub is NAMESPACE/NAME[@REVISION]")
    patterns = [*(f"*{end}" for end in LOADED), schema.CARD, SUMS]
    with translate_errors(f"pulling {printable(target)}"):
        return Path(api().snapshot_download(name, revision=revision or None, allow_patterns=patterns))


def _stated(folder: Path, pattern: str) -> str | None:
    """Returns the group of a pattern in the metadata of a model's card; None without it."""
    card = folder / schema.CARD
    match = re.search(pattern, schema.metadata_of(card.read_text("utf-8", "replace")), re.M) if card.is_file() else None
    return escaped(match[1], 80) if match else None


def introduce(target: str, folder: Path) -> list[str]:
    """Returns sentences on a model: its place, its license, and that the loaded files are those of SHA256SUMS.

    Hashes all weights, in about a second per gigabyte, if they are below MOST_HASHED.

    Raises:
        CheckFailed: A file is not the one that was published.
    """
    stated = f"from {folder}, license {_stated(folder, LICENSE) or 'not stated'}"
    files = sorted(path for path in folder.iterdir() if path.suffix in LOADED)
    if not (folder / SUMS).is_file() or sum(path.stat().st_size for path in files) > MOST_HASHED:
        return [stated, f"its files were not compared with checksums: atom verify {target}"]
    sums = read_sums(folder / SUMS, SUMS)
    if altered := [path.name for path in files if sums.get(path.name) != sha256_file(path)]:
        raise CheckFailed(
            f"{printable(', '.join(altered))} in {folder} is not what {SUMS} there lists; see atom verify {target}"
        )
    return [stated, f"{SUMS} holds for the {len(files)} files that are loaded; the rest: atom verify {target}"]


def suggest(target: str, folder: Path) -> list[Suggestion]:
    """Returns problems of a model's evaluation: one of each kind first, those with the smallest hashes of their ids.

    So nobody chooses them, and they are the same each time. The problems of a model of the Hub are in the dataset that
    its card names. Memory grows with the problems of the evaluation.

    Raises:
        AtomError: The Hub does not give the dataset.
    """
    items = folder.resolve().parent / "dataset" / ITEMS
    if not Path(target).exists() and schema.of_card(folder) and (dataset := _stated(folder, DATASET)):
        with translate_errors(f"pulling {ITEMS} of {dataset}"):
            revision = target.partition("@")[2] or None
            items = Path(api().hf_hub_download(dataset, ITEMS, repo_type="dataset", revision=revision))
    if not items.is_file():
        return []
    kinds: dict[str, list[Suggestion]] = {}
    try:
        rows = [json.loads(line) for line in items.read_text("utf-8").splitlines()]
        rows.sort(key=lambda row: hashlib.sha256(row["id"].encode()).digest())
        for row in rows:
            request = row["responses_create_params"]
            messages = request["input"]
            if len(messages) == 1 and not request.get("tools"):
                suggestion = Suggestion(str(messages[0]["content"]), row.get("expected_answer"))
                kinds.setdefault(str(row["kind"]), []).append(suggestion)
    except OTHER_JSON:
        # A stranger's data set may have anything there.
        raise AtomError(f"{escaped(str(items), 200)} is no list of problems; name the model's own folder") from None
    rounds = itertools.zip_longest(*(kinds[kind] for kind in sorted(kinds)))
    return [problem for problem in itertools.chain(*rounds) if problem][:SUGGESTIONS]
