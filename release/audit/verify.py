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
from release.audit import old_copies
from release.checks import file_list, formats, listing, page, registry, tool_files
from release.checks.check import Check
from release.checks.check_runner import CheckRunner, run_check
from release.checks.listing import Checksums, Contents, kind_of
from release.checks.verdict import CheckResult, Problems, Verdict, answer
from release.checksums import compare
from release.hash_cache import Digests
from release.layout import ALL_SUMS, PUBLIC_KEY, RETRACTED, SIGNATURE, SITE, SUMS
from release.signing import ANYONE, Trust, TrustPolicy
from release.tree import scan

__all__ = ["CheckResult", "Verdict", "kind_of", "verify"]

FORMATS_HOLD = "no pickle, no program, and no code beside weights or data"


def verify(
    subject: str | Path,
    deep: bool = False,
    progress: Callable[[str], None] = lambda text: None,
    trust: Trust = ANYONE,
    retracted: str | None = None,
    ask_hub: bool = False,
) -> Verdict:
    """Checks a folder, or `namespace/name[@revision]`, which is first downloaded to a temporary folder.

    retracted: a repository with a tombstone, by folder or name, to recognize an old copy by. ask_hub: without it, to
    ask the Hub for that of the release, if HF_ENDPOINT is set. Raises AtomError if nothing of that name can be checked;
    problems of the subject are in the verdict.
    """
    policy = trust.policy()  # report errors of the caller before reading anything
    path = Path(subject)
    if path.exists():
        if not path.is_dir():
            raise AtomError(f"{printable(str(path))} is a file; give the folder of a release or of a pulled repository")
        verdict = _verify_folder(path, str(subject), deep, progress, policy)
        return old_copies.recognize(verdict, path, policy, retracted, ask_hub, _verify_folder)
    if str(subject).split("@")[0].count("/") != 1 or str(subject).startswith((".", "/")):
        name = printable(str(subject))
        raise AtomError(f"there is no folder {name}; a repository on the Hub is written namespace/name[@revision]")
    from release.pull import pull_named

    with scratch.folder() as folder:
        progress(f"downloading {subject}")
        try:
            pulled = pull_named(str(subject), folder)
        except AtomError:
            if (gone := old_copies.missing_revision(str(subject), deep)) is not None:
                return gone
            raise
        verdict = _verify_folder(pulled, str(subject), deep, progress, policy)
        return old_copies.recognize(verdict, pulled, policy, retracted, ask_hub, _verify_folder)


def _verify_folder(
    folder: Path, subject: str, deep: bool, progress: Callable[[str], None], policy: TrustPolicy
) -> Verdict:
    if not listing.looks_like_release(folder):
        raise AtomError(
            f"{printable(subject)} is neither a release nor a repository of one: it has no {SUMS}; "
            "give the folder that `atom build` made, or a repository that `atom publish` made"
        )
    kind = kind_of(folder)
    verdict = Verdict(subject, kind, deep)
    if refusal := schema.refusal(folder):
        verdict.checks.append(answer("versions", [refusal]))
        return verdict
    progress(f"listing the files of {verdict.subject}")
    sums = Checksums(folder)
    if sums.overflow:
        verdict.checks.append(answer("files", [sums.overflow]))
        return verdict
    listed_paths = sums.listed()
    tree = scan(folder, len(listed_paths))
    contents = Contents(folder, kind, sums, tree)
    verdict.checks.append(listing.check(contents))
    verdict.digest = sha256_file(folder / SUMS) if SUMS in tree.files else ""
    if tree.overflow:
        return verdict
    progress(f"hashing every file of {verdict.subject}")
    digests = Digests(folder, tree, listed_paths)
    del listed_paths
    verdict.checks += _byte_checks(contents, digests)
    runner = CheckRunner(folder, tree, deep)
    verdict.checks += runner.limits()
    if any(path.endswith(SIGNATURE) for path in tree.files):
        signing.load_libraries()
    signatures = runner.run("signatures", lambda: _check_signatures(contents, digests, policy))
    verdict.checks.append(signatures)
    verdict.signed, verdict.signer_is_known = signatures.ok is True, bool(policy.signer)
    archive = kind in ("release", "evidence")
    verdict.checks.append(
        runner.run("formats", lambda: answer("formats", formats.formats(folder, tree.files, archive), FORMATS_HOLD))
    )
    bytes_hold = verdict.ok
    verdict.checks.append(file_list.check(contents))
    if (folder / RETRACTED).exists():  # what is left need not agree any more with what was measured on the whole
        verdict.checks.append(runner.run("tombstone", lambda: old_copies.check_tombstone(folder, kind)))
        verdict.retracted = old_copies.sentence(folder) if verdict.ok else ""
        applicable = list(registry.verifiers(folder, kind, True))
        kept = [check for check in applicable if check.function is tool_files.tool_files and bytes_hold]
        verdict.checks += [runner.ask(check, kind, digests) for check in kept]
        if bytes_hold and (folder / SITE).exists():
            verdict.checks.append(runner.run("page", lambda: run_check("page", lambda: page.scripts(folder))))
        verdict.retracted = verdict.retracted if verdict.ok else ""
        left_out = [check for check in applicable if check not in kept]
        verdict.checks.append(_left_out("content", "since documents were taken back", left_out))
        return verdict
    if bytes_hold:
        verdict.checks += runner.check_tables()
    verifiers = list(registry.verifiers(folder, kind, deep))
    for number, check in enumerate(verifiers, 1):
        if runner.spent and not check.confined:  # files that were too slow for a check would take even longer here
            continue
        if not bytes_hold:
            reason = "not checked, because the bytes are not what was published"
            verdict.checks.append(CheckResult(check.name, None, reason))
            continue
        progress(f"check {number} of {len(verifiers)}: {check.name.replace('_', ' ')}")
        verdict.checks.append(runner.ask(check, kind, digests))
    if further := [check for check in registry.verifiers(folder, kind, True) if check.deep and not deep]:
        verdict.checks.append(_left_out("deep", "without --deep", further))
    return verdict


def _left_out(name: str, when: str, checks: Iterable[Check]) -> CheckResult:
    """The result that stands for checks that do not run."""
    return CheckResult(name, None, f"not checked {when}: {', '.join(check.name for check in checks)}")


def _byte_checks(contents: Contents, digests: Digests) -> Iterator[CheckResult]:
    """One check for each checksum file: all listed files exist unchanged, and no others exist."""
    if contents.kind != "release":
        yield _check_sums(contents, SUMS, "", [p for p in contents.present() if p != SUMS], digests)
        if contents.kind == "evidence":
            yield _check_agreement(contents.sums)
        return
    if contents.missing:
        yield answer("release_complete", contents.missing)
        return
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
