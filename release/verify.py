"""`atom verify`: what a stranger can check on a release folder, or on one repository pulled from the Hub.

First every byte against the checksum files, both ways; only if that holds, what the files say about each other:
digests of manifests, statements and their materials, the balance of the dispositions, the cards' numbers. `deep` also
reads every tensor and document and recomputes what can be recomputed from them.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.errors import AtomError, CheckFailed
from release import checks, schema
from release.digests import Digests
from release.layout import (
    ALL_SUMS,
    FORMAT,
    ORIGINS,
    PARTS,
    PUBLIC_KEY,
    SIGNATURE,
    SUMS,
    Repository,
    compare,
    files_below,
    files_of,
    is_foreign_link,
    model_folders,
    read_sums,
    repositories,
)
from release.sign import Asked
from release.trust import ANYONE, Trust

SCHEMA = 1
README = "README.md"
SIGNS = (
    "evidence", "code/as-run", "dispositions.parquet", "parity.json", "checkpoints/index.json",
    *(f"{part}/{SUMS}" for part in PARTS),
)  # fmt: skip
Wrong = list[str]


@dataclass(frozen=True)
class Check:
    """One question and its answer; `wrong` names every file or number at fault, `skipped` every part that was not
    compared, with the reason. `ok` is None if it was not asked."""

    name: str
    ok: bool | None
    detail: str
    wrong: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)


@dataclass
class Verdict:
    """All checks of one subject. kind: release, evidence, dataset, model, checkpoint or repository."""

    subject: str
    kind: str
    deep: bool
    checks: list[Check] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return all(check.ok is not False for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        """{schema, subject, kind, deep, ok, checks: [{name, ok, detail, wrong, skipped}]}; fields are only added."""
        body = {"schema": SCHEMA, "subject": self.subject, "kind": self.kind, "deep": self.deep, "ok": self.ok}
        return {**body, "checks": [asdict(check) for check in self.checks]}

    def require(self) -> None:
        """Raises CheckFailed with the first thing that is wrong."""
        found = [
            (check.name, text) for check in self.checks if check.ok is False for text in check.wrong or [check.detail]
        ]
        if found:
            more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
            raise CheckFailed(f"{self.subject}: {found[0][1]} [{found[0][0]}]{more}")


def verify(
    subject: str | Path,
    deep: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    trust: Trust = ANYONE,
) -> Verdict:
    """Checks a folder, or `namespace/name[@revision]`, which is downloaded first to a temporary folder.

    Raises AtomError if there is nothing to check under that name; what is wrong with the thing is in the verdict.
    """
    asked = trust.asked()  # a mistake of the caller's is told before anything is read
    path = Path(subject)
    if path.exists():
        if not path.is_dir():
            raise AtomError(f"{path} is a file; give the folder of a release or of a pulled repository")
        return _verify_folder(path, str(subject), deep, progress, asked)
    if str(subject).split("@")[0].count("/") != 1 or str(subject).startswith((".", "/")):
        raise AtomError(f"there is no folder {subject}; a repository on the Hub is written namespace/name[@revision]")
    from release.pull import pull_named

    with tempfile.TemporaryDirectory(prefix="atom-verify-") as folder:
        progress(f"downloading {subject}")
        return _verify_folder(pull_named(str(subject), Path(folder)), str(subject), deep, progress, asked)


def kind_of(folder: Path) -> str:
    """What a folder is, by the files that only it has."""
    marks = {
        "dispositions.parquet": "dataset",
        "config.json": "model",
        "state.json": "checkpoint",
        "index.json": "repository",  # the main branch of checkpoints
    }
    if kind := next((kind for mark, kind in marks.items() if (folder / mark).exists()), None):
        return kind
    if (folder / "evidence").is_dir() or (folder / "code").is_dir():
        return "release" if any((folder / part).exists() for part in PARTS) else "evidence"
    return "repository"


def shows_release(folder: Path) -> bool:
    """Whether a folder is, or once was, of a release: then a missing checksum file is a finding, not a wrong name."""
    if os.path.lexists(folder / SUMS) or any((folder / mark).exists() for mark in SIGNS):
        return True
    if (folder / "state.json").exists() and any(folder.glob("*.safetensors")):
        return True
    try:
        rows = json.loads((folder / "index.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(rows, list) and any(isinstance(row, dict) and {"branch", "state"} <= row.keys() for row in rows)


def _verify_folder(folder: Path, subject: str, deep: bool, progress: Callable[[str], None], asked: Asked) -> Verdict:
    if not shows_release(folder):
        raise AtomError(
            f"{subject} is neither a release nor a repository of one: it has no {SUMS}; "
            "give the folder that `atom build` made, or a repository that `atom publish` made"
        )
    kind = kind_of(folder)
    _require_known(folder)
    verdict = Verdict(subject, kind, deep)
    progress(f"hashing every file of {subject}")
    digests = Digests(folder, (path for path in files_below(folder) if not is_foreign_link(folder, path)))
    verdict.checks += _byte_checks(folder, kind, digests)
    verdict.checks.append(_signatures(folder, kind, digests, asked))
    present = (path for path in files_below(folder) if not is_foreign_link(folder, path))
    bad = checks.formats(folder, present, archive=kind in ("release", "evidence"))
    verdict.checks.append(
        Check("formats", not bad, bad[0] if bad else "no pickle, and no code beside weights or data", bad)
    )
    bytes_hold = verdict.ok
    for name, question, only_deep in _questions(folder, kind, digests):
        if only_deep and not deep:
            continue
        if not bytes_hold:
            verdict.checks.append(Check(name, None, "not asked, since the bytes are not what was published"))
            continue
        progress(name.replace("_", " "))
        findings = checks.Findings()
        try:
            answer = question()
            findings = answer if isinstance(answer, checks.Findings) else checks.Findings(answer)
            wrong = findings.wrong
        except ImportError as error:
            lacks = f"not asked, since it needs {error.name or error}; install atom-release[train]"
            verdict.checks.append(Check(name, None, lacks))
            continue
        except CheckFailed as error:
            wrong = [str(error)]
        except checks.Absent as error:
            verdict.checks.append(Check(name, None, str(error)))
            continue
        except Exception as error:  # anyone can write checksums: a file that is not what it should be is a finding
            wrong = [f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())}"]
        skipped = [f"skipped: {why}" for _, why in sorted(findings.skipped.items())]
        ok = not wrong if wrong or findings.compared else None
        verdict.checks.append(Check(name, ok, wrong[0] if wrong else findings.detail, wrong, skipped))
    return verdict


def _require_known(folder: Path) -> None:
    """Raises AtomError for a release of a later format than this program knows."""
    stated = schema.of_release(folder) or schema.of_card(folder)
    if stated is not None and stated.format > FORMAT:
        raise AtomError(
            f"{folder} has the format {stated.format}, and this atom knows {FORMAT} at most; use a later one"
        )


def _byte_checks(folder: Path, kind: str, digests: Digests) -> Iterator[Check]:
    """One check for each checksum file: what it lists is there and unaltered, and nothing else is there."""
    if kind != "release":
        yield _sums(folder, SUMS, folder, [p for p in files_below(folder) if p != SUMS], digests)
        if kind == "evidence":
            yield _agree(folder)
        return
    if missing := [part for part in PARTS if not (folder / part).is_dir()]:
        yield Check("release_complete", False, f"{missing[0]} is missing", [f"{name} is missing" for name in missing])
        return
    yield _sums(folder, ALL_SUMS, folder, [p for p in files_below(folder) if p not in (SUMS, ALL_SUMS)], digests)
    for place in repositories(folder):
        name = f"{place.folder}/{SUMS}".lstrip("/")
        yield _sums(folder, name, folder / place.folder, files_of(folder, place), digests)
    yield _agree(folder)


def _sums(folder: Path, name: str, base: Path, present: list[str], digests: Digests) -> Check:
    title = f"checksums: {name}"
    try:
        sums = read_sums(folder / name, name)
    except CheckFailed as error:
        return Check(title, False, str(error), [str(error)])
    prefix = base.relative_to(folder).as_posix()
    wrong = compare(sums, base, present, name, digests)
    if prefix != ".":
        wrong = [f"{prefix}/{text}" for text in wrong]
    return Check(title, not wrong, wrong[0] if wrong else f"{len(sums)} files, none missing, altered or extra", wrong)


def _signatures(folder: Path, kind: str, digests: Digests, asked: Asked) -> Check:
    """All repositories are signed, by one key or identity, and by that which is trusted; or none is signed."""
    from release import sign

    name = "signatures"
    places = [Repository("", "", "")]
    if kind == "release":
        if any(not (folder / part).is_dir() for part in PARTS):
            return Check(name, None, "not asked, since parts of the release are missing")
        places = repositories(folder)
    wrong: Wrong = []
    signers: dict[str, str | None] = {}
    for place in places:
        prefix = f"{place.folder}/" if place.folder else ""
        present = [*files_of(folder, place), SUMS] if kind == "release" else files_below(folder)
        found = sign.verify(folder / place.folder, present, digests, asked)
        if found is None:
            continue
        wrong += [prefix + text for text in found.wrong]
        signers[prefix] = found.by
    if not signers:
        if asked == Asked():
            return Check(name, None, "not signed")
        said = f"not signed, so not by {asked.by or 'whom the certificates vouch for'}"
        return Check(name, False, said, [said])
    unsigned = [f"{p.folder}/" if p.folder else "" for p in places]
    wrong += [f"{prefix or folder.name} is not signed, and others are" for prefix in unsigned if prefix not in signers]
    expected = asked.by or next(filter(None, signers.values()), None)
    for prefix, by in signers.items():
        if by not in (None, expected):
            wrong.append(
                f"{prefix}{PUBLIC_KEY if sign.FINGERPRINT.fullmatch(str(by)) else SIGNATURE} is {by}, not {expected}"
            )
    by_key = sign.FINGERPRINT.fullmatch(str(expected))
    signed = "signed by" if by_key or asked.by else "saying that they are signed by"
    what = f"{len(signers)} {'repository' if len(signers) == 1 else 'repositories'} {signed} {expected}"
    vouched = "; nothing but the release itself says whose key that is: compare it, or give it by --key"
    if not by_key:
        vouched = "; nothing but the release itself says so: give --identity and --issuer"
    return Check(name, not wrong, wrong[0] if wrong else what + ("" if asked.by else vouched), wrong)


def _agree(folder: Path) -> Check:
    """The root's checksums and those of the whole release say the same of every file that both list."""
    try:
        whole, root = read_sums(folder / ALL_SUMS, ALL_SUMS), read_sums(folder / SUMS, SUMS)
    except CheckFailed as error:
        return Check("checksums agree", False, str(error), [str(error)])
    wrong = [f"{SUMS} and {ALL_SUMS} disagree on {p}" for p in sorted(set(root) & set(whole)) if root[p] != whole[p]]
    return Check("checksums agree", not wrong, wrong[0] if wrong else "the two lists agree", wrong)


def _questions(
    folder: Path, kind: str, digests: Digests
) -> Iterator[tuple[str, Callable[[], Wrong | checks.Findings], bool]]:
    """(name, question, only if deep) for this kind of folder."""
    from release import deep_checks, rescore

    whole = kind == "release"
    if (folder / README).is_file():
        yield "versions", lambda: checks.stated_versions(folder, whole), False
    if whole or kind == "evidence":
        yield "manifests", lambda: checks.manifests(folder), False
        yield "origins", lambda: _all_explained(folder) + checks.origins(folder, digests), False
        yield "statements", lambda: checks.statements(folder, digests), False
        yield "gates", lambda: _gates(folder), False
        yield "attestations", lambda: checks.attestations(folder), False
        yield "code", lambda: deep_checks.code(folder), True
    if whole or kind == "dataset":
        data = folder / "dataset" if whole else folder
        yield "dispositions_balance", lambda: checks.dispositions(data), False
        yield "licences", lambda: checks.licences(data), False
        yield "scores", lambda: checks.scores(data) + checks.chat_scores(data), False
        yield "data_card", lambda: checks.data_card(data), False
        yield "merkle_roots", lambda: checks.roots(data), False
        yield "documents", lambda: deep_checks.documents(data), True
        yield "order", lambda: deep_checks.order(data), True
        yield "answers", lambda: rescore.answers(data), True
    if whole:
        yield "cards", lambda: checks.cards(folder), False
        yield "croissant", lambda: checks.described(folder, digests), False
        yield "weights", lambda: deep_checks.weights(folder), True
        if (folder / "dataset/evaluation/fresh").is_dir():
            yield "fresh_set", lambda: checks.fresh_set(folder), True
    elif kind == "model":
        yield "cards", lambda: checks.model_card(folder), False
    if kind in ("model", "checkpoint"):
        yield "weights", lambda: deep_checks.weights(folder), True
    if whole or kind == "model":
        models = [folder / name for name in model_folders(folder)] if whole else [folder]
        yield "reload_in_transformers", lambda: deep_checks.reload(models), True


def _all_explained(folder: Path) -> Wrong:
    from release.assemble import unexplained

    origins = json.loads((folder / ORIGINS).read_text())
    return [f"{path} has no origin" for path in unexplained(folder, origins, files_below(folder))]


def _gates(folder: Path) -> Wrong:
    gates = json.loads((folder / "evidence/gates.json").read_text())
    return [
        f"evidence/gates.json: gate {name} failed: {gate['detail']}"
        for name, gate in sorted(gates.items())
        if not gate["ok"]
    ]
