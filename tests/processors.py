"""The numeric tests as other processors compute: the kernels of older x86-64 processors can be chosen on this one.

    python -m tests.processors [CELL ...] [-- ARGUMENT OF PYTEST ...]

By default: every cell, the tests marked `numeric`, and a third of every tolerance. Prints a line a cell; exits with 1 if
one failed. Which variable steers what was found by comparing digests of products (docs/lab-log.md).
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
OLD = {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2"}
CELLS: dict[str, dict[str, str]] = {
    "native": {},
    "old": OLD,  # all three libraries at their oldest
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "aten-default": {"ATEN_CPU_CAPABILITY": "default"},
    "aten-avx2": {"ATEN_CPU_CAPABILITY": "avx2"},
    "onednn-avx2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "onednn-avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"},
    "mkl-sse4": {"MKL_ENABLE_INSTRUCTIONS": "SSE4_2"},
    "mkl-avx2": {"MKL_ENABLE_INSTRUCTIONS": "AVX2"},
    "mkl-avx512": {"MKL_ENABLE_INSTRUCTIONS": "AVX512"},
    "mkl-compatible": {"MKL_CBWR": "COMPATIBLE"},
    "two-threads": {"OMP_NUM_THREADS": "2"},
}
STEERING = {name for cell in CELLS.values() for name in cell}


def main(arguments: list[str]) -> int:
    split = arguments.index("--") if "--" in arguments else len(arguments)
    names, pytest_arguments = arguments[:split] or list(CELLS), arguments[split + 1 :]
    if unknown := [name for name in names if name not in CELLS]:
        print(f"no cell {unknown[0]}; there are {', '.join(CELLS)}", file=sys.stderr)
        return 2
    failed = False
    for name in names:
        began = time.monotonic()
        command = [sys.executable, "-m", "pytest", *(pytest_arguments or ["-m", "numeric", "--margin", "3", "-n", "2"])]
        process = subprocess.run(command, cwd=ROOT, env={**os.environ, **CELLS[name]}, capture_output=True, text=True)
        lines = process.stdout.strip().splitlines() or [process.stderr.strip()]
        failed = failed or process.returncode != 0
        print(f"{name:<15} {time.monotonic() - began:6.0f} s  {lines[-1]}", flush=True)
        print("".join(f"    {line}\n" for line in lines if line.startswith(("FAILED", "ERROR"))), end="", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
