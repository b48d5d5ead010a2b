"""Rules of the source tree that no linter knows: packages, names of modules, directions of imports, child processes,
where helpers of tests are, which tests the soak runs."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

from tests.fixtures import ROOT
from tests.soak.__main__ import PARTS

CODE = ("pipeline", "stages", "release")
PACKAGES = (*CODE, "data_recipes")
DISTRIBUTION = "atom-release"

AT_ANY_DEPTH = {
    "*.egg-info/", "__pycache__/", ".pytest_cache/", ".mypy_cache/", ".ruff_cache/", ".hypothesis/",
}  # fmt: skip
"""Patterns of .gitignore that are not anchored: what tools leave wherever they run."""

BEGIN_ANEW = ["pipeline/launch/clean_environment.py: [sys.executable, *sys.orig_argv[1:]]"]
"""A process that begins anew with the arguments that it had: -P or -m is among them if it was before."""

OF_A_TEST = re.compile(r"\b(?:from|import) tests\.(?:[\w.]+\.test_\w+|\w+ import (?:\([^)]*|.*)\btest_\w+)")
"""An import of a test module, or of a part of one; in the text of a child process, too."""

AT_LENGTH = re.compile(r'^@at_length\(\s*"([a-z-]+)"', re.MULTILINE)
"""The part of the soak that a test is marked for."""

SKIPPED_SANDBOX = re.compile(r"\bmark\.skipif\(\s*(?:not )?(?:sandbox\b|missing\()")
"""A mark that skips a test where no sandbox works."""


@cache
def modules() -> dict[str, Path]:
    """Our modules and packages, by their dotted names."""
    files = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py"))]
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imported(file: Path) -> Iterator[str]:
    """Our modules that a file imports, anywhere in it: in functions, and for type checkers only, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules())
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{file}: write imports with the whole name of the module"
            for name in (f"{node.module}.{alias.name}" for alias in node.names):
                yield from (each for each in (name if name in modules() else node.module,) if each in modules())


@cache
def imports() -> dict[str, set[str]]:
    return {name: set(imported(file)) - {name} for name, file in modules().items()}


def circles(graph: dict[str, set[str]]) -> list[set[str]]:
    """The sets of nodes that reach one another."""

    def reached(start: str) -> set[str]:
        nodes, todo = set[str](), [start]
        while todo:
            for target in graph[todo.pop()] - nodes:
                nodes.add(target)
                todo.append(target)
        return nodes

    reach = {name: reached(name) for name in graph}
    groups = {
        frozenset(other for other in reach[name] if name in reach[other]) for name in graph if name in reach[name]
    }
    return sorted((set(group) for group in groups), key=sorted)


def children(tree: ast.AST) -> Iterator[ast.List]:
    """The command lines that begin with sys.executable."""
    for node in ast.walk(tree):
        if isinstance(node, ast.List) and node.elts and ast.unparse(node.elts[0]) == "sys.executable":
            yield node


def test_git_takes_every_module() -> None:
    """A pattern of .gitignore can hide a whole package: the tests pass on this machine, and a clone lacks it."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", *PACKAGES]
    files = set(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines())
    hidden = {str(file.relative_to(ROOT)) for file in modules().values()} - files
    assert hidden == set(), f".gitignore hides {min(hidden)}; anchor its pattern"


def test_every_folder_of_modules_is_a_package() -> None:
    """Without __init__.py, setuptools leaves a folder out of the wheel."""
    folders = {file.parent for file in modules().values()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []


def test_patterns_of_gitignore_are_anchored() -> None:
    patterns = [line for line in (ROOT / ".gitignore").read_text().splitlines() if line and not line.startswith("#")]
    loose = [pattern for pattern in patterns if not pattern.startswith("/") and pattern not in AT_ANY_DEPTH]
    assert loose == [], f".gitignore: {loose} match at any depth, and may hide a package; begin them with /"


def test_no_advice_installs_this_package_from_an_index() -> None:
    """None has it: `pipeline.core.errors.installing` says where it is."""
    folders = ("pipeline", "stages", "release", "docs")
    files = [
        path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".md", ".jinja")
    ]
    assert [path for path in files if re.search(r"install '?atom-release", path.read_text())] == []


def test_no_module_has_the_name_of_another_library() -> None:
    """A script in the same folder, or a path that holds it, would import ours in the place of theirs."""
    installed = {name for name, owners in packages_distributions().items() if set(owners) != {DISTRIBUTION}}
    foreign = sys.stdlib_module_names | installed
    names = {name: name.rsplit(".", 1)[1] for name in modules() if "." in name and name.startswith(CODE)}
    assert [name for name, last in names.items() if last in foreign and last != "__main__"] == []


def test_children_do_not_import_from_the_folder_they_start_in() -> None:
    """`-P` keeps the script's folder off sys.path; `-m` names a module. Without either, a file beside the script, or in
    the folder of whoever starts the command, is imported in the place of a library."""
    unguarded = []
    for folder in (*PACKAGES, "bench", "docs"):
        for file in sorted((ROOT / folder).rglob("*.py")):
            for command in children(ast.parse(file.read_text(encoding="utf-8"))):
                arguments = {element.value for element in command.elts if isinstance(element, ast.Constant)}
                if not {"-P", "-m"} & arguments:
                    unguarded.append(f"{file.relative_to(ROOT)}: {ast.unparse(command)}")
    assert unguarded == BEGIN_ANEW


def test_no_test_module_is_imported() -> None:
    """What two of them need is in tests/fixtures/<thing>_fixtures.py."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    imports_of_tests = {str(file.relative_to(ROOT)): OF_A_TEST.findall(file.read_text()) for file in files}
    assert {name: texts for name, texts in imports_of_tests.items() if texts} == {}


def test_the_soak_runs_every_test_at_length() -> None:
    """A part of the soak names the files of its tests, and a file that it does not name would never run."""
    left_out = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        path = file.relative_to(ROOT).as_posix()
        for part in sorted(set(AT_LENGTH.findall(file.read_text()))):
            if part not in PARTS or path not in " ".join(PARTS[part].steps()):
                left_out.append(f"{path}: {part}")
    assert left_out == []


def test_no_test_is_skipped_for_want_of_a_sandbox() -> None:
    """Tests of the sandbox fail where none works; see NEEDS_BUBBLEWRAP of tests/fixtures/sandbox_fixtures.py."""
    files = sorted((ROOT / "tests").rglob("*.py"))
    assert [str(file.relative_to(ROOT)) for file in files if SKIPPED_SANDBOX.search(file.read_text())] == []
    for text in ("skipif(sandbox.missing())", "skipif(\n    missing() is not None", "skipif(not sandbox.usable()"):
        assert SKIPPED_SANDBOX.search(f"pytest.mark.{text}")


def test_only_the_ranks_of_one_job_send_each_other_pickles() -> None:
    """Between jobs, and between a run and its servers, nothing is unpickled: bytes of a stranger could be."""
    found = set()
    for name, file in modules().items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            imported_names = {alias.name for alias in node.names} if isinstance(node, ast.Import) else set()
            is_call = isinstance(node, ast.Attribute) and (
                node.attr.endswith(("_object", "_object_list")) or ast.unparse(node) == "torch.load"
            )
            if is_call or imported_names & {"pickle", "cloudpickle", "dill", "marshal", "shelve"}:
                found.add(name)
    assert found == {"stages.train.parallel"}


def test_imports_run_one_way() -> None:
    """release → stages → pipeline; nothing but the command line imports the command line, and nothing but commands what
    is there for them."""
    for name, targets in imports().items():
        tops = {target.split(".")[0] for target in targets}
        if name.startswith("stages"):
            assert "release" not in tops, f"{name} imports release"
        if name.startswith("pipeline"):
            assert not tops & {"stages", "release"}, f"{name} imports {sorted(tops)}"
        if not name.startswith("pipeline.cli"):
            assert [target for target in targets if target.startswith("pipeline.cli")] == [], name
        if not name.startswith(("pipeline.cli", "pipeline.operations", "stages.commands", "release.commands")):
            assert [target for target in targets if target.startswith("pipeline.operations")] == [], name


ORDER = ("core", "run_secret", "hub", "graph", "launch", "tracking", "operations", "cli")
"""The packages of `pipeline`: each may import those before it."""


def test_packages_of_the_pipeline_import_one_way() -> None:
    upwards = []
    for name, targets in imports().items():
        for target in targets:
            if name.startswith("pipeline.") and target.count(".") > 1:
                package, other = name.split(".")[1], target.split(".")[1]
                upwards += [f"{name} imports {target}"] if ORDER.index(other) > ORDER.index(package) else []
    assert upwards == []


def test_no_import_circles() -> None:
    assert circles(imports()) == []


def test_a_circle_is_found() -> None:
    graph = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set[str](), "e": {"a"}}
    assert circles(graph) == [{"b", "c"}]
