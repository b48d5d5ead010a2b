"""Where things stand in a release folder, which Hub repository each part becomes, and the checksum files.

    model/ model-<name>/ dataset/      one repository each: the final model, and those that it came from
    checkpoints/<phase>-step-<n>/      one branch each of the checkpoint repository, whose main branch is checkpoints/*
    README.md code/ evidence/          the evidence repository: the root of the release folder itself

Every repository (and every checkpoint branch) carries its own `SHA256SUMS`, so that a pulled copy can be checked alone,
and once it is signed a `model.sig`.
`evidence/SHA256SUMS` covers every file of the release but itself and the root's, and the root's covers it.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import CheckFailed
from pipeline.core.store import sha256_file
from release.tree import ENTRIES, is_foreign_link, walk
from release.untrusted import printable, read

SUMS = "SHA256SUMS"
ALL_SUMS = f"evidence/{SUMS}"
ORIGINS = "evidence/origins.json"
RELEASE = "evidence/release.json"
FORMAT = 3
"""Of the release folder, in release.json. 2: with Merkle roots, Croissant, attestations, canary, goldens and costs.
3: names of phases, models, metrics and settings are the field's words."""
GATES = "evidence/gates.json"
GATES_STATED = "evidence/attestations/gates.json"
ROOTS = "merkle.json"
"""Of the dataset repository: the Merkle root of each of its tables."""
GOLDENS = "goldens.json"
"""Of a model repository: token ids, text, logits and greedy continuations of fixed inputs."""
CANARY = "evaluation/canary.json"
SIGNATURE, PUBLIC_KEY = "model.sig", "model.pub"
"""In each repository, in no checksum file: the signature covers those, and the key is known by its fingerprint."""
MODEL, BASE = "model", "model-base"
PARTS = (MODEL, BASE, "dataset", "checkpoints")
"""What every release has beside its root; `model_folders` are more."""
TRAINING = ("pretrain", "midtrain", "longcontext", "sft", "rlvr", "dpo", "reward", "online-rlhf")
EXPORTED = ("init", "base", "mid", "long", "sft", "rlvr", "dpo", "online-rlhf")
"""Kinds of phases and of exported models, as `stages.graph` names them, in the order of training."""
ORDER = (
    "init", "pretrain", "base", "midtrain", "mid", "longcontext", "long", "sft", "rlvr", "dpo", "reward", "online-rlhf",
)  # fmt: skip
WITHOUT_ORDER = ("rlvr", "dpo", "reward", "online-rlhf")
REWARD_EXPORT = "export-reward"
"""The node that exports the reward model, which is published for what scored with it and not as a model."""
"""Phases that draw what they learn from; what they replay has an order, and only that."""
LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
SUMS_BYTES, SUMS_LINES = 32 << 20, 300_000
"""The most that the checksum files of a release may have together: it lists each file twice."""
PATH_BYTES, NAME_BYTES = 1024, 255
"""The most that a listed path, and each of its parts, may have."""
MOST_ENTRIES = ENTRIES + 4 * SUMS_LINES
"""Files and folders of a release, at most."""


@dataclass(frozen=True)
class Repository:
    """One revision of one Hub repository: `folder` is its place in the release ("" is the release's root)."""

    folder: str
    suffix: str
    kind: str
    branch: str = "main"

    def id(self, namespace: str, name: str) -> str:
        return f"{namespace}/{name}{self.suffix}"


def when(name: str) -> tuple[int, int, str]:
    """Sort key of phases, or of exported models: midtrain, longcontext-1, …, longcontext-10; unknown ones last."""
    kind, number = numbered(name)
    return (ORDER.index(kind), number, name) if kind in ORDER else (len(ORDER), 0, name)


def numbered(name: str) -> tuple[str, int]:
    """The kind of a phase or an exported model, and its number: longcontext and 2 of longcontext-2; 0 for those of
    which there is one, such as online-rlhf."""
    match = re.fullmatch(r"(.+)-([0-9]{1,9})", name)
    return (match[1], int(match[2])) if match else (name, 0)


def phases_of(nodes: Iterable[str]) -> list[str]:
    """The training phases among a graph's nodes, in order."""
    return sorted((node for node in nodes if numbered(node)[0] in TRAINING), key=when)


def models_of(nodes: Iterable[str]) -> list[str]:
    """The models that nodes export or evaluate, in the order of training: the last one is the release's model."""
    named = (node.partition("-") for node in nodes if node != REWARD_EXPORT)
    return sorted({which for kind, _, which in named if kind in ("export", "evaluate")}, key=when)


def model_name(folder: str, final: str) -> str:
    """The exported model that a folder holds; final: the name of the last one."""
    return final if folder == MODEL else folder.removeprefix(f"{MODEL}-")


def folders_of(models: Sequence[str]) -> dict[str, str]:
    """{exported model: its folder}; models: in the order of training. The untrained one is published as a checkpoint
    alone."""
    return {model: MODEL if model == models[-1] else f"{MODEL}-{model}" for model in models if model != "init"}


def model_folders(release: Path) -> list[str]:
    """The folders of a release that hold models, the final one first, then in the order of training; links to folders
    are none. Raises CheckFailed for a release of an unknown format."""
    from release import schema

    called = schema.reader(release).model
    found = [path.name.removeprefix(f"{MODEL}-") for path in release.glob(f"{MODEL}-*") if _is_own_folder(path)]
    return [MODEL, *(f"{MODEL}-{name}" for name in sorted(found, key=lambda name: when(called(name))))]


def repositories(release: Path) -> list[Repository]:
    """The repositories of a release in the order in which they are made public: data, checkpoints, models; links to
    folders are none. Raises CheckFailed for a release of an unknown format."""
    found = [Repository("dataset", "-data", "dataset"), Repository("", "-evidence", "dataset")]
    steps = sorted(p.name for p in (release / "checkpoints").iterdir() if _is_own_folder(p))
    found.append(Repository("checkpoints", "-checkpoints", "model"))
    found += [Repository(f"checkpoints/{name}", "-checkpoints", "model", name) for name in steps]
    final, *others = model_folders(release)
    found += [Repository(folder, folder.removeprefix(MODEL), "model") for folder in others]
    return [*found, Repository(final, "", "model")]


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def files_below(folder: Path) -> list[str]:
    """Every file below a folder as sorted POSIX paths, without signatures and their keys where they belong, and without
    what a Hub and its client add to a repository. Links are listed and not followed.

    Raises CheckFailed if there is more than any release has.
    """
    paths = []
    for path, status in walk(folder, MOST_ENTRIES):
        if isinstance(status, OSError):
            if status.errno == errno.E2BIG:
                raise CheckFailed(f"{printable(folder.name)} {status.strerror}")
        elif stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            paths.append(path)
    whole = (folder / RELEASE).is_file() and (folder / "checkpoints").is_dir()
    return published(paths, repositories(folder) if whole else [Repository("", "", "")])


def published(paths: Iterable[str], places: Iterable[Repository]) -> list[str]:
    """Of the files below a folder, sorted, those that its checksum file lists. places: the repositories in it."""
    signed = {f"{place.folder}/{name}".lstrip("/") for place in places for name in (SIGNATURE, PUBLIC_KEY)}
    return sorted(p for p in paths if p != ".gitattributes" and not p.startswith(".cache/") and p not in signed)


def files_of(release: Path, repository: Repository) -> list[str]:
    """The files of a repository, relative to its folder, its checksum file left out. Raises CheckFailed as
    `files_below` does."""
    found = files_below(release / repository.folder)
    return _of(repository, found, model_folders(release) if repository.folder == "" else [])


def files_within(paths: Sequence[str], repository: Repository, models: Iterable[str]) -> list[str]:
    """The same, of the sorted paths of all files below a release. models: its folders of models."""
    prefix = f"{repository.folder}/" if repository.folder else ""
    below = paths[bisect_left(paths, prefix) : bisect_left(paths, f"{prefix}\U0010ffff")] if prefix else paths
    return _of(repository, published((path[len(prefix) :] for path in below), [Repository("", "", "")]), models)


def _of(repository: Repository, paths: Iterable[str], models: Iterable[str]) -> list[str]:
    found = [path for path in paths if path != SUMS]
    if repository.folder == "":
        inside = {*PARTS, *models}
        return [path for path in found if path.split("/")[0] not in inside]
    if repository.folder == "checkpoints":
        return [path for path in found if "/" not in path]
    return found


def write_sums(target: Path, folder: Path, paths: list[str]) -> None:
    """The format of `sha256sum`: anyone can check with `sha256sum -c SHA256SUMS`."""
    target.write_text("".join(f"{sha256_file(folder / path)}  {path}\n" for path in sorted(paths)))


def read_sums(path: Path, name: str) -> dict[str, str]:
    """{path: sha256}. Raises CheckFailed naming the line that is damaged, doubled or out of order, or that names what
    no file of a release is called."""
    if not os.path.lexists(path):
        raise CheckFailed(f"{name} is missing")
    try:
        root = path.parents[0 if os.path.isabs(name) else name.count("/")]  # of the repository
        follow = not is_foreign_link(root, path.relative_to(root).as_posix())
        data = read(path, SUMS_BYTES, follow=follow)
    except CheckFailed as error:
        raise CheckFailed(str(error).replace(path.name, name, 1)) from None
    rows: dict[str, str] = {}
    last, line = "", b"\n"
    for number, line in enumerate(io.BytesIO(data), 1):
        if number > SUMS_LINES:
            raise CheckFailed(f"{name} has more than {SUMS_LINES} lines")
        try:
            match = LINE.fullmatch(line.decode().removesuffix("\n"))
        except UnicodeDecodeError:
            raise CheckFailed(f"{name} is altered: it is not UTF-8 text") from None
        if match is None or match[2] <= last:
            raise CheckFailed(f"{name} is altered: line {number} is not a checksum line in its place")
        last = match[2]
        if not is_plain_path(last):
            raise CheckFailed(f"{name} is altered: line {number} names {printable(last)}, which leads elsewhere")
        rows[last] = match[1]
    if not line.endswith(b"\n"):
        raise CheckFailed(f"{name} is altered: its last line is cut")
    return rows


def is_plain_path(path: str) -> bool:
    """Whether a path stays within the folder that it is relative to, and can be printed and opened."""
    parts = path.split("/")
    longest = max(len(part.encode(errors="replace")) for part in parts)
    return (
        path.isprintable()
        and not {"", ".", ".."} & set(parts)
        and longest <= NAME_BYTES
        and len(path.encode(errors="replace")) <= PATH_BYTES
    )


def compare(
    sums: dict[str, str],
    folder: Path,
    present: list[str],
    name: str,
    digest: Callable[[Path], str] = sha256_file,
) -> list[str]:
    """What is wrong between a checksum file and a folder: every missing, extra and altered file, by name.

    present: the regular files there.
    """
    wrong = [f"{path} is missing (listed in {name})" for path in sorted(set(sums) - set(present))]
    wrong += [f"{path} is not listed in {name}" for path in sorted(set(present) - set(sums))]
    wrong += [
        f"{path} is altered: it is not the file that {name} lists"
        for path in sorted(set(sums) & set(present))
        if digest(folder / path) != sums[path]
    ]
    return wrong
