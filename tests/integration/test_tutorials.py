"""The tutorials, typed from beginning to end: each block of each page, in one folder, with the whole run of atom-smoke in
the place of its first minutes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.fixtures import ROOT, page_fixtures
from tests.fixtures.run_fixtures import SOAK, at_length

AT_LENGTH = "run: at length"
NOTES = (AT_LENGTH,) if SOAK else ()


@pytest.fixture(scope="module")
def place(smoke_home: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    folder = tmp_path_factory.mktemp("reader")
    environment = page_fixtures.checkout(folder)
    shutil.copytree(smoke_home, folder / "runs")
    page_fixtures.run(page_fixtures.TUTORIALS / "first-release.md", folder, environment)
    return folder, environment


def test_the_first_release_is_there(place: tuple[Path, dict[str, str]]) -> None:
    """The fixture has run the first tutorial."""
    assert (place[0] / "runs/releases/atom-smoke-0.1.0/evidence/SHA256SUMS").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "audit",
        pytest.param("own-corpus", marks=at_length("release", 15)),
        pytest.param("fine-tune", marks=at_length("release", 60)),
        pytest.param("adapter", marks=at_length("release", 150)),
        "cluster",
    ],
)
def test_a_tutorial_runs_to_its_end(place: tuple[Path, dict[str, str]], name: str) -> None:
    page_fixtures.run(page_fixtures.TUTORIALS / f"{name}.md", *place, NOTES)


def test_the_notebook_runs_to_its_end(place: tuple[Path, dict[str, str]]) -> None:
    notebook = json.loads((page_fixtures.TUTORIALS / "audit.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and all(cell["outputs"] == [] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    process = subprocess.run(
        ["python", "-"], input=code, cwd=place[0], env=place[1], capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "verified" in process.stdout and "every root is that of the table" in process.stdout


@at_length("release", 300)
def test_the_first_tutorial_needs_nothing_before(tmp_path: Path) -> None:
    page_fixtures.run(page_fixtures.TUTORIALS / "first-release.md", tmp_path, page_fixtures.checkout(tmp_path))


def test_the_page_of_metrics_has_every_curve_of_a_run(smoke_home: Path) -> None:
    page = (ROOT / "docs/metrics.md").read_text(encoding="utf-8")
    names = {name for row in re.findall(r"^\| (`.*?) \|", page, re.MULTILINE) for name in re.findall(r"`([^`]+)`", row)}
    patterns = [re.compile(re.sub(r"<\w+>|…", r"\\w+", name)) for name in names if name[0] != "<"]
    curves: set[str] = set()
    for path in smoke_home.glob("logs/*/*/metrics.jsonl"):
        curves |= {name for line in path.read_text().splitlines() for name in json.loads(line)}
    assert len(curves) > 30
    missing = {name for name in curves - {"time", "step"} if not any(p.fullmatch(name) for p in patterns)}
    assert not missing


def test_every_block_is_run_or_says_who_runs_it() -> None:
    for page in sorted(page_fixtures.TUTORIALS.glob("*.md")):
        for block in page_fixtures.blocks(page):
            assert block.language in page_fixtures.LANGUAGES and (block.language != "yaml" or block.file), block
            assert block.note is None or block.note.startswith(("run: ", "not run: ")), block


def test_another_output_and_a_failing_block_are_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```bash\necho one; echo two\n```\n\n```\none\nt…o\n```\n")
    (tmp_path / "a").mkdir()
    page_fixtures.run(page, tmp_path / "a", dict(os.environ))
    page.write_text("```bash\necho one; echo two\n```\n\n```\ntwo\none\n```\n")
    (tmp_path / "b").mkdir()
    with pytest.raises(AssertionError, match=r"page.md:5: 'one' is not printed"):
        page_fixtures.run(page, tmp_path / "b", dict(os.environ))
    page.write_text("```bash\ntrue\n```\n\n```bash\necho why; false\n```\n")
    (tmp_path / "c").mkdir()
    with pytest.raises(AssertionError, match=r"page.md:5\nwhy"):
        page_fixtures.run(page, tmp_path / "c", dict(os.environ))
