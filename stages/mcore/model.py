"""Builds Megatron's model from the recipe's sizes, and names its tensors by global names."""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pipeline.core.errors import AtomError, RecipeError
from stages.mcore import gpu, megatron_compat, megatron_patches
from stages.mcore.architectures import architecture_of
from stages.mcore.language_model import LanguageModel, mask_padding
from stages.mcore.layer_spec import has_transformer_engine, recompute_activations, uses_transformer_engine
from stages.mcore.megatron_imports import GPTModel, MLATransformerConfig, TopKRouter, TransformerConfig, parallel_state
from stages.mcore.row_tables import RowTables, frequencies, megatron_yarn
from stages.mcore.tensor_sharding import is_copied
from stages.models.base import ModelConfig, Precision, layers_in_bf16
from stages.models.parallel_layout import Fusion, Layout
from stages.models.param_names import BIASES, BUFFERS, EMBEDDING, INTO_THE_STREAM, MATRICES, global_name

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


def transformer_config(model: ModelConfig, layout: Layout, precision: Precision = "fp32") -> TransformerConfig:
    """Megatron's configuration of a model without dropout or biases.

    It follows from the architecture of the model, its sizes, the layout and the precision.
    """
    words, of_model = keywords(precision, model.layers), architecture_of(model).megatron(model)
    engine = uses_transformer_engine(words["params_dtype"])
    # Before the routers are built: it is a switch of the process.
    megatron_compat.multiply_routers_with_transformer_engine(engine)
    kind = MLATransformerConfig if of_model.get("multi_latent_attention") else TransformerConfig
    # Megatron recomputes the SwiGLU of grouped experts only; local experts are layer_spec's.
    modules = [name for name in layout.recomputed if name != "moe_act" or (engine and model.routing)]
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
        pipeline_model_parallel_layout=_uneven_stages(layout.chunk_layers(model.layers)),
        virtual_pipeline_model_parallel_size=layout.vpp if layout.vpp > 1 else None,
        # Two pipeline ranks are each other's next and previous one; only the ordered sends and receives of the
        # overlapping mode then tell an activation from a gradient. Batched ones mix them up without an error.
        overlap_p2p_comm=layout.vpp > 1,
        batch_p2p_comm=layout.vpp == 1,
        context_parallel_size=layout.cp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.split_experts,
        recompute_granularity={"none": None, "selective": "selective", "layer": "full"}[layout.recompute],
        recompute_modules=modules if layout.recompute == "selective" else None,
        # Each layer by itself keeps only its input.
        recompute_method="uniform" if layout.recompute == "layer" else None,
        recompute_num_layers=1 if layout.recompute == "layer" else None,
        deterministic_mode=layout.deterministic and torch.cuda.is_available(),
        **fusion_keywords(layout, engine, model.routing is not None),
    )
    # for this project's attention; Megatron's own reads the following
    config.rows = RowTables(frequencies(model), layout.cp)
    for name, value in megatron_yarn(model).items():
        setattr(config, name, value)
    return config


def _uneven_stages(counts: Sequence[int]) -> list[list[str]] | None:
    """Megatron's layout of a pipeline whose chunks have so many layers; None if all have equally many."""
    if len(set(counts)) == 1:
        return None
    stages = [["decoder"] * count for count in counts]
    return [["embedding", *stages[0]], *stages[1:-1], [*stages[-1], "loss"]]


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
) -> list[GPTModel]:
    """This rank's part of the model, one chunk for each virtual pipeline stage, without its initial weights.

    Each of Megatron's layers, and its router, has the number of the model's layer (`model_layer`, from 0).

    packed: rows hold several documents, given by the attention mask (see layer_spec.Attention).
    vocab_size: ids from here to `padded_vocab_size` only pad the table and get probability zero; None: without padding.
    on_meta: tensors take no memory until `to_empty` gives them some.

    Needs a `stages.train.parallel.session` of the same layout.
    """
    layout = layout or Layout()
    config = transformer_config(model, layout, precision)
    if on_meta:  # Megatron's layers then name no device; those of Transformer Engine name this one
        config.init_model_with_meta_device = uses_transformer_engine(config.params_dtype)
        config.use_cpu_initialization = not config.init_model_with_meta_device
    spec_of_layers, chunks = architecture_of(model).layer_spec, []
    for number in range(layout.vpp):
        stage = number if layout.vpp > 1 else None
        with torch.device("meta") if on_meta else contextlib.nullcontext():
            chunk = LanguageModel(
                config=config,
                transformer_layer_spec=spec_of_layers(config, stage, packed),
                vocab_size=padded_vocab_size,
                max_sequence_length=model.context_length,
                pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=model.tie_embeddings,
                position_embedding_type="yarn" if model.yarn else "rope",
                rotary_base=model.rope_theta,
                vp_stage=stage,
            )
        if "moe_act" in layout.recomputed:
            recompute_activations(chunk)
        for layer in chunk.decoder.layers:
            layer.model_layer = layer.layer_number - 1
            for router in layer.modules():
                if isinstance(router, TopKRouter):
                    router.model_layer = layer.model_layer
        for name, parameter in named_tensors([chunk]):
            # Megatron marks cut tensors while it initializes them, which it does not do here. Without the mark the
            # gradient norm counts those of tensor rank 0 only.
            parameter.tensor_model_parallel = not is_copied(name)  # type: ignore[attr-defined]
        # For the loss by slices (language_model.py).
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
                name = EMBEDDING
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


# Of each format of 8 or 4 bits: the first GPU generation whose tensor cores support it, and Transformer Engine's answer
# whether this machine does, which also depends on the versions of CUDA and its libraries.
QUANTIZED: dict[Precision, tuple[str, str]] = {
    "fp8-tensorwise": ("Ada or Hopper", "is_fp8_available"),
    "fp8-blockwise": ("Hopper", "is_fp8_block_scaling_available"),
    "mxfp8": ("Blackwell", "is_mxfp8_available"),
    "nvfp4": ("Blackwell", "is_nvfp4_available"),
}
_BF16: dict[str, Any] = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
_RECIPES: dict[Precision, dict[str, Any]] = {
    # e4m3 forward, e5m2 for gradients, one scale per tensor from its present maximum
    "fp8-tensorwise": {"fp8": "hybrid", "fp8_recipe": "tensorwise"},
    # e4m3 everywhere; scales by 1 x 128 of activations and gradients, 128 x 128 of weights (DeepSeek-V3)
    "fp8-blockwise": {"fp8": "e4m3", "fp8_recipe": "blockwise"},
    # e4m3 everywhere; scales that are powers of two, by 1 x 32 (OCP Microscaling)
    "mxfp8": {"fp8": "e4m3", "fp8_recipe": "mxfp8"},
    # e2m1 everywhere; e4m3 scales by 1 x 16 of activations and gradients, 16 x 16 of weights, under one of the tensor;
    # stochastic rounding of gradients and the Hadamard transform are on by default (NVIDIA, arXiv:2509.25149)
    "nvfp4": {"fp4": "e2m1", "fp4_recipe": "nvfp4"},
}


def keywords(precision: Precision, layers: int = 1) -> dict[str, Any]:
    """The keyword arguments of Megatron's TransformerConfig for a precision, in a model of so many layers.

    Constructing it with the FP8 and FP4 ones needs Transformer Engine. Weights stay bf16 under them and are quantized
    as they are used.
    """
    if precision == "fp32":
        return {"params_dtype": torch.float32, "pipeline_dtype": torch.float32}
    words = {**_BF16, **_RECIPES.get(precision, {})}
    if precision == "nvfp4":
        words |= {"first_last_layers_bf16": True, "num_layers_at_start_in_bf16": 0}
        words["num_layers_at_end_in_bf16"] = layers_in_bf16(precision, layers)
    return words


def missing_requirement(precision: Precision) -> str | None:
    """The requirement of a precision that this machine lacks, or None.

    It is a sentence that begins with the recipe's field.
    """
    requirement = f"precision = {precision} needs"
    if precision == "bf16" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"{requirement} a GPU of the Ampere generation or newer, and this one is older; choose fp32"
    if precision not in QUANTIZED:
        return None
    if megatron_patches.te_on_cpu():
        return None
    generation, question = QUANTIZED[precision]
    if not torch.cuda.is_available():
        return (
            f"{requirement} a GPU of the {generation} generation or newer and Transformer Engine, and this machine "
            f"has no GPU; `atom simulate-precision` shows here what the format does to the loss"
        )
    if not has_transformer_engine():
        return f"{requirement} Transformer Engine, which cannot be imported here; install transformer-engine[pytorch]"
    available, reason = getattr(importlib.import_module("transformer_engine.pytorch"), question)(return_reason=True)
    if not available:
        return f"{requirement} what this machine lacks, says Transformer Engine: {reason.strip(' .')}; choose bf16"
    return None


def full_tensor(name: str, shape: tuple[int, ...], model: ModelConfig, seed: int) -> Tensor:
    """The whole initial fp32 tensor of that global name.

    Ones for norms, zeros for biases, otherwise normal with standard deviation `init_std`, divided by sqrt(2 * layers)
    where a layer writes into the residual stream (GPT-2's scaling).
    Of an adapter, B is zero and A uniform up to 1 / sqrt(its columns), as PEFT draws it.
    """
    if name.endswith("layernorm.weight"):
        return torch.ones(shape)
    if name.endswith(("expert_bias", ".lora_B", *BIASES)):
        return torch.zeros(shape)
    if name.endswith(".lora_A"):
        bound = 1 / math.sqrt(shape[1])
        return torch.empty(shape).uniform_(-bound, bound, generator=_generator(name, seed))
    if not name.endswith(MATRICES):
        raise ValueError(f"there is no rule for the initial weights of {name}; add one to stages/mcore/model.py")
    std = model.init_std
    if name.endswith(INTO_THE_STREAM):
        # Two such matrices a layer: the variance of the stream then stays that of one layer (GPT-2).
        std /= math.sqrt(2 * model.layers)
    return torch.empty(shape).normal_(0.0, std, generator=_generator(name, seed))


def _generator(name: str, seed: int) -> torch.Generator:
    # Not from Python's hash, which differs from process to process.
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


class Initial(Mapping[str, Tensor]):
    """The initial tensors of a model, each drawn on access."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], model: ModelConfig, seed: int) -> None:
        """The initial tensors of these shapes, which are given by global name."""
        self.shapes, self.model, self.seed = shapes, model, seed

    def __getitem__(self, name: str) -> Tensor:
        return full_tensor(name, self.shapes[name], self.model, self.seed)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)
