"""`atom build`: from a run's artifacts to a release folder that has passed its gates.

No clock, host or path enters it except those in the statements and metrics, so a second build from the same run has the
same bytes. The folder is written beside its place and renamed after every gate has passed.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from release import scratch
from release.assembly.assemble import BuildInput, assemble, require_nodes
from release.cards import plots
from release.checks import registry
from release.layout import ALL_SUMS, RETRACTED, SIGNATURE, SITE, SUMS
from release.opened_release import Release
from release.repositories import files_below, files_of, repositories, write_sums
from release.web_page import page as web_page
from stages.evaluation.gates import OUTCOMES

__all__ = ["BuildInput", "build", "rewrite_page", "write_checksums"]


def build(source: BuildInput, home: Path, progress: Callable[[str], None] = lambda text: None) -> Path:
    """Writes `<home>/releases/<name>-<version>/` and returns it; an earlier one of that name is replaced.

    Raises AtomError if a part is missing, CheckFailed with the first failed gate; then the refused folder is kept as
    `<name>-<version>.refused` for inspection, and the earlier release is unchanged.
    """
    # Fail before hours of copying and loading, and not after them.
    plots.require()
    require_nodes(source.artifacts)

    target = home / "releases" / f"{source.name}-{source.version}"
    # Beside the target and so on its file system, which makes the move to its place a single step.
    draft = target.with_name(f".{target.name}.{os.getpid()}")
    refused = target.with_name(f"{target.name}.refused")
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    try:
        progress("copying artifacts, code and statements")
        context = assemble(draft, source, progress)
        progress("checking the gates")
        results = registry.run_gates(context)
        registry.write_gates(context.release, results)
        failed = [gate for gate in results if gate.ok is False]
        # The page shows the results of the gates, so it comes after them; a refused release needs none.
        if not failed:
            progress("writing the page")
            web_page.write(context.release, draft / SITE)
        write_checksums(draft)
        for gate in results:
            progress(f"gate {gate.name}: {OUTCOMES[gate.ok]}, {gate.detail}")

        shutil.rmtree(refused, ignore_errors=True)
        # Kept for inspection; an earlier release stays in its place.
        if failed:
            os.rename(draft, refused)
            remainder = f" (and {len(failed) - 1} more)" if len(failed) > 1 else ""
            raise CheckFailed(
                f"release {target.name} is refused by the gate {failed[0].name}: {failed[0].detail}{remainder}"
            )
        _replace(draft, target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def write_checksums(folder: Path) -> None:
    """Writes the checksum files of a release.

    Those of the repositories in folders come first, then the one over the whole release, which lists them, and last the
    one of the root's repository, which lists that one.
    """
    repos = repositories(folder)
    for repository in repos:
        if repository.folder:
            write_sums(folder / repository.folder / SUMS, folder / repository.folder, files_of(folder, repository))
    write_sums(folder / ALL_SUMS, folder, [path for path in files_below(folder) if path not in (SUMS, ALL_SUMS)])
    root_repository = next(repository for repository in repos if repository.folder == "")
    write_sums(folder / SUMS, folder, files_of(folder, root_repository))


def rewrite_page(release: Path, progress: Callable[[str], None] = lambda text: None) -> bool:
    """Makes the page of a release folder again, with the checksums that cover it. Returns True if the page changed.

    Raises:
        AtomError: If the release is signed and the page would change, or if documents were taken back from it.
        CheckFailed: If a file of it is damaged.
    """
    if (release / RETRACTED).exists():
        raise AtomError(
            f"{release} lacks documents that were taken back, so that its figures and files disagree; it has no page"
        )
    with scratch.folder() as folder:
        progress("reading the release")
        try:
            web_page.write(Release(release), folder / SITE)
        except (ValueError, KeyError, TypeError) as error:  # of a damaged file
            raise CheckFailed(
                f"{release} cannot be read ({type(error).__name__}); `atom verify {release}` names the damaged files"
            ) from error
        if not any(web_page.differences(release / SITE, folder / SITE)) and (release / SUMS).exists():
            return False

        if (release / SIGNATURE).exists():
            raise AtomError(
                f"{release} is signed, and another page would break the signature of its root; remove "
                f"{release / SIGNATURE}, run this again, then `atom sign`"
            )
        (release / SUMS).unlink(missing_ok=True)  # a call that is cut off leaves none, and the next one completes it
        shutil.rmtree(release / SITE, ignore_errors=True)
        shutil.copytree(folder / SITE, release / SITE)
    write_checksums(release)
    return True


def _replace(draft: Path, target: Path) -> None:
    """Moves the draft to the place of the target; an earlier release is removed only after the new one is complete."""
    previous = target.with_name(f".{target.name}.old.{os.getpid()}")
    try:
        if target.exists():
            os.rename(target, previous)
        os.rename(draft, target)
    except OSError as error:
        # The new release did not get its place, so the earlier one gets it back.
        if previous.exists() and not target.exists():
            os.rename(previous, target)
        raise AtomError(f"release {target} cannot be put in place: {error}") from None
    shutil.rmtree(previous, ignore_errors=True)
