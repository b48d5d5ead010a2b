"""The seconds of an optimizer step on GPUs, in closed form: compute, memory and network.

No torch: `atom plan` imports this file.

A micro-batch passes each layer forward and backward. Its time is the sum of what a GPU does one after the other:

- matrix products: their FLOPs by the peak of the precision and the share of it that large products reach; those of
  experts reach less, and the output head is bf16 in every precision, as are NVFP4's exempt layers;
- attention: FLOPs by the bf16 peak in every precision. The backward pass computes the scores again (Dao, 2023), and a
  score costs an exponential, so narrow heads are no faster than heads of 128;
- what lies between products (norms, residuals, SwiGLU, permutation of tokens, router): the bytes that a layer keeps or
  has at work, by the memory's bandwidth, several times; FP8 and NVFP4 move what they quantize once more, and where
  one scale holds for a whole tensor, again for its maximum;
- weights and gradients of the rank, read and summed in each micro-batch, which makes experts slow that get few tokens;
- launches of kernels by the host, more of them by each expert on the rank, and most in FP8 and NVFP4;
- traffic of tensor and expert ranks: by NVLink inside a domain, by the network outside.

No micro-batch takes less than the host, which issues each layer once, however few its tokens: small micro-batches and
layers split over many ranks leave the GPU waiting. The dispatcher alltoall costs it more, since it sends
counts of tokens to the host; flex keeps them on the GPU, and no published run shows what it costs.

What is computed again costs a third of its part of these, its forward pass once more; the few launches of norms and
activations do not count.

A step adds the pipeline's bubble of (pp - 1) / vpp micro-batches (Narayanan et al., 2021), the reduction of gradients
and the gathering of weights as far as the last micro-batch does not hide them, and the optimizer. Muon orthogonalizes
the matrices of which a rank owns a part, and sums up those that are divided over the ranks that share them, one after
the other. Routing is even.
Context-parallel and pipeline traffic are taken as hidden, and packed rows as slow as full ones.

`bench/throughput.py` fits CONSTANTS to published runs, and measures the errors on runs that were left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Literal

from pipeline.core.stage import RECOMPUTED, Accelerator, family
from stages.mcore.memory import GRADIENT, MASTER, NVFP4, sharing
from stages.mcore.optimizer import STATE_BYTES, is_matrix
from stages.models.base import EXPERT, MATRICES_AGAIN, AttentionCost, ModelConfig, Rows
from stages.models.parallel_layout import Layout, Module

FLOPS = 6
"""FLOPs of a matrix parameter and token, 2 forward and 4 backward."""
RESCORED = 7 / 6
"""FLOPs of attention with the scores that the backward pass computes again, beside the model's."""
NARROWEST = 256
"""Widths of a query and a value together below which exponentials take as long as products."""
LOGIT = 16
"""Bytes moved for a logit: bf16 written and read, its exponential in fp32, its gradient written and read twice."""
READ = {"bf16": 2.0, "fp8": 1.0, "fp4": NVFP4}
"""Bytes of a weight that products read, by family of precisions."""
CLOCK = 0.6
"""Watts for a TFLOP/s of bf16 at which the constants hold. The rest of the power decides the clock under load."""
LAYER_KERNELS, SPARSE_KERNELS, EXPERT_KERNELS, EXPERT_KERNELS_FP8 = 80, 40, 6, 18
"""Kernels of a micro-batch for a layer, for its routing and exchange, and for each expert on the rank.

The three products of an expert are six kernels. Under FP8 and NVFP4 it also quantizes inputs and gradients, in three
kernels each.
"""

LAUNCHED = {"none": 1.0, "mlp": 0.5, "partial": 0.0, "full": 0.0}
"""Share of a layer's launches that graphs leave to the host, those of its routing and experts apart."""


@dataclass(frozen=True)
class Constants:
    """The fitted constants, which no data sheet states. Shares are of stated peaks and bandwidths."""

    bf16: float  # share of large matrix products in bf16
    fp8: float  # the same in FP8
    grouped: float  # speed of the experts' products beside the dense ones
    attention: float  # share of the bf16 peak
    passes: float  # times that a kept or temporary byte is moved, by the share of the bandwidth
    link: float  # share of NVLink and network by what is waited for; above 1 if a part is hidden
    launch: float  # seconds of a kernel in which nothing is computed
    fp4: float  # share of large matrix products in NVFP4: of one run, the other constants being given
    host: float  # seconds in which the host issues a layer, forward and backward: of one run
    sparse_host: float  # seconds more for a layer with experts: of three runs


CONSTANTS = Constants(
    bf16=0.654,
    fp8=0.680,
    grouped=0.556,
    attention=0.568,
    passes=5.42,
    link=1.14,
    launch=16.2e-6,
    fp4=0.591,
    host=6.4e-3,
    sparse_host=8.1e-3,
)
UNFITTED_ERRORS = (0.11, 0.81)
"""Median and largest relative error of the throughput of published runs that were not fitted."""


@dataclass(frozen=True)
class LayerShape:
    """Equal layers of a model on one rank.

    dense: parameters that each token meets, experts: those of all experts. saved, working: bytes for a token in
    bf16, kept for the backward pass and at work.
    """

    layers: int
    dense: int
    experts: int
    saved: float
    working: float


@dataclass(frozen=True)
class Again:
    """What all layers compute again if a module is: parameters that each token meets, and bytes as in LayerShape."""

    dense: int
    saved: float


@dataclass(frozen=True)
class Matrices:
    """Weight matrices that share ranks.

    numbers: in all of them. flops: of one iteration of Newton and Schulz on all, and on the largest.
    """

    count: int = 0
    numbers: int = 0
    flops: float = 0.0
    largest: float = 0.0

    def and_of(self, shape: tuple[int, ...], count: int) -> Matrices:
        """Returns these and `count` more of a shape of two dimensions."""
        short, long = sorted(shape)
        # As stages/mcore/muon.py computes it. Queries, keys and values count as one matrix.
        flops = 4.0 * short**2 * long + 2.0 * short**3
        numbers = self.numbers + count * short * long
        return Matrices(self.count + count, numbers, self.flops + count * flops, max(self.largest, flops))


@dataclass(frozen=True)
class Shape:
    """The sizes of a model on which its time depends.

    heads: output heads (several with multi-token prediction). again: the cost of recomputation, by module.
    dense_matrices, expert_matrices: those of all layers that Muon updates.
    """

    hidden: int
    vocabulary: int
    layers: tuple[LayerShape, ...]
    attention: AttentionCost
    experts: int = 1
    top_k: int = 1
    heads: int = 1
    again: Mapping[Module, Again] = field(default_factory=dict)
    dense_matrices: Matrices = Matrices()
    expert_matrices: Matrices = Matrices()

    @cached_property
    def depth(self) -> int:
        return sum(group.layers for group in self.layers)

    @cached_property
    def sparse(self) -> int:
        return sum(group.layers for group in self.layers if group.experts)

    @cached_property
    def total(self) -> LayerShape:
        """All layers as one."""
        names = ("dense", "experts", "saved", "working")
        return LayerShape(1, *(sum(group.layers * getattr(group, name) for group in self.layers) for name in names))

    @property
    def head(self) -> int:
        """Parameters of the output heads."""
        return self.heads * self.vocabulary * self.hidden

    @property
    def matrices(self) -> float:
        """Parameters that a token meets, output heads included."""
        return self.total.dense + self.total.experts * self.top_k / self.experts + self.head


def shape_of(model: ModelConfig, padded_vocab_size: int) -> Shape:
    """SwiGLU counts as one kernel, as it is on GPUs."""
    one, rows, groups = Layout(), Rows(1, model.context_length), []
    experts, top_k = (model.routing.experts, model.routing.top_k) if model.routing else (1, 1)
    dense, sparse = Matrices(), Matrices()
    for layer in range(model.layers):
        for name, size in model.layer_shapes(layer).items():
            if is_matrix(f"decoder.layers.{layer}.{name}", size):
                if EXPERT in name:
                    sparse = sparse.and_of(size, experts)
                else:
                    dense = dense.and_of(size, 1)
        parameters = model.layer_memory(one, layer)
        saved = sum(model.layer_activations(one, "bf16", rows, layer, fused=True).values())
        # Tokens in bf16 that are sorted for their experts, received, returned and sorted back.
        working = 4 * 2 * model.hidden_size * top_k if parameters.experts else 0
        groups.append(LayerShape(1, parameters.dense, parameters.experts, saved, working))
    again = {module: _again(model, module) for module in MATRICES_AGAIN}
    sizes = model.hidden_size, padded_vocab_size, tuple(groups), model.attention(), experts, top_k
    return Shape(*sizes, again=again, dense_matrices=dense, expert_matrices=sparse)


def _again(model: ModelConfig, module: Module) -> Again:
    rows, saved = Rows(1, model.context_length), 0.0
    for layer in range(model.layers):
        tensors = model.layer_activations(Layout(), "bf16", rows, layer, fused=True)
        saved += sum(tensors[name] for name in model.recomputed([module], layer))
    return Again(model.matrices_again([module]), saved)


@dataclass(frozen=True)
class StepSetup:
    """The computation of a step.

    Attributes:
        layout: The ranks.
        precision: The data type of matrix products.
        rows: A micro-batch.
        micro_batches: Micro-batches of a step on one rank.
        gradient: Bytes of a gradient.
        states: Bytes of the optimizer's states of a parameter.
        orthogonalized: Iterations of Newton and Schulz in which the optimizer orthogonalizes a matrix.
        bf16_layers: Layers whose products are bf16 in any precision.
        graphs: The launches that the GPU replays: of all kernels, of MLPs, or of what is not the experts'. Not in this
            project's engine.
        hides_experts: True if the traffic of experts is hidden behind the compute of another micro-batch. Not in this
            project's engine.
        balanced: True if the ranks of a pipeline share the time of the output head. Not in this project's engine.
    """

    layout: Layout
    precision: str
    rows: Rows
    micro_batches: int
    gradient: int = GRADIENT
    states: float = 2 * STATE_BYTES
    orthogonalized: int = 0
    bf16_layers: int = 0
    graphs: Literal["none", "mlp", "partial", "full"] = "none"
    hides_experts: bool = False
    balanced: bool = False


@dataclass(frozen=True)
class StepTime:
    """Seconds of an optimizer step by cause; they add up."""

    products: float
    attention: float
    between: float
    weights: float
    launches: float
    tensor: float
    experts: float
    host: float = 0.0
    bubble: float = 0.0
    reduction: float = 0.0
    optimizer: float = 0.0

    @property
    def total(self) -> float:
        return math.fsum(getattr(self, field.name) for field in fields(self))


def step_time(shape: Shape, gpu: Accelerator, run: StepSetup, constants: Constants = CONSTANTS) -> StepTime:
    """On the slowest stage of the pipeline. The GPU has a peak for bf16, and for FP8 if that is the precision."""
    layout = run.layout
    micro_batch = _micro_batch(shape, gpu, run, constants)
    reduction, optimizer = _update(shape, gpu, run, constants)
    parts = {field.name: getattr(micro_batch, field.name) * run.micro_batches for field in fields(micro_batch)}
    # 1F1B idles while it fills and drains the pipeline. Interleaved chunks shorten that by their number.
    parts["bubble"] = (layout.pp - 1) / layout.vpp * micro_batch.total
    # It runs beside the last micro-batch, unless the layout forbids that.
    parts["reduction"] = max(0.0, reduction - (0 if layout.overlap_gradients is False else micro_batch.total))
    return StepTime(**parts | {"optimizer": optimizer})


def _micro_batch(shape: Shape, gpu: Accelerator, run: StepSetup, c: Constants) -> StepTime:
    layout, total, low = run.layout, shape.total, family(run.precision)
    quantizes = low in ("fp8", "fp4")
    # Under load the power limit decides the clock, which falls about with the square root of the power.
    clock = math.sqrt(gpu.watts / (gpu.peaks["bf16"] * CLOCK / 1e12)) if gpu.watts else 1.0
    bf16 = gpu.peaks["bf16"] * min(1.0, c.bf16 * clock)
    rate = gpu.peaks[low] * min(1.0, getattr(c, low) * clock) if quantizes else bf16
    exempt = run.bf16_layers / shape.depth
    # Times add up, so rates are averaged by their inverses.
    rate = 1 / ((1 - exempt) / rate + exempt / bf16)
    scoring = gpu.peaks["bf16"] * min(1.0, c.attention * clock) / RESCORED
    quantized = 0
    if quantizes:  # a scale of a whole tensor takes a pass for its maximum
        quantized = 4 if run.precision in ("fp8-tensorwise", "nvfp4") else 2
    gathered = run.rows.rows * run.rows.length / layout.cp  # tokens that tensor ranks work on together
    tokens = gathered / layout.tp

    met = total.dense + total.experts * shape.top_k / shape.experts / c.grouped
    attention = shape.attention
    widths = attention.layers * attention.heads * max(attention.qk + attention.v, NARROWEST)
    scores = widths * attention.keys(run.rows.length)
    moved = (total.saved + total.working) * c.passes + total.saved * quantized
    held = total.dense / layout.tp + total.experts / (layout.ep * layout.split_experts)
    # of each half of a layer that is split: three gathers and two scatters; of experts: there and back, twice
    gather = collective(gpu, 2 * gathered * shape.hidden, layout.tp, 1) / c.link
    send = dispatch(gpu, 2 * shape.hidden * tokens, shape.top_k, layout) / c.link
    times = {
        "products": FLOPS * tokens * met / rate,
        "attention": FLOPS * tokens * scores / scoring,
        "between": tokens * moved / gpu.memory,
        # read forward and backward; a gradient is read and written
        "weights": held * 2 * (READ[low] + run.gradient) / gpu.memory,
        "launches": c.launch * _kernels(shape, run),
        "tensor": (2 * shape.depth - shape.sparse) * 5 * gather,
        "experts": shape.sparse * 4 * send,
    }
    if layout.recompute == "layer":  # forward again: a gather and a scatter, there and back
        factors = {"weights": 1.0, "tensor": 7 / 5, "experts": 6 / 4}
        times = {name: seconds * factors.get(name, RECOMPUTED) for name, seconds in times.items()}
    for module in layout.recomputed:
        again = shape.again[module]
        times["products"] += FLOPS / 3 * tokens * again.dense / rate
        times["between"] += tokens * again.saved * c.passes / 3 / gpu.memory
        if module == "mlp":  # a gather and a scatter
            times["tensor"] += (shape.depth - shape.sparse) * 2 * gather
    if run.hides_experts:
        # behind the compute of another micro-batch, which the first and the last of a step lack in half
        hidden = min(times["experts"], times["products"] + times["attention"] + times["between"])
        times["experts"] -= hidden * (1 - 1 / run.micro_batches)
    of_head = FLOPS * tokens * shape.head / bf16, tokens * LOGIT * shape.heads * shape.vocabulary / gpu.memory
    part, head = _slowest_stage(shape, run, math.fsum(times.values()), sum(of_head))
    times = {name: seconds * part for name, seconds in times.items()}
    times["products"] += head * of_head[0]
    times["between"] += head * of_head[1]
    # what the GPU waits for a host that has not issued its work yet
    return StepTime(**times, host=max(0.0, part * _host(shape, run, c) - math.fsum(times.values())))


def _slowest_stage(shape: Shape, run: StepSetup, layers: float, head: float) -> tuple[float, float]:
    """Returns the shares of all layers and of the head that the slowest stage has.

    A stage has whole layers, and the last one the head. layers, head: seconds of all of them.
    """
    layout, depth = run.layout, shape.depth
    if run.balanced:
        return -(-depth // (layout.pp * layout.vpp)) * layout.vpp / depth, 1 / layout.pp
    counts = layout.chunk_layers(depth)
    *others, last = (sum(counts[stage :: layout.pp]) / depth for stage in range(layout.pp))
    most = max(others, default=0.0)
    return (most, 0.0) if most * layers > last * layers + head else (last, 1.0)


def _host(shape: Shape, run: StepSetup, c: Constants) -> float:
    """Seconds in which the host issues a micro-batch in all layers.

    They are Python's part by layer, and each expert's kernels, which one call launches.
    """
    seconds = shape.depth * c.host * LAUNCHED[run.graphs]
    if run.graphs != "full" and run.layout.dispatcher != "flex":
        seconds += shape.sparse * (c.sparse_host + c.launch * _of_experts(shape, run))
    return seconds * RECOMPUTED if run.layout.recompute == "layer" else seconds


def _kernels(shape: Shape, run: StepSetup) -> float:
    """Launches of a micro-batch in all layers."""
    if run.graphs == "full":
        return 0.0
    sparse = shape.sparse * (SPARSE_KERNELS + _of_experts(shape, run))
    return sparse + shape.depth * LAYER_KERNELS * LAUNCHED[run.graphs]


def _of_experts(shape: Shape, run: StepSetup) -> float:
    """Kernels of a layer's experts on a rank."""
    return shape.experts / run.layout.ep * (EXPERT_KERNELS if run.precision == "bf16" else EXPERT_KERNELS_FP8)


def _update(shape: Shape, gpu: Accelerator, run: StepSetup, c: Constants) -> tuple[float, float]:
    """Seconds of a step's reduction of gradients and gathering of weights, and of its optimizer."""
    layout, total = run.layout, shape.total
    split, (dense_ranks, expert_ranks) = layout.ep * layout.split_experts, sharing(layout)
    table = shape.vocabulary * shape.hidden
    # With a pipeline, the table is on the first stage and the head on the last one.
    dense = (total.dense / layout.pp + (shape.head + table) / (1 if layout.pp == 1 else 2)) / layout.tp
    experts = total.experts / layout.pp / split
    # Gradients are scattered and weights gathered: in and out once each, over the ranks that share a tensor.
    reduction = sum(
        collective(gpu, (run.gradient + 2) * size, ranks, stride)
        for size, ranks, stride in ((dense, dense_ranks, layout.tp), (experts, expert_ranks, split))
    )
    # fp32 weights and moments are read and written, a gradient read, a weight written; all gradients are measured
    # for the norm, and zeroed
    owned = (2 * (MASTER + run.states) + run.gradient + 2) * (dense / dense_ranks + experts / expert_ranks)
    optimizer = (owned + 2 * run.gradient * (dense + experts)) / gpu.memory
    if run.orthogonalized:
        places = (
            (shape.dense_matrices, layout.pp, dense_ranks, layout.tp, layout.tp),
            (shape.expert_matrices, layout.pp * layout.ep, expert_ranks, split, layout.split_experts),
        )
        optimizer += sum(_orthogonalization(gpu, run, c, *place) for place in places)
    return reduction / c.link, optimizer


def _orthogonalization(
    gpu: Accelerator, run: StepSetup, c: Constants, matrices: Matrices, split: int, ranks: int, stride: int, parts: int
) -> float:
    """Seconds of Muon for matrices of which each of `split` ranks has others.

    Args:
        gpu: The figures of a GPU.
        run: The step.
        c: The constants.
        matrices: All of them.
        split: The stages of the pipeline, times the ranks of experts.
        ranks: The ranks that share a matrix by slices, which lie `stride` apart.
        stride: Their distance.
        parts: The tensor ranks that have parts of a matrix.
    """
    if not matrices.count:
        return 0.0
    here = matrices.count / split
    # A rank that owns a part of a matrix orthogonalizes the whole, as each tensor rank does.
    owned, flops = max(here / ranks, 1.0), max(matrices.flops / split / ranks, matrices.largest)
    products = run.orthogonalized * (flops / (gpu.peaks["bf16"] * c.bf16) + 3 * c.launch * owned)
    # One matrix lies across each border between slices. Its parts are summed up: scattered and gathered, in bf16.
    size, divided = 2 * matrices.numbers / matrices.count, min(here, ranks - 1)
    sums = 2 * (divided * collective(gpu, size / parts, ranks, stride) + owned * collective(gpu, size, parts, 1))
    return products + sums / c.link


def collective(gpu: Accelerator, size: float, ranks: int, stride: int) -> float:
    """Seconds of an all-gather or reduce-scatter of `size` bytes over `ranks` that lie `stride` apart.

    It runs at full bandwidth, by NVLink in each domain, whose ranks share the way between domains.
    """
    inside = min(ranks, max(1, gpu.nvlink_gpus // stride))
    domains = ranks / inside
    return size * ((inside - 1) / inside / gpu.nvlink + (domains - 1) / domains / inside / gpu.network)


def dispatch(gpu: Accelerator, size: float, top_k: int, layout: Layout) -> float:
    """Seconds in which a rank sends its tokens of `size` bytes to their experts at full bandwidth.

    alltoall: a copy for each expert. flex: once to each NVLink domain that has one of a token's experts, and from there
    once to each rank (DeepSeek-AI, 2024, section 3.2.2). Ranks that split an expert each need
    the tokens of all.
    """
    split = layout.split_experts
    # Expert ranks that lie in one NVLink domain.
    inside = min(layout.ep, max(1, gpu.nvlink_gpus // split))
    domains = layout.ep / inside
    if layout.dispatcher == "flex":
        copies, outside = _distinct(layout.ep, top_k), _distinct(domains, top_k) * (domains - 1) / domains
    else:
        copies, outside = top_k, top_k * (domains - 1) / domains
    sent = size * (outside / gpu.network + copies * (inside - 1) / inside / gpu.nvlink)
    return sent + collective(gpu, size * top_k * split, split, 1)


def _distinct(places: float, draws: int) -> float:
    """Expected number of distinct ones among `places` that are drawn evenly."""
    return places * (1 - (1 - 1 / places) ** draws)
