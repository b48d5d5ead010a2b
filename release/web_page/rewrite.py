"""`atom site`: makes the page of a release folder again, with the checksums that cover it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from pipeline.core.errors import AtomError, CheckFailed
from release import scratch
from release.assembly.build_release import write_checksums
from release.layout import RETRACTED, SIGNATURE, SITE, SUMS
from release.web_page import site_files


def rewrite(release: Path, progress: Callable[[str], None] = lambda text: None) -> bool:
    """Returns whether the page changed.

    Raises AtomError if the release is signed and the page would change, and if documents were taken back from it;
    CheckFailed if a file of it is damaged.
    """
    if (release / RETRACTED).exists():
        raise AtomError(
            f"{release} lacks documents that were taken back, so that its figures and files disagree; it has no page"
        )
    with scratch.folder() as folder:
        progress("reading the release")
        try:
            site_files.write(release, folder / SITE)
        except (ValueError, KeyError, TypeError) as error:  # of a damaged file
            raise CheckFailed(
                f"{release} cannot be read ({type(error).__name__}); `atom verify {release}` names the damaged files"
            ) from error
        if not any(site_files.differences(release / SITE, folder / SITE)) and (release / SUMS).exists():
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
