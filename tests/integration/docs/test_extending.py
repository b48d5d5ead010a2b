"""The examples of docs/extending.md are complete: added to a copy of the source tree, each passes its test, and without
its line in the registry a test of the tree names what is missing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import at_length

PAGE = ROOT / "docs/extending.md"
FILE = re.compile(r"^(?:[^\n]*The test, )?`([\w./-]+)`:\n\n```(?:python|yaml)\n(.*?)```\n", re.DOTALL | re.MULTILINE)
LINE = re.compile(r"The\s+lines?\s+in\s+`(\w+)`\s+of\s+`([\w./]+)`[^:]*:\n\n((?:```python\n.*?```\n\n?)+)", re.DOTALL)
BLOCK = re.compile(r"```python\n(.*?)```", re.DOTALL)
FOLDERS = ("pipeline", "stages", "release", "data_recipes", "bench", "docs", "tests")
REGISTRIES = (
    "tests/unit/test_data_registries.py", "tests/unit/test_rl_registries.py", "tests/unit/test_architectures.py",
    "tests/unit/test_release_registry.py", "tests/unit/test_stage_registry.py",
)  # fmt: skip
"""The tests that compare files with registries."""


@dataclass
class Example:
    """A section of the page. files: {path: content}. lines: (name of the registry, its file, what is added)."""

    title: str
    files: dict[str, str] = field(default_factory=dict)
    lines: list[tuple[str, str, str]] = field(default_factory=list)

    @property
    def tests(self) -> list[str]:
        return [path for path in self.files if path.startswith("tests/")]

    def write(self, tree: Path) -> None:
        for path, content in self.files.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(content)

    def register(self, tree: Path) -> None:
        for name, path, blocks in self.lines:
            text = (tree / path).read_text()
            for block in BLOCK.findall(blocks):
                if block.startswith(("from ", "import ")):
                    text = re.sub(r"\n(?=from (?:pipeline|stages|release)\b)", f"\n{block}", text, count=1)
                    continue
                text, count = re.subn(
                    rf"(^{name}\b[^\n]*[{{(\[]\n)", lambda m, b=block: m[1] + b, text, count=1, flags=re.M
                )
                assert count, f"{path} has no {name}"
            (tree / path).write_text(text)


def examples() -> list[Example]:
    sections = []
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)[1:]:
        title, _, text = section.partition("\n")
        sections.append(Example(title, dict(FILE.findall(text)), LINE.findall(text)))
    return [example for example in sections if example.files]


def copy_tree(folder: Path) -> Path:
    ignored = shutil.ignore_patterns("__pycache__")
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "LICENSE"):
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def run_tests(tree: Path, paths: list[str]) -> tuple[dict[str, str], str]:
    """{file of tests: messages of its failures} of each file that ran in a tree, and the output."""
    report = tree / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
    environment = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    results: dict[str, str] = {}
    for case in ElementTree.parse(report).iter("testcase") if report.exists() else ():
        name = case.get("classname", "").replace(".", "/") + ".py"
        results.setdefault(name, "")
        results[name] += "".join(
            (bad.get("message") or "") + (bad.text or "") for bad in case if bad.tag in ("failure", "error")
        )
    return results, process.stdout + process.stderr


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], str]:
    """What the tests of all examples and of the registries say in a tree with all examples."""
    tree = copy_tree(tmp_path_factory.mktemp("extended"))
    for example in examples():
        example.write(tree)
        example.register(tree)
    return run_tests(tree, [path for example in examples() for path in example.tests] + [*REGISTRIES])


@pytest.mark.parametrize("example", examples(), ids=lambda example: example.title)
def test_an_example_passes_its_test(example: Example, extended: tuple[dict[str, str], str]) -> None:
    results, output = extended
    assert example.tests, f"{example.title} has no test"
    for path in example.tests:
        assert results.get(path) == "", f"{path}: {results.get(path)}\n{output[-3000:]}"


def test_the_registries_accept_all_examples(extended: tuple[dict[str, str], str]) -> None:
    results, output = extended
    assert {path: results.get(path) for path in REGISTRIES} == dict.fromkeys(REGISTRIES, ""), output[-3000:]


@at_length("release", 15)
def test_a_file_without_its_line_is_named(tmp_path: Path) -> None:
    """In a tree with the files of all examples and no line of a registry."""
    tree = copy_tree(tmp_path)
    for example in examples():
        example.write(tree)
    messages = "".join(run_tests(tree, [*REGISTRIES])[0].values())
    for example in examples():
        for path in example.files:
            place = Path(path)
            if example.lines and place.parts[0] != "tests":
                name, registry, _ = example.lines[0]
                lines = [line for line in messages.splitlines() if re.search(rf"\b{place.stem}\b", line)]
                assert any(name in line or registry in line for line in lines), f"{path} is not named"


def test_examples_and_their_registries_pass_the_linter(tmp_path: Path) -> None:
    """By the project's own rules. Imports are not sorted here, because the page shows them without their neighbors."""
    tree = copy_tree(tmp_path / "tree")
    for example in examples():
        example.write(tree)
        example.register(tree)
    command = [sys.executable, "-m", "ruff", "check", "--no-cache", "--ignore", "I001", "."]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
    files = [path for example in examples() for path in example.files if path.endswith(".py")]
    command = [sys.executable, "-m", "ruff", "format", "--no-cache", "--check", "--diff", *files]
    process = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stdout
