"""Compiles the PyTorch part of Transformer Engine without nvcc or a GPU, into the site-packages of this Python.

    python tests/te/build_extension.py transformer_engine_torch-2.20.2.tar.gz

The package index has no wheel of it. Its sources are C++ around the library that the wheel transformer-engine-cu13
brings; only headers and libraries of CUDA are needed, which are packages too. One translation unit without optimization
takes a minute and 1 GB; the kernels are in the library and are not compiled here.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from pathlib import Path

NAME = "transformer_engine_torch"
HEADERS = ("nvidia/cudnn", "nvidia/cusparselt", "nvidia/cu13", "nvidia/nccl")
TORCH_LIBRARIES = ("c10", "torch", "torch_cpu", "torch_python", "c10_cuda", "torch_cuda")
FLAGS = ("-O0", "-g0", "-w", "-fPIC", "-fvisibility=hidden", "-std=c++20", "-DTORCH_API_INCLUDE_EXTENSION_H")


def build(archive: Path, site: Path) -> Path:
    """The compiled module. Raises CalledProcessError if the compiler fails."""
    module = site / f"{NAME}{sysconfig.get_config_var('EXT_SUFFIX')}"
    with tempfile.TemporaryDirectory() as folder:
        with tarfile.open(archive) as file:
            file.extractall(folder, filter="data")
        (source,) = (path for path in Path(folder).iterdir() if path.is_dir())
        # the module's definition comes last: it names what all others define
        sources = sorted(source.rglob("csrc/**/*.cpp"), key=lambda path: (path.name == "pybind.cpp", path))
        unit = source / "all.cpp"
        unit.write_text("".join(f'#include "{path}"\n' for path in sources))
        common = source / "common_headers"
        include = [site / place / "include" for place in HEADERS] + [site / "nvidia/cu13/include/cccl"]
        include += [common, common / "common", common / "common/include", source / "csrc"]
        include += [site / "torch/include", site / "torch/include/torch/csrc/api/include"]
        include += [Path(sysconfig.get_path("include"))]
        compiled = unit.with_suffix(".o")
        command = ["g++", *FLAGS, f"-DTORCH_EXTENSION_NAME={NAME}", *(f"-I{path}" for path in include)]
        subprocess.run([*command, "-c", unit, "-o", compiled], check=True)
        libraries = [f"-L{site}/torch/lib", *(f"-l{name}" for name in TORCH_LIBRARIES)]
        libraries += [f"-L{site}/nvidia/cu13/lib", "-l:libcudart.so.13"]
        subprocess.run(["g++", "-shared", compiled, "-o", module, *libraries], check=True)
    return module


if __name__ == "__main__":
    print(build(Path(sys.argv[1]), Path(sysconfig.get_path("purelib"))))
