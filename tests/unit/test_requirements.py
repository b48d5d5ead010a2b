"""The lock files pin what constraints.txt pins, each with hashes."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.fixtures import ROOT

sys.path.insert(0, str(ROOT / "requirements"))
import lock

LOCKS = sorted((ROOT / "requirements").glob("*.lock"))


def pins(text: str) -> dict[str, str]:
    """name → the one version that it pins on this Python."""
    lines = [re.split(r" --hash| \\| ;", line)[0] for line in text.splitlines() if re.match(r"[A-Za-z]", line)]
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


@pytest.mark.parametrize("path", LOCKS, ids=lambda p: p.name)
def test_each_entry_is_one_version_with_hashes(path: Path) -> None:
    entries = re.split(r"\n(?=[A-Za-z])", path.read_text())[1:]
    assert entries
    for entry in entries:
        assert re.match(r"[\w.-]+==[\w.+!]+ ", entry) and "--hash=sha256:" in entry, entry
        assert "+" not in entry or path.name == "torch-cpu.lock", entry


@pytest.mark.parametrize("python", ["311", "312", "313"])
def test_versions_are_those_of_the_constraints(python: str) -> None:
    locked = pins((ROOT / f"requirements/py{python}.lock").read_text())
    wanted = pins((ROOT / "constraints.txt").read_text())
    if python != "311":  # the pin of Megatron-core is for older Pythons
        del wanted["megatron-core"]
    assert {name: locked.get(name) for name in wanted} == wanted
    cpu = pins((ROOT / "requirements/torch-cpu.lock").read_text())
    assert cpu["torch"].removesuffix("+cpu") == locked["torch"]


@pytest.mark.parametrize("name", lock.SEPARATE)
def test_a_separate_environment_has_what_it_is_for(name: str) -> None:
    """In the versions of lock.py, with the torch of the other locks, without CUDA's libraries, which cuda.lock has."""
    locked = pins((ROOT / f"requirements/{name}.lock").read_text())
    wanted = [Requirement(text) for text in lock.SEPARATE[name][1:]]
    assert all(r.name in locked and r.specifier.contains(locked[r.name].removeprefix("==")) for r in wanted)
    assert locked.get("torch") in (None, pins((ROOT / "requirements/py311.lock").read_text())["torch"])
    assert not [package for package in locked if package.startswith((*lock.CUDA, *lock.UNUSED))]


def test_make_installs_nothing_by_itself() -> None:
    """requirements/install compares hashes; `make lock` alone asks for whatever is newest."""
    lines = [line.strip() for line in (ROOT / "Makefile").read_text().splitlines() if "pip" in line]
    assert lines and [line for line in lines if not line.startswith("build/lock/bin/python -m pip ")] == []


def test_all_environments_have_the_nccl_of_the_images_base() -> None:
    """NCCL connects equal releases only: the trainer's, in an image that of the base, and those of vLLM's servers."""
    locked = {path.name: pins(path.read_text()).get("nvidia-nccl-cu13") for path in LOCKS}
    wanted = pins((ROOT / "requirements/overrides.txt").read_text())["nvidia-nccl-cu13"]
    named = {name: version for name, version in locked.items() if version is not None}
    assert named == dict.fromkeys(("cuda.lock", "te.lock", "vllm.lock"), wanted)
    for path in ("docs/containers.md", "containers/Dockerfile", "containers/atom.def"):
        stated = re.findall(r"\bNCCL\s+(\d[\d.]*\d)", (ROOT / path).read_text())
        assert stated and {f"=={version}" for version in stated} == {wanted}, path


def test_the_kit_for_gpus_has_the_versions_of_the_other_locks() -> None:
    packed = pins((ROOT / "requirements/gpu.lock").read_text())
    assert packed.keys() == {canonicalize_name(n) for n in re.findall(r"^[a-z-]+$", (ROOT / "requirements/gpu.in").read_text(), re.M)}  # fmt: skip
    locked = pins((ROOT / "requirements/py313.lock").read_text())
    assert {name: locked.get(name) for name in packed} == packed
