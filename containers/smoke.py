"""Whether an image works: one line for each check; exit code 1 if one fails.

    /opt/atom/venv/bin/python /opt/atom/source/containers/smoke.py [FOLDER]

FOLDER (default /opt/atom) is what containers/install has filled. The build of an image ends with this check; on a node
of the cluster it shows that the image works there, with its GPU if it has one. It needs no network.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

SOURCE = Path(__file__).resolve().parents[1]
EXTRAS = ("data", "harness", "hub", "report", "rl", "track", "train")
"""The parts of pyproject.toml that every image has."""
LISTING = "import importlib.metadata as m, json; print(json.dumps({d.name: d.version for d in m.distributions()}))"
WORKER = "stages/generation/vllm_worker"
IMPORTS = ("torch", "megatron.core", "transformers", "tokenizers", "datatrove", "mlflow", "lm_eval")


class CheckFailed(Exception):
    """Says what is wrong."""


def run(*command: str | Path, **environment: str) -> str:
    """The last line that a command prints. Raises CheckFailed with the end of its output if it fails."""
    process = subprocess.run(
        [str(part) for part in command], cwd=SOURCE, env={**os.environ, **environment}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False,
    )  # fmt: skip
    if process.returncode:
        raise CheckFailed(f"{' '.join(map(str, command))} ended with {process.returncode}: {process.stdout[-2000:]}")
    return (process.stdout.strip().splitlines() or [""])[-1]


def pins(lock: Path) -> dict[str, str]:
    """The versions of a lock file by name."""
    return dict(re.findall(r"^([A-Za-z0-9_.-]+)==([^ ;\\]+)", lock.read_text(), re.MULTILINE))


def check_versions(python: Path, lock: Path) -> str:
    """Every package of the lock is installed in its version; a local part such as +cpu may differ."""
    installed = {canonicalize_name(n): v for n, v in json.loads(run(python, "-c", LISTING)).items()}
    wrong = []
    for name, version in pins(lock).items():
        present = installed.get(canonicalize_name(name), "none")
        if present == "none" or not SpecifierSet(f"=={version}").contains(present, prereleases=True):
            wrong.append(f"{name} {present} instead of {version}")
    if wrong:
        raise CheckFailed("; ".join(wrong))
    return f"{len(pins(lock))} packages of {lock.name}"


def check_requirements(distribution: str = "atom-release", extras: tuple[str, ...] = EXTRAS) -> str:
    """Whatever a package asks for, and what that asks for in turn, is there in a version that fits.

    What PyTorch asks for is left to its base image.
    """
    wrong, seen, queue = [], set(), [(distribution, frozenset(extras))]
    while queue:
        name, wanted = queue.pop()
        if (name, wanted) in seen or name == "torch":
            continue
        seen.add((name, wanted))
        for text in metadata.requires(name) or ():
            requirement = Requirement(text)
            marker = requirement.marker
            if marker is not None and not any(marker.evaluate({"extra": extra}) for extra in wanted | {""}):
                continue
            try:
                version = metadata.version(requirement.name)
            except metadata.PackageNotFoundError:
                wrong.append(f"{name} needs {requirement.name}, which is missing")
                continue
            if not requirement.specifier.contains(version, prereleases=True):
                wrong.append(f"{name} needs {requirement.name}{requirement.specifier}, not {version}")
            queue.append((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    if wrong:
        raise CheckFailed("; ".join(dict.fromkeys(wrong)))
    return f"of {len({name for name, _ in seen})} packages"


def check_imports() -> str:
    """Transformer Engine counts where there is a GPU only: without one, nothing here imports it."""
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    gpu = run(sys.executable, "-c", code)
    modules = (*IMPORTS, "transformer_engine.pytorch") if gpu else IMPORTS
    run(sys.executable, "-c", "; ".join(f"import {module}" for module in modules))
    return f"{', '.join(modules)}; {gpu or 'no GPU'}"


def check_nccl(pythons: list[Path]) -> str:
    """All environments have loaded one release of NCCL, as their PyTorch finds it: else their ranks cannot connect."""
    code = (
        f"import sys, torch; sys.path.insert(0, {str(SOURCE / WORKER)!r}); import atom_group; "
        "print(atom_group.nccl_version(torch.device('cuda')))"
    )
    versions = {str(python): run(python, "-c", code) for python in pythons}
    if len(set(versions.values())) > 1:
        raise CheckFailed("; ".join(f"{python} has {version}" for python, version in versions.items()))
    return next(iter(versions.values()))


def check_training(atom: Path) -> str:
    """Trains the smallest recipe from its text, on the device that there is."""
    with tempfile.TemporaryDirectory() as home:
        environment = {"ATOM_HOME": home, "MLFLOW_TRACKING_URI": "none"}
        run(atom, "run", "atom-smoke", "--until", "pretrain", **environment)
        (events,) = Path(home).glob("logs/*/pretrain/events.jsonl")
        progress = [row for row in map(json.loads, events.read_text().splitlines()) if row["event"] == "progress"]
    return f"{progress[-1]['done']} of {progress[-1]['total']} steps of atom-smoke"


def report(checks: list[tuple[str, Callable[[], str]]]) -> int:
    """Prints a line for each check; the exit code."""
    failed = 0
    for name, check in checks:
        try:
            print(f"ok      {name}: {check()}", flush=True)
        except CheckFailed as error:
            failed += 1
            print(f"FAILED  {name}: {error}", flush=True)
    return 1 if failed else 0


def main() -> int:
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "/opt/atom")
    atom = folder / "venv/bin/atom"
    checks: list[tuple[str, Callable[[], str]]] = []
    for line in (folder / "locks").read_text().splitlines():
        environment, lock = line.split()
        python = folder / environment / "bin/python"
        checks.append((f"versions of {environment}", lambda p=python, name=lock: check_versions(p, SOURCE / name)))
    checks += [
        ("requirements", check_requirements),
        ("imports", check_imports),
        ("atom --version", lambda: run(atom, "--version")),
        ("atom plan", lambda: run(atom, "plan", "atom-tiny", MLFLOW_TRACKING_URI="none")),
        ("training", lambda: check_training(atom)),
    ]
    if (vllm := folder / "vllm/bin/vllm").exists():
        pythons = [folder / environment / "bin/python" for environment in ("venv", "vllm")]
        checks += [("vllm --version", lambda: run(vllm, "--version")), ("one NCCL", lambda: check_nccl(pythons))]
    return report(checks)


if __name__ == "__main__":
    sys.exit(main())
