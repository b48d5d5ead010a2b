"""Builds Megatron's model from the recipe's sizes, and names its tensors by global names."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import AtomError, RecipeError
from stages.mcore import gpu, megatron_compat
from stages.mcore.language_model import LanguageModel, mask_padding
from stages.mcore.layer_spec import uses_transformer_engine
from stages.mcore.megatron_imports import GPTModel, MLATransformerConfig, TopKRouter, TransformerConfig, parallel_state
from stages.mcore.param_names import BUFFERS, global_name
from stages.mcore.precision import keywords
from stages.mcore.row_tables import RowTables, frequencies, megatron_yarn
from stages.mcore.tensor_sharding import is_copied
from stages.models.base import ModelConfig, Precision
from stages.models.parallel_layout import Fusion, Layout

FUSIONS: dict[Fusion, tuple[dict[str, Any], str, str]] = {
    # Megatron's settings; the name in Megatron that is there with the kernel; what that takes
    "permute": ({"moe_permute_fusion": True}, "transformer.moe.moe_utils.fused_permute", "Transformer Engine 2.1"),
    "router": (
        {"moe_router_fusion": True},
        "transformer.moe.moe_utils.fused_topk_with_score_function",
        "Transformer Engine 2.7",
    ),
    "cross_entropy": (
        {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "te"},
        "models.common.language_module.language_module.te_parallel_cross_entropy",
        "Transformer Engine",
    ),
    "rope": (  # in rows of one document; those of several have a kernel of this project
        {"apply_rope_fusion": True},
        "models.common.embeddings.rope_utils.fused_apply_rotary_pos_emb",
        "Transformer Engine",
    ),
    "bias_activation": ({"bias_activation_fusion": True}, "", "a GPU"),
    "gradient_accumulation": (
        {"gradient_accumulation_fusion": True},
        "tensor_parallel.layers._grad_accum_fusion_available",
        "Apex with its extension fused_weight_gradient_mlp_cuda",
    ),
}
"""Those that NVIDIA's recipes of mixtures of experts use. Without one, the same is several kernels of PyTorch."""


def transformer_config(
    model: ModelConfig, layout: Layout, precision: Precision = "fp32", routing_replay: bool = False
) -> TransformerConfig:
    """Megatron's configuration of a model without dropout or biases: from its architecture, its sizes, the layout and
    the precision. routing_replay: routers can be given the experts of their tokens."""
    words, of_model = keywords(precision, model.layers), model.spec().megatron(model)
    engine = uses_transformer_engine(words["params_dtype"])
    # Before the routers are built: it is a switch of the process.
    megatron_compat.multiply_routers_with_transformer_engine(engine)
    kind = MLATransformerConfig if of_model.get("multi_latent_attention") else TransformerConfig
    config = kind(
        **words,
        **{"num_layers": model.layers, **of_model},
        hidden_size=model.hidden_size,
        layernorm_epsilon=model.norm_eps,
        # Without dropout a step needs no random numbers, so that it can be repeated anywhere.
        hidden_dropout=0.0,
        attention_dropout=0.0,
        moe_token_dispatcher_type=_dispatcher(layout),
        moe_enable_deepep=layout.dispatcher == "flex",
        moe_grouped_gemm=model.routing is not None and engine,
        perform_initialization=False,  # Engine.initialize does it
        use_cpu_initialization=not torch.cuda.is_available(),
        tensor_model_parallel_size=layout.tp,
        # With tensor parallelism always: otherwise each rank would keep all activations between layers.
        sequence_parallel=layout.tp > 1,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Two pipeline ranks are each other's next and previous one; only the ordered sends and receives of the
        # overlapping mode then tell an activation from a gradient. Batched ones mix them up without an error.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.split_experts,
        recompute_granularity="full" if layout.recompute == "layer" else None,
        # Each layer by itself keeps only its input.
        recompute_method="uniform" if layout.recompute == "layer" else None,
        recompute_num_layers=1 if layout.recompute == "layer" else None,
        deterministic_mode=layout.deterministic and torch.cuda.is_available(),
        **fusion_keywords(layout, engine, model.routing is not None),
    )
    if routing_replay:
        config.moe_enable_routing_replay = True
        config.moe_router_fusion = False  # that kernel would choose experts of its own, without a word
    # for this project's attention; Megatron's own reads the following
    config.rows = RowTables(frequencies(model), layout.cp, config.softmax_type == "learnable")
    for name, value in megatron_yarn(model).items():
        setattr(config, name, value)
    return config


def _dispatcher(layout: Layout) -> str:
    """The layout's dispatcher. Raises RecipeError if its kernels are missing."""
    if layout.dispatcher == "flex" and not (torch.cuda.is_available() and importlib.util.find_spec("deep_ep")):
        raise RecipeError(
            "parallelism.dispatcher = flex needs GPUs and the package deep_ep, which this machine lacks; use alltoall"
        )
    return layout.dispatcher


def build(
    model: ModelConfig,
    padded_vocab_size: int,
    layout: Layout | None = None,
    precision: Precision = "fp32",
    packed: bool = False,
    vocab_size: int | None = None,
    on_meta: bool = False,
    routing_replay: bool = False,
) -> list[GPTModel]:
    """This rank's part of the model, one chunk for each virtual pipeline stage, without its initial weights.

    Each of Megatron's layers, and its router, has the number of the model's layer (`model_layer`, from 0).

    packed: rows hold several documents, given by the attention mask (see layer_spec.Attention).
    vocab_size: ids from here to `padded_vocab_size` only pad the table and get probability zero; None: without padding.
    on_meta: tensors take no memory until `to_empty` gives them some.
    routing_replay: for `routers.RoutingReplay`.

    Needs a `stages.train.parallel.session` of the same layout.
    """
    layout = layout or Layout()
    config = transformer_config(model, layout, precision, routing_replay)
    if on_meta:  # Megatron's layers then name no device; those of Transformer Engine name this one
        config.init_model_with_meta_device = uses_transformer_engine(config.params_dtype)
        config.use_cpu_initialization = not config.init_model_with_meta_device
    spec, chunks = model.spec(), []
    construct = spec.language_model or LanguageModel
    for number in range(layout.vpp):
        stage = number if layout.vpp > 1 else None
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            chunk = construct(
                config=config,
                transformer_layer_spec=spec.layer_spec(config, stage, packed),
                vocab_size=padded_vocab_size,
                max_sequence_length=model.context_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="yarn" if model.yarn else "rope",
                rotary_base=model.rope_theta,
                vp_stage=stage,
            )
        for layer in chunk.decoder.layers:
            # Global names count the layers of the model, Megatron those of its own stack.
            layer.model_layer = spec.layer_of(layer.layer_number - 1)
            for router in layer.modules():
                if isinstance(router, TopKRouter):
                    router.model_layer = layer.model_layer
        for name, parameter in named_tensors([chunk]):
            # Megatron marks cut tensors while it initializes them, which it does not do here. Without the mark the
            # gradient norm counts those of tensor rank 0 only.
            parameter.tensor_model_parallel = not is_copied(name)  # type: ignore[attr-defined]
        chunk.layout, chunk.real_vocab_size = layout, vocab_size or padded_vocab_size
        if vocab_size is not None and chunk.post_process:
            # Ids that pad the table must get no probability, as no runtime has them.
            chunk.output_layer.register_forward_hook(_mask_padding(vocab_size))
        for module in chunk.modules():
            if hasattr(module, "token_dispatcher"):
                module.register_forward_hook(_release_tokens)
        chunks.append(chunk)
        if not on_meta and (device := gpu.device()).type != "cpu":  # where PyTorch's own modules are, such as norms
            chunk.to(device)
    return chunks


def _release_tokens(layer: Any, inputs: Any, output: Any) -> None:
    """A hook of a layer of experts: its dispatcher keeps the tokens' probabilities until the next forward pass.

    With recompute, their graph would hold each layer's input and its gradient as long.
    """
    for holder in (layer.token_dispatcher, getattr(layer.token_dispatcher, "_comm_manager", None)):
        for name, value in vars(holder).items() if holder else ():
            if torch.is_tensor(value) and value.requires_grad:
                setattr(holder, name, None)


def _mask_padding(vocab_size: int) -> Callable[..., None]:
    """A hook of the output layer that masks ids from `vocab_size` on.

    It writes in place and outside of autograd, which costs no copy of the logits: the gradient of a logit whose
    probability is zero is zero.
    """

    def mask(layer: Any, inputs: Any, output: tuple[Tensor, Any]) -> None:
        with torch.no_grad():
            mask_padding(output[0], vocab_size)

    return mask


def named_buffers(chunks: Sequence[GPTModel]) -> dict[str, Tensor]:
    """This rank's buffers by global name: fp32 in every precision."""
    return {name: tensor for name, tensor in _named_members(chunks, "named_buffers") if name.endswith(BUFFERS)}


def named_tensors(chunks: Sequence[GPTModel]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(global name, parameter) of this rank's parameters, in the model's order.

    With tied embeddings the last pipeline stage has a copy of the first one's table, and its name.
    """
    yield from _named_members(chunks, "named_parameters")


def _named_members(chunks: Sequence[GPTModel], kind: str) -> Iterator[tuple[str, Any]]:
    for gpt in chunks:
        layers = [layer.model_layer for layer in gpt.decoder.layers]
        # Expert ranks hold runs of equal length.
        experts = (gpt.config.num_moe_experts or 0) // parallel_state.get_expert_model_parallel_world_size()
        first_expert = parallel_state.get_expert_model_parallel_rank() * experts
        for local, tensor in getattr(gpt, kind)():
            name = global_name(local, layers, first_expert)
            # The last stage's copy of the table is the same tensor in a checkpoint.
            if gpt.share_embeddings_and_output_weights and name == "output_layer.weight":
                name = "embedding.word_embeddings.weight"
            yield name, tensor


def check_tensors(shapes: Mapping[str, tuple[int, ...]], actual: Mapping[str, Sequence[int]], origin: str) -> None:
    """Raises AtomError, naming `origin`, if a tensor is missing, unexpected, or of another shape."""
    for name in sorted(set(shapes) | set(actual)):
        actual_shape, expected_shape = (tuple(x[name]) if name in x else None for x in (actual, shapes))
        if actual_shape != expected_shape:
            raise AtomError(
                f"{origin} does not fit the model section of the recipe: {name} is {actual_shape}, not {expected_shape}"
            )


def fusion_keywords(layout: Layout, engine: bool, experts: bool) -> dict[str, Any]:
    """Keyword arguments of Megatron's TransformerConfig.

    engine: layers are Transformer Engine's; experts: there are some.

    Raises RecipeError if the layout names a kernel that is missing here; without names it takes those that are there.
    """
    if layout.cuda_graphs and gpu.device().type != "cuda":
        raise RecipeError("parallelism.cuda_graphs = true needs a GPU, which this phase lacks here; leave it out")
    chosen: dict[str, Any] = {"cuda_graph_impl": "local" if layout.cuda_graphs else "none"}  # of complete layers
    chosen |= {"bias_dropout_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False}
    for fusion, (settings, place, needs) in FUSIONS.items():
        has_kernel = gpu.device().type == "cuda" and (engine or fusion == "bias_activation") and _is_there(place)
        if layout.fusions and fusion in layout.fusions and not has_kernel:
            raise RecipeError(
                f"parallelism.fusions = {fusion} needs {needs}, layers in bf16 or FP8, and a GPU, which "
                f"this phase lacks here; leave it out"
            )
        wanted = layout.fusions is None or fusion in layout.fusions
        applies = experts or fusion not in ("permute", "router")
        # Transformer Engine's cross-entropy adds atomically, in any order.
        is_on = wanted and has_kernel and applies and not (layout.deterministic and fusion == "cross_entropy")
        chosen |= {name: is_on if value is True else value for name, value in settings.items()}
    return chosen


def _is_there(place: str) -> bool:
    """Returns True if a name of Megatron, given with its module, has a value that is neither None nor false."""
    module, _, name = place.rpartition(".")
    return not place or bool(getattr(importlib.import_module(f"megatron.core.{module}"), name, None))
