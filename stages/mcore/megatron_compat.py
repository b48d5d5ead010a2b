"""The differences between the supported versions of megatron-core, 0.16.1 to 0.19. Only this file handles them.

Everything else uses names that all versions have. Tests run with the oldest (Python 3.11) and the newest
(`make test-latest`).
"""

from __future__ import annotations

import importlib.util
import sys
import types
from functools import partial
from typing import Any

import torch
from torch import Tensor


def before_import() -> None:
    """Without CUDA: hides Transformer Engine.

    From 0.17 on, the schedules also load a GPU kernel written in Triton, which CPU builds of PyTorch lack: a stub
    replaces it, which can be imported but not called.
    """
    # Transformer Engine would be chosen wherever it is installed, also on the nodes of the same image without a GPU,
    # where its layers fail at their first kernel.
    for name in ("transformer_engine", "transformer_engine_torch"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]
    kernel = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is None:
        sys.modules.setdefault(kernel, _MissingKernels(kernel))


def after_import() -> None:
    """Applies the corrections of modules of Megatron that are imported.

    In 0.16 the router's matrix product looks up a kernel's name that is only defined where Transformer Engine is. Here
    it is defined everywhere.
    """
    from megatron.core.transformer.moe import moe_utils

    global _te_general_gemm
    _te_general_gemm = moe_utils.te_general_gemm = getattr(moe_utils, "te_general_gemm", None)
    _count_without_padding()
    _balance_dispatched_experts()
    _keep_graph_inputs()
    _recompute_without_engine()


_te_general_gemm: Any = None


def multiply_routers_with_transformer_engine(wanted: bool) -> None:
    """Lets the next models' routers, which are fp32, multiply by Transformer Engine's kernel, or by PyTorch's.

    The former computes in TF32, which is exact for bf16 factors. It is a choice of the process.
    """
    from megatron.core.transformer.moe import moe_utils

    moe_utils.te_general_gemm = _te_general_gemm if wanted else None


def _count_without_padding() -> None:
    """Corrects, in all versions, how the router with expert biases counts their tokens.

    It counts them under a padding mask of another shape, which fails (or, with as many tokens as experts, counts
    wrongly).
    """
    from megatron.core.transformer.moe.router import TopKRouter

    count = TopKRouter._apply_expert_bias

    def apply_expert_bias(self: Any, routing_map: Tensor, padding_mask: Tensor | None = None) -> None:
        if padding_mask is not None:
            # [tokens, 1] against [tokens, experts].
            routing_map = routing_map & ~padding_mask.unsqueeze(-1)
        count(self, routing_map)

    TopKRouter._apply_expert_bias = apply_expert_bias


def _balance_dispatched_experts() -> None:
    """Corrects, in all versions, the balance loss of routers with sigmoid scores.

    Megatron's loss counts the experts with the best scores, while tokens are dispatched by biased scores within groups
    (issue 2767 of Megatron-LM). It divides the scores of a token by their sum plus 1e-20. A router can therefore lower
    the loss without balancing anything, by making all scores very small (issue 1545). Here the loss counts the
    dispatched experts, and the scores of a token sum to 1 whatever their size.
    """
    from megatron.core.transformer.moe import router

    dispatch, scores_for_loss = router.topk_routing_with_score_function, router.compute_routing_scores_for_aux_loss

    def dispatch_and_keep(logits: Tensor, *args: Any, **kwargs: Any) -> Any:
        probabilities, routing_map = dispatch(logits, *args, **kwargs)
        # for the loss, which is given the same tensor
        logits.routing_map = routing_map  # type: ignore[attr-defined]
        return probabilities, routing_map

    def scores_of_dispatched(
        logits: Tensor, topk: int, score_function: str, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        if score_function != "sigmoid":
            routing_map, scores = scores_for_loss(logits, topk, score_function, *args, **kwargs)
            return routing_map, scores
        # Taken off, so that the logits do not keep the map alive.
        routing_map = logits.__dict__.pop("routing_map")
        # sigmoid(x) / sum of sigmoids, computed in logarithms, so that tiny scores keep their ratios.
        scores = torch.softmax(torch.nn.functional.logsigmoid(logits.float()), dim=-1)
        if (padding_mask := kwargs.get("padding_mask")) is not None:
            is_token = ~padding_mask.unsqueeze(-1)
            routing_map, scores = routing_map & is_token, scores * is_token
        return routing_map, scores

    router.topk_routing_with_score_function = dispatch_and_keep
    router.compute_routing_scores_for_aux_loss = scores_of_dispatched


def _keep_graph_inputs() -> None:
    """Keeps, in 0.16, the buffers of the inputs of CUDA graphs from being given to other tensors.

    There the buffer of the first layer's input becomes that of the last layer's incoming gradient, though the first
    layer's backward graph reads it, if its norm keeps its input: the gradient of the embedding would be wrong. Here
    buffers of inputs, which Megatron marks, are not given to others; the process keeps them.
    """
    from megatron.core.transformer import cuda_graphs

    record = cuda_graphs._CudagraphGlobalRecord
    if not hasattr(record, "tensor_reuse_pool"):
        return

    class Pool(cuda_graphs.TensorReusePool):  # type: ignore[misc]
        def insert(self, tensor: Tensor) -> None:
            if not hasattr(tensor, "can_skip_replay_copy"):
                super().insert(tensor)

    record.tensor_reuse_pool = Pool()


def mlp_submodules(mlp: Any) -> Any:
    """Returns the parts of the specification of a dense feed-forward part, which in 0.19 is a partial function."""
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


def _recompute_without_engine() -> None:
    """Corrects, in all versions, selective recomputation where Transformer Engine is missing.

    It takes the default `fp8=False` for FP8 and then asks Transformer Engine for its state.
    """
    from megatron.core.tensor_parallel import random

    if random.HAVE_TE:
        return
    start = random.CheckpointWithoutOutput.__init__
    random.CheckpointWithoutOutput.__init__ = lambda self, fp8=None: start(self, fp8 or None)


def router_losses() -> dict[str, Tensor]:
    """This rank's losses of the routers by name ("load_balancing_loss", "z_loss", ...) and layer, since the last reset.

    Each is a sum. Megatron 0.17 moved them into an object.
    """
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        return {name: entry.values for name, entry in moe_utils.get_moe_metrics_tracker().metrics.items()}
    return {name: entry["values"] for name, entry in moe_utils.get_moe_layer_wise_logging_tracker().items()}


def clear_router_losses() -> None:
    """Clears that record, whose length is that of the process's first model."""
    from megatron.core.transformer.moe import moe_utils

    if hasattr(moe_utils, "get_moe_metrics_tracker"):
        moe_utils.get_moe_metrics_tracker().metrics.clear()
    else:
        moe_utils.get_moe_layer_wise_logging_tracker().clear()


class _MissingKernels(types.ModuleType):
    """A module of kernels that cannot be called here: importing a name from it works, using it does not."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return None
