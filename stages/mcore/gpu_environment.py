"""The environment variables of a process that uses a GPU. No torch here.

CUDA and PyTorch's allocator read theirs when CUDA starts, NCCL, cuBLAS and Transformer Engine at their first use; a
value that comes later has no effect, without a message. So each process has them from its start: the launchers export
them before Python starts (`Stage.environment`), and `require` refuses a process that was started without.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping

from pipeline.core.errors import AtomError
from stages.models.parallel_layout import Layout


def variables(layout: Layout | None = None) -> dict[str, str]:
    """The variables of CUDA, NCCL, cuBLAS and Transformer Engine for a layout; None: one GPU.

    A value that the cluster profile or the user has set takes precedence.
    """
    layout = layout or Layout()
    chosen = {
        # Steps differ in width and in the tokens of each expert; segments that grow do not fragment the memory.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        # One hardware queue keeps the order of kernels and collectives, on which the overlap of tensor- and
        # context-parallel communication relies before Blackwell; otherwise many queues overlap more.
        "CUDA_DEVICE_MAX_CONNECTIONS": "1" if layout.tp > 1 or layout.cp > 1 else "32",
    }
    if layout.ranks > 1:
        # Norm kernels leave multiprocessors to the collectives that run beside them.
        chosen |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "20", "NVTE_BWD_LAYERNORM_SM_MARGIN": "20"}
    if layout.cuda_graphs:
        # NCCL would register the buffers of a graph, which segments that grow may move; Megatron-core refuses both.
        chosen["NCCL_GRAPH_REGISTER"] = "0"
    if layout.deterministic:
        chosen |= {
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # one workspace a stream, so that cuBLAS splits its sums alike
            "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0",  # no attention kernels that add atomically
            "NCCL_ALGO": "Ring",  # one order of adding, whatever NCCL would choose for a size
        }
    return chosen


NAMES = tuple(variables(Layout(ranks=2, cuda_graphs=True, deterministic=True)))
"""The variables of all layouts."""


def missing(layout: Layout | None = None, environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables of a layout that an environment lacks."""
    return {name: value for name, value in variables(layout).items() if name not in environment}


def require(layout: Layout | None = None) -> None:
    """Raises AtomError if this process lacks a variable of the layout."""
    if lacking := missing(layout):
        raise AtomError(
            f"this process uses a GPU and was started without {' and '.join(lacking)}, which CUDA's libraries read "
            f"when they start; start it by `atom run` or `atom submit`, or run the same command after: "
            f"export {shlex.join(f'{name}={value}' for name, value in lacking.items())}"
        )
