"""Write the lock files of this folder: exact versions and hashes, one file for each Python.

Command: `make lock`. It needs uv on the PATH and the Python package index.

`uv pip compile` resolves pyproject.toml's extra `test` for Linux within constraints.txt. The hashes are those that the
index states for every file of a version. Two things are added to what uv writes:

- The CUDA libraries, which torch from the index needs and a CPU build does not, go into cuda.lock.
- A CPU build of torch that pip finds in its own `find-links`, if any, gets an entry in torch-cpu.lock.

The environment of `make test-te` has versions of its own, from te.in, in te.lock and te-source.lock. What a machine for
the kit for GPUs lacks is in gpu.in, and in gpu.lock. The images of containers/ have image.lock, which leaves out what
their base brings, and vllm.lock for vLLM's own environment.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
PYTHONS = ("3.11", "3.13")
PLATFORM = "x86_64-manylinux_2_28"
CUDA = ("cuda-", "nvidia-", "triton")
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


def compile_entries(python: str, *what: str, stdin: str | None = None) -> list[str]:
    command = ["uv", "pip", "compile", "--quiet", "--no-header", "--no-annotate", "--generate-hashes", *what]
    command += ["--python-version", python, "--python-platform", PLATFORM]
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
    write_te()
    write_gpu()
    write_image()
    write_site()


if __name__ == "__main__":
    main()
