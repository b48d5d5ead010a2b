"""`requirements/install` on wheels that are not those of the lock files, in environments without the network."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.fixtures import ROOT

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
LOCK = f"py{PYTHON.replace('.', '')}"


@dataclass
class Checkout:
    """A folder with the script, and with lock files, wheels and an environment of its own.

    Attributes:
        root: The folder.
        wheels: The folder in which pip looks for packages, and nowhere else.
        packages: The environment's site-packages.
    """

    root: Path
    wheels: Path
    packages: Path

    def wheel(self, name: str, version: str, text: str) -> str:
        """Writes a wheel of one module that holds `text`. Returns its SHA-256."""
        info, path = f"{name}-{version}.dist-info", self.wheels / f"{name}-{version}-py3-none-any.whl"
        files = {
            f"{name}.py": text,
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        digests = {
            n: base64.urlsafe_b64encode(hashlib.sha256(t.encode()).digest()).decode().rstrip("=")
            for n, t in files.items()
        }
        record = "".join(f"{n},sha256={d},{len(files[n])}\n" for n, d in digests.items()) + f"{info}/RECORD,,\n"
        with zipfile.ZipFile(path, "w") as archive:
            for file, content in {**files, f"{info}/RECORD": record}.items():
                archive.writestr(file, content)
        return hashlib.sha256(path.read_bytes()).hexdigest()

    def lock(self, name: str, *lines: str) -> None:
        (self.root / f"requirements/{name}.lock").write_text("".join(f"{line}\n" for line in lines))

    def install(self, *name: str) -> tuple[int, str]:
        """Runs the script. Returns its exit code and what it prints."""
        environment = {
            **{n: v for n, v in os.environ.items() if not n.startswith("PIP_")},
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_CONFIG_FILE": os.devnull,
        }
        command = [self.root / "requirements/install", self.root / "venv/bin/python", *name]
        process = subprocess.run(command, env=environment, capture_output=True, text=True)
        return process.returncode, process.stdout + process.stderr

    def installed(self, name: str) -> str | None:
        """The text of a module of the environment; None if it is not there."""
        path = self.packages / f"{name}.py"
        return path.read_text() if path.exists() else None


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root, wheels = tmp_path / "checkout", tmp_path / "wheels"
    (root / "requirements").mkdir(parents=True)
    wheels.mkdir()
    shutil.copy(ROOT / "requirements/install", root / "requirements")
    venv.create(root / "venv", with_pip=False, symlinks=True)
    packages = root / f"venv/lib/python{PYTHON}/site-packages"
    spec = importlib.util.find_spec("pip")
    assert spec and spec.submodule_search_locations
    shutil.copytree(spec.submodule_search_locations[0], packages / "pip")
    created = Checkout(root, wheels, packages)
    created.lock("cuda")
    return created


def entry(name: str, digest: str) -> str:
    """A lock file's entry."""
    return f"{name} \\\n    --hash=sha256:{digest}"


def cpu_entry(digest: str) -> str:
    return f'torch==2.13.0+cpu ; python_version == "{PYTHON}" --hash=sha256:{digest}'


def test_a_cpu_build_with_the_right_hash_stands_for_the_locks_torch(checkout: Checkout) -> None:
    checkout.lock("torch-cpu", cpu_entry(checkout.wheel("torch", "2.13.0+cpu", "good = True")))
    checkout.lock(
        "small", entry("torch==2.13.0", "0" * 64), entry("other==1", checkout.wheel("other", "1", "good = 1"))
    )
    assert checkout.install("small") == (0, "")
    assert checkout.installed("torch") == "good = True" and checkout.installed("other") == "good = 1"
    code, text = checkout.install("small")
    assert (
        code == 0 and "2 packages are installed already; pip keeps those of the right version, without hashes" in text
    )


@pytest.mark.parametrize("name", [(), (LOCK,)], ids=["checkout", "named"])
def test_a_cpu_build_with_another_hash_is_not_installed(checkout: Checkout, name: tuple[str, ...]) -> None:
    good = checkout.wheel("torch", "2.13.0+cpu", "good = True")
    evil = checkout.wheel("torch", "2.13.0+cpu", "evil = True")
    checkout.lock("torch-cpu", cpu_entry(good))
    checkout.lock(LOCK, entry("torch==2.13.0", "0" * 64))
    code, text = checkout.install(*name)
    assert checkout.installed("torch") is None and code == 2
    assert "torch==2.13.0+cpu" in text and f"Expected sha256 {good}" in text and f"Got        {evil}" in text
    assert "pip refused packages of requirements/torch-cpu.lock for the reason above, and installed none" in text


@pytest.mark.parametrize("version", ["2.13.0", "2.13.0+cpu", "2.13.0+cu999"])
def test_a_torch_whose_hash_no_file_has_is_not_installed(checkout: Checkout, version: str) -> None:
    """torch-cpu.lock has no entry for this Python, as for most."""
    checkout.wheel("torch", version, "evil = True")
    checkout.lock("torch-cpu", 'torch==2.13.0+cpu ; python_version == "2.7" --hash=sha256:' + "0" * 64)
    checkout.lock(LOCK, entry("torch==2.13.0", "0" * 64))
    code, text = checkout.install()
    assert code == 2 and checkout.installed("torch") is None and "Expected sha256" in text


@pytest.mark.parametrize("name", ["setuptools", "other"])
def test_no_file_with_another_hash_is_installed_nor_any_beside_it(checkout: Checkout, name: str) -> None:
    """Neither a tool that builds others nor anything else."""
    good = checkout.wheel("sound", "1", "good = True")
    checkout.wheel(name, "1", "evil = True")
    checkout.lock("torch-cpu")
    checkout.lock("small", entry(f"{name}==1", "0" * 64), entry("sound==1", good))
    code, text = checkout.install("small")
    assert code == 2 and checkout.installed(name) is None and checkout.installed("sound") is None
    assert f"{name}==1" in text and "requirements/small.lock" in text


def test_a_source_is_built_by_no_tool_from_outside_the_lock(checkout: Checkout) -> None:
    """Here its tool is in pip's folder, and not in the lock file."""
    checkout.wheel("setuptools", "99", "evil = True")
    source = checkout.wheels / "sourced-1.tar.gz"
    folder = checkout.root / "sourced-1"
    folder.mkdir()
    (folder / "PKG-INFO").write_text("Metadata-Version: 2.1\nName: sourced\nVersion: 1\n")
    (folder / "pyproject.toml").write_text('[build-system]\nrequires = ["setuptools"]\nbuild-backend = "setuptools"\n')
    subprocess.run(["tar", "-czf", source, "-C", checkout.root, "sourced-1"], check=True)
    checkout.lock("torch-cpu")
    checkout.lock("small", entry("sourced==1", hashlib.sha256(source.read_bytes()).hexdigest()))
    code, text = checkout.install("small")
    assert code == 2 and checkout.installed("setuptools") is None
    assert "Cannot import 'setuptools'" in text or "No module named 'setuptools'" in text


def test_a_python_without_a_lock_file_is_told_so(checkout: Checkout) -> None:
    (checkout.root / "constraints.txt").touch()
    code, text = checkout.install()
    assert code != 0 and "this Python has no lock file; the versions of constraints.txt follow, without hashes" in text
