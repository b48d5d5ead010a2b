"""The wheel works outside the checkout: its packages, recipes and templates are all there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import at_length


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    process = subprocess.run(build, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_has_every_file_of_the_packages(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names if not name.startswith("atom_release-")}
    assert tops == {"pipeline", "stages", "release", "data_recipes"}
    tracked = subprocess.run(["git", "-C", str(ROOT), "ls-files", *sorted(tops)], capture_output=True, text=True).stdout
    assert set(tracked.split()) <= set(names), "every file of the packages is in the wheel"
    folders = {file.parent.relative_to(ROOT) for top in tops for file in (ROOT / top).rglob("*.py")}
    assert {f"{folder}/__init__.py" for folder in folders} <= set(names), "every folder of modules is in the wheel"


@at_length("release", 40)
def test_the_wheel_plans_and_runs_without_the_checkout(wheel: Path, tmp_path: Path) -> None:
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(tmp_path / "site"),
        str(wheel),
    ]
    subprocess.run(install, check=True)
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "ATOM_HOME": str(tmp_path / "home")}

    def atom(*arguments: str) -> str:
        process = subprocess.run(
            [sys.executable, "-P", "-m", "pipeline.cli", *arguments],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stdout + process.stderr
        return process.stdout

    where = "import pipeline, stages, release, data_recipes as d; print(pipeline.__file__, stages.__file__, d.__file__)"
    output = subprocess.run(
        [sys.executable, "-P", "-c", where], cwd=tmp_path, env=env, capture_output=True, text=True
    ).stdout
    assert output.count(str(tmp_path / "site")) == 3, output
    assert {s["state"] for s in json.loads(atom("plan", "atom-tiny", "--json"))["stages"]} == {"to run"}
    assert "all of 12 stages sealed" in atom("run", "atom-smoke", "--until", "tokenizer")
