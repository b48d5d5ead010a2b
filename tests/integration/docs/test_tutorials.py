"""The tutorials, typed from beginning to end in one folder, which has a finished demo of atom-smoke."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from docs.examples import SMOKE, Place
from tests.fixtures import ROOT, page_fixtures
from tests.fixtures.page_fixtures import TUTORIALS
from tests.fixtures.run_fixtures import at_length


@pytest.fixture(scope="module")
def place(smoke_demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with page_fixtures.smoke_place(tmp_path_factory.mktemp("reader"), smoke_demo) as at:
        yield at


@pytest.mark.parametrize(
    "name",
    [
        "first-release",
        pytest.param("audit", marks=at_length("release", 25)),
        pytest.param("own-corpus", marks=at_length("release", 30)),
        pytest.param("fine-tune", marks=at_length("release", 60)),
        pytest.param("adapter", marks=at_length("release", 150)),
        "cluster",
    ],
)
def test_a_tutorial_runs_to_its_end(place: Place, name: str) -> None:
    page_fixtures.check(TUTORIALS / f"{name}.md", place)


def test_every_tutorial_is_run() -> None:
    (mark,) = test_a_tutorial_runs_to_its_end.pytestmark  # type: ignore[attr-defined]
    names = {getattr(name, "values", (name,))[0] for name in mark.args[1]}
    assert names == {page.stem for page in TUTORIALS.glob("*.md")}


def test_the_notebook_runs_to_its_end(place: Place) -> None:
    notebook = json.loads((TUTORIALS / "audit.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 5 and all(cell["outputs"] == [] for cell in cells)
    code = "\n".join("".join(cell["source"]) for cell in cells)
    process = subprocess.run(
        ["python", "-"],
        input=code,
        cwd=place.folder,
        env=place.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "verified" in process.stdout and "every root is that of the table" in process.stdout


@at_length("release", 300)
def test_the_first_tutorial_needs_nothing_before(tmp_path: Path) -> None:
    (tmp_path / "reader").mkdir()
    (tmp_path / "home").mkdir()
    with page_fixtures.examples.place(tmp_path / "reader", tmp_path / "home", SMOKE) as at:
        text = (TUTORIALS / "first-release.md").read_text("utf-8")
        page_fixtures.examples.run("first-release.md", text, at)


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
