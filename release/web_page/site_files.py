"""Writes the page of a release, `site/index.html`, and compares a published one with what the release gives.

The page follows from the other files of the release, byte for byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from release import scratch
from release.layout import PAGE, SITE
from release.opened_release import Release
from release.web_page import page


def write(release: Release, out: Path) -> None:
    """Writes the folder `site` of a release; `out` may exist."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "index.html").write_text(page.render(page.read_facts(release)), encoding="utf-8")


def problems(release: Release) -> list[str]:
    """Returns the files of the published page that are not what the release gives."""
    with scratch.folder() as folder:
        write(release, folder / SITE)
        return list(differences(release.root / SITE, folder / SITE))


def foreign_scripts(release: Release) -> list[str]:
    """Returns a sentence about a page that could run something: no page of this atom has a script."""
    if page.runs_nothing((release.root / PAGE).read_text("utf-8", "replace")):
        return []
    return [f"{PAGE} has a script, or another policy about scripts than the page of this atom"]


def differences(published: Path, expected: Path) -> Iterator[str]:
    """Yields a sentence about each file below two folders that differs."""
    found = [
        {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
        for folder in (published, expected)
    ]
    for path in sorted(found[0].keys() | found[1].keys()):
        if path not in found[0]:
            yield f"{SITE}/{path} is missing"
        elif path not in found[1]:
            yield f"{SITE}/{path} is no part of the page"
        elif found[0][path].read_bytes() != found[1][path].read_bytes():
            yield f"{SITE}/{path} is not what the release gives"
