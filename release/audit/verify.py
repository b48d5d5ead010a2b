"""`atom verify`: checks a release folder, or one repository from the Hub, from its published files alone.

First it compares every file with the checksum files, in both directions. Only if these agree, it checks the files
against each other: digests of manifests, statements and their materials, the balance of the dispositions, the numbers
of the cards. `deep` also reads every tensor and document and recomputes the figures that follow from them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import printable
from release import schema, scratch, signing
from release.checks import formats, listing, registry, tool_files
from release.checks.check import Check, Findings
from release.checks.check_runner import CheckRunner, run_check
from release.checks.listing import Checksums, Contents, kind_of
from release.checks.verdict import CheckResult, Problems, Verdict, answer
from release.facts.tombstones import ChangedRepository, Tombstone, read_tombstones
from release.layout import ALL_SUMS, PUBLIC_KEY, RETRACTED, SIGNATURE, SITE, SUMS
from release.opened_release import Release
from release.repositories import Digests, compare, read_sums
from release.signing import ANYONE, Trust, TrustPolicy
from release.untrusted import scan
from release.web_page import page as web_page

__all__ = ["CheckResult", "Verdict", "kind_of", "verify"]

FORMATS_HOLD = "no pickle, no program, and no code beside weights or data"


def verify(
    subject: str | Path,
    deep: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    trust: Trust = ANYONE,
    checked: str = "",
) -> Verdict:
    """Checks a folder, or `namespace/name[@revision]`, which is first downloaded to a temporary folder.

    Args:
        subject: The folder or the name.
        deep: Whether to read every tensor and document, too.
        progress: Is told each step.
        trust: Whose signatures count.
        checked: Digest of a verdict that holds. What has the same bytes needs no second look at its content.

    Returns:
        The verdict, which has the problems of the subject.

    Raises:
        AtomError: Nothing of that name can be checked.
    """
    policy = trust.policy()  # report errors of the caller before reading anything
    name, path = str(subject), Path(subject)
    if path.exists():
        if not path.is_dir():
            raise AtomError(f"{printable(name)} is a file; give the folder of a release or of a pulled repository")
        return _verify_folder(path, name, deep, progress, policy, checked)
    if name.split("@")[0].count("/") != 1 or name.startswith((".", "/")):
        raise AtomError(
            f"there is no folder {printable(name)}; a repository on the Hub is written namespace/name[@revision]"
        )
    with scratch.folder() as folder:
        progress(f"downloading {name}")
        return _verify_folder(scratch.pull_named(name, folder), name, deep, progress, policy, checked)


def _verify_folder(
    folder: Path, subject: str, deep: bool, progress: Callable[[str], None], policy: TrustPolicy, checked: str
) -> Verdict:
    """Runs all checks of a folder, the cheap ones first: nothing is hashed or parsed before its size is known."""
    if not listing.looks_like_release(folder):
        raise AtomError(
            f"{printable(subject)} is neither a release nor a repository of one: it has no {SUMS}; "
            "give the folder that `atom build` made, or a repository that `atom publish` made"
        )
    verdict = Verdict(subject, kind_of(folder), deep)
    # The rules below are those of this version, and say nothing about a folder of another one.
    if refusal := schema.refusal(folder):
        verdict.checks.append(answer("versions", [refusal]))
        return verdict

    # The listing, within limits that the sizes of the checksum files set.
    progress(f"listing the files of {verdict.subject}")
    sums = Checksums(folder)
    if sums.overflow:
        verdict.checks.append(answer("files", [sums.overflow]))
        return verdict
    listed_paths = sums.listed()
    tree = scan(folder, len(listed_paths))
    contents = Contents(folder, verdict.kind, sums, tree)
    verdict.checks.append(listing.check_files(contents))
    verdict.digest = sha256_file(folder / SUMS) if SUMS in tree.files else ""
    if tree.overflow:
        return verdict

    # The bytes.
    progress(f"hashing every file of {verdict.subject}")
    digests = Digests(folder, tree, listed_paths)
    # The set of all paths may be large, and nothing below needs it.
    del listed_paths
    verdict.checks += _byte_checks(contents, digests)
    runner = CheckRunner(Release(folder, verdict.kind, digests), tree, deep)
    verdict.checks += runner.limits()
    if any(path.endswith(SIGNATURE) for path in tree.files):
        signing.load_libraries()  # before the fork of the check, whose limits would not allow it
    signatures = runner.run("signatures", lambda: _check_signatures(contents, digests, policy))
    verdict.checks.append(signatures)
    # A signature by an unknown key proves no more than the checksums do.
    verdict.signed, verdict.signer_is_known = signatures.ok is True, bool(policy.signer)
    archive = verdict.kind in ("release", "evidence")
    verdict.checks.append(
        runner.run("formats", lambda: answer("formats", formats.formats(folder, tree.files, archive), FORMATS_HOLD))
    )
    # Taken before the check of names, whose problems do not keep the content from being checked.
    bytes_hold = verdict.ok
    verdict.checks.append(listing.check_names(contents))

    # The content, which nobody parses if the bytes are not those that were published.
    if bytes_hold and checked and verdict.digest == checked:
        verdict.checks.append(CheckResult("content", None, "not checked again: the bytes are those that were checked"))
    elif (folder / RETRACTED).exists():
        _check_remainder(verdict, runner, bytes_hold)
    else:
        verdict.checks += _content_checks(runner, bytes_hold, progress)
    return verdict


def _content_checks(runner: CheckRunner, bytes_hold: bool, progress: Callable[[str], None]) -> Iterator[CheckResult]:
    """Compares the files with each other."""
    if bytes_hold:
        yield from runner.check_tables()
    checks = list(registry.verifiers(runner.release, runner.deep))
    for number, check in enumerate(checks, 1):
        # Files that were too slow for an earlier check would take even longer in one that sets its own limits.
        if runner.spent and not check.confined:
            continue
        if not bytes_hold:
            reason = "not checked, because the bytes are not what was published"
            yield CheckResult(check.name, None, reason)
            continue
        progress(f"check {number} of {len(checks)}: {check.name.replace('_', ' ')}")
        yield runner.ask(check)
    if not runner.deep and (further := [check for check in registry.verifiers(runner.release, True) if check.deep]):
        yield _left_out("deep", "without --deep", further)


def _check_remainder(verdict: Verdict, runner: CheckRunner, bytes_hold: bool) -> None:
    """Checks a folder with a tombstone: what is left need not agree any more with what was measured on the whole."""
    release, folder = runner.release, runner.release.root
    verdict.checks.append(runner.run("tombstone", lambda: check_tombstone(folder, verdict.kind)))
    verdict.retracted = _taken_back(folder) if verdict.ok else ""
    applicable = list(registry.verifiers(release, True))
    # Programs and options of servers do not depend on the documents, so they must still be what this tool writes.
    kept = [check for check in applicable if check.function is tool_files.tool_files and bytes_hold]
    verdict.checks += [runner.ask(check) for check in kept]
    if bytes_hold and (folder / SITE).exists():
        verdict.checks.append(
            runner.run("page", lambda: run_check("page", lambda: Findings(web_page.foreign_scripts(release))))
        )
    verdict.retracted = verdict.retracted if verdict.ok else ""
    left_out = [check for check in applicable if check not in kept]
    verdict.checks.append(_left_out("content", "since documents were taken back", left_out))


def _taken_back(folder: Path) -> str:
    """Returns a sentence on what was taken back from a folder with a tombstone."""
    return "; ".join(tombstone.sentence for tombstone in read_tombstones(folder))


def check_tombstone(folder: Path, kind: str) -> CheckResult:
    """Checks that the files are those that the last tombstone states."""
    try:
        tombstones = read_tombstones(folder)
        if not tombstones:
            return answer("tombstone", [f"{RETRACTED} names no retraction"])
        return answer("tombstone", _tombstone_problems(folder, kind, tombstones[-1]), tombstones[-1].sentence)
    except CheckFailed as error:
        return answer("tombstone", [str(error)])


def _tombstone_problems(folder: Path, kind: str, tombstone: Tombstone) -> list[str]:
    rows = tombstone.repositories
    if kind == "release":
        return [text for row in rows for text in _differences(folder / row.folder, row)]
    if any(not _differences(folder, row) for row in rows):
        return []
    return ["the files are of no repository that the tombstone names"]


def _differences(folder: Path, row: ChangedRepository) -> list[str]:
    sums = read_sums(folder / SUMS, SUMS)
    prefix = f"{row.folder}/" if row.folder else ""
    return [
        f"{file.path} is not what {RETRACTED} says"
        for file in row.files
        if sums.get(file.path.removeprefix(prefix)) != file.after
    ]


def _left_out(name: str, when: str, checks: Iterable[Check]) -> CheckResult:
    """Returns the result that stands for checks that do not run."""
    return CheckResult(name, None, f"not checked {when}: {', '.join(check.name for check in checks)}")


def _byte_checks(contents: Contents, digests: Digests) -> Iterator[CheckResult]:
    """Yields one check for each checksum file: all listed files exist unchanged, and no others exist."""
    if contents.kind != "release":
        yield _check_sums(contents, SUMS, "", [p for p in contents.present() if p != SUMS], digests)
        if contents.kind == "evidence":
            yield _check_agreement(contents.sums)
        return
    if contents.missing:
        yield answer("release_complete", contents.missing)
        return
    # The list of all files is written before the root's list, so it names neither itself nor that one.
    yield _check_sums(contents, ALL_SUMS, "", [p for p in contents.present() if p not in (SUMS, ALL_SUMS)], digests)
    for repository in contents.places:
        name = f"{repository.folder}/{SUMS}".lstrip("/")
        yield _check_sums(contents, name, repository.folder, contents.present_in(repository), digests)
    yield _check_agreement(contents.sums)


def _check_sums(contents: Contents, name: str, base: str, present: list[str], digests: Digests) -> CheckResult:
    title = f"checksums: {name}"
    try:
        sums = contents.sums.read(name)
    except CheckFailed as error:
        return CheckResult(title, False, str(error), [str(error)])
    problems = compare(sums, contents.folder / base, present, name, digests)
    if base:
        problems = [f"{base}/{text}" for text in problems]
    return CheckResult(
        title, not problems, problems[0] if problems else f"{len(sums)} files, none missing, altered or extra", problems
    )


def _check_signatures(contents: Contents, digests: Digests, policy: TrustPolicy) -> CheckResult:
    """Checks that all repositories are signed by one trusted key or identity, or that none is signed."""
    name, folder = "signatures", contents.folder
    if contents.kind == "release" and contents.missing:
        return CheckResult(name, None, "not checked, because parts of the release are missing")
    # One signer for all: whoever replaced a single repository would have to sign with a key of their own.
    repositories = contents.places
    problems: Problems = []
    signers: dict[str, str | None] = {}
    for repository in repositories:
        prefix = f"{repository.folder}/" if repository.folder else ""
        present = [*contents.present_in(repository), SUMS] if contents.kind == "release" else contents.present()
        unreadable = [name for name in (SIGNATURE, PUBLIC_KEY) if os.path.lexists(folder / repository.folder / name)]
        if unreadable := [name for name in unreadable if prefix + name not in digests.tree.files]:
            problems += [f"{prefix}{name} is no file that can be read" for name in unreadable]
            signers[prefix] = None
            continue
        verdict = signing.verify(folder / repository.folder, present, digests, policy)
        if verdict is None:
            continue
        problems += [prefix + text for text in verdict.problems]
        signers[prefix] = verdict.signer
    if not signers:
        # A missing signature is a problem only for a caller who named a signer.
        if policy == TrustPolicy():
            return CheckResult(name, None, "not signed")
        message = f"not signed, so not by {policy.signer}"
        return CheckResult(name, False, message, [message])
    unsigned = [f"{p.folder}/" if p.folder else "" for p in repositories]
    problems += [
        f"{prefix or folder.name} is not signed, and others are" for prefix in unsigned if prefix not in signers
    ]
    expected = policy.signer or next(filter(None, signers.values()), None)
    for prefix, signer in signers.items():
        if signer not in (None, expected):
            file = PUBLIC_KEY if signing.is_fingerprint(signer) else SIGNATURE
            problems.append(f"{prefix}{file} is {signer}, not {expected}")
    by_key = signing.is_fingerprint(expected)
    signed = "signed by" if by_key or policy.signer else "saying that they are signed by"
    summary = f"{len(signers)} {'repository' if len(signers) == 1 else 'repositories'} {signed} {expected}"
    hint = "; nothing but the release itself says whose key that is: compare it, or give it by --key"
    if not by_key:
        hint = "; nothing but the release itself says so: give --identity and --issuer"
    return CheckResult(
        name, not problems, problems[0] if problems else summary + ("" if policy.signer else hint), problems
    )


def _check_agreement(sums: Checksums) -> CheckResult:
    """Checks that the root's checksums and those of the whole release agree for every file that both list."""
    try:
        release_sums, root_sums = sums.read(ALL_SUMS), sums.read(SUMS)
    except CheckFailed as error:
        return CheckResult("checksums agree", False, str(error), [str(error)])
    problems = [
        f"{SUMS} and {ALL_SUMS} disagree on {p}"
        for p in sorted(set(root_sums) & set(release_sums))
        if root_sums[p] != release_sums[p]
    ]
    return CheckResult("checksums agree", not problems, problems[0] if problems else "the two lists agree", problems)
