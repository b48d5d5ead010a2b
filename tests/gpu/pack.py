"""Packs what the kit needs on a machine that has PyTorch for CUDA and transformers, but no network.

    make gpu-wheels
    python -m tests.gpu.pack FOLDER

Downloads the wheels of requirements/gpu.lock for Python 3.12 on x86-64 into the folder, and prints the command that
installs them there. No CUDA and no compiler is needed on either side. Exits with 2 if the wheels cannot be had or take
more than 64 MiB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.fixtures import ROOT

LOCK = Path("requirements/gpu.lock")
MOST_BYTES = 64 * 2**20
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 24, 17)] + ["manylinux2014_x86_64"]
"""pip takes each by its exact name."""


def download(folder: Path) -> None:
    """Replaces the wheels in the folder by those of the lock. Raises SystemExit with what pip says if it cannot."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--require-hashes", "--python-version", "3.12", "--implementation", "cp"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += ["--dest", str(folder), "--requirement", str(ROOT / LOCK)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode:
        lines = process.stderr.strip().splitlines() or ["it says nothing"]
        raise SystemExit(f"gpu-wheels: pip cannot download {LOCK}: {lines[-1]}")


def check_size(folder: Path, most: int = MOST_BYTES) -> str:
    """A sentence on the number and size of the wheels. Raises SystemExit if they take more bytes than `most`."""
    sizes = {wheel.name: wheel.stat().st_size for wheel in folder.glob("*.whl")}
    total, largest = sum(sizes.values()), max(sizes, key=sizes.__getitem__)
    if total > most:
        raise SystemExit(f"gpu-wheels: the wheels take {total / 2**20:.1f} MiB, more than {most / 2**20:g}; the largest is "
                         f"{largest}: remove what the machine has from requirements/gpu.in")  # fmt: skip
    return f"{len(sizes)} wheels, {total / 2**20:.1f} MiB"


def main() -> None:
    if len(sys.argv) != 2:
        raise SystemExit("gpu-wheels: name the folder for the wheels: python -m tests.gpu.pack FOLDER")
    folder = Path(sys.argv[1])
    download(folder)
    print(f"{check_size(folder)} in {folder}; on the machine, in this repository:")
    print(f"  python3 -m pip install --no-index --no-deps --find-links {folder} --require-hashes --requirement {LOCK}")
    print("  python3 -m tests.gpu")


if __name__ == "__main__":
    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            sys.exit(2)
        raise
