"""The GPU path as far as a CPU can show it: what a rank chooses, sets and refuses, and where its tensors are."""

from __future__ import annotations

import dataclasses
import math
import os
import subprocess
import sys
import warnings
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact
from pipeline.graph import registry
from stages.mcore import gpu, gpu_environment, layer_spec, model
from stages.mcore.layout_check import problem
from stages.mcore.megatron_imports import TransformerConfig, gpt_layer_specs
from stages.mcore.model import build, named_buffers, named_tensors, transformer_config
from stages.mcore.tensor_sharding import Box, boxes, speaks_for
from stages.models.base import Precision
from stages.models.grouped_query import Qwen3Config
from stages.models.mixture import Glm4MoeConfig, Qwen3MoeConfig
from stages.models.parallel_layout import Layout
from stages.train import parallel
from stages.train.config import TrainConfig
from stages.train.data import RankBatch, Shards, heldout_rows
from stages.train.estimate import layout_label
from stages.train.trainer import full_memory
from tests.fixtures import ROOT, fake_rank_fixtures, layout_fixtures, train_fixtures

pytestmark = pytest.mark.numeric

TINY = Qwen3MoeConfig(**train_fixtures.MODEL)


def test_a_task_that_sees_one_gpu_takes_it() -> None:
    assert [gpu.number(rank, 1) for rank in range(8)] == [0] * 8
    assert [gpu.number(rank, 8) for rank in range(8)] == list(range(8))


def test_variables_of_a_layout() -> None:
    one, cut = Layout(), Layout(ranks=8, tp=2, cuda_graphs=True, deterministic=True)
    variables = gpu_environment.variables(one)
    assert set(variables) == {"PYTORCH_CUDA_ALLOC_CONF", "CUDA_DEVICE_MAX_CONNECTIONS"}
    assert (variables | gpu_environment.variables(cut))["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    lacking = gpu_environment.missing(cut, {**variables, "NCCL_ALGO": "Tree"})
    assert lacking["NVTE_ALLOW_NONDETERMINISTIC_ALGO"] == "0" and not {*variables, "NCCL_ALGO"} & set(lacking)
    assert {*variables, *lacking, "NCCL_ALGO"} == set(gpu_environment.NAMES)


def test_every_stage_that_trains_names_the_variables_of_its_layout() -> None:
    for name in registry.stages():
        stage = registry.stage(name)
        if stage.trains:
            config = SimpleNamespace(phase=SimpleNamespace(parallelism=Layout(ranks=2, tp=2)))
            assert stage.environment(config) == gpu_environment.variables(Layout(ranks=2, tp=2)), name


@pytest.mark.parametrize("wanted", [False, True])
def test_deterministic_kernels_do_not_fill_memory_that_is_overwritten(wanted: bool) -> None:
    """On a GPU as on a CPU; both switches are restored."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    torch.utils.deterministic.fill_uninitialized_memory = True
    with gpu.deterministic_kernels(wanted):
        assert torch.are_deterministic_algorithms_enabled() == wanted
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert torch.are_deterministic_algorithms_enabled() == was_deterministic
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_the_whole_model_is_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's meta device stands for a GPU: it is another device than the one where norms and routers are made."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("meta"))
    with parallel.session(0):
        (chunk,) = build(TINY, train_fixtures.VOCAB)
        assert {t.device.type for t in (*chunk.parameters(), *chunk.buffers())} == {"meta"}


class Crossings(TorchDispatchMode):
    """Counts the operations that read a number, or that bring a tensor to another device."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tensors = [x for x in tree_leaves((args, out)) if isinstance(x, torch.Tensor)]
        if func._schema.name == "aten::_local_scalar_dense" or len({x.device for x in tensors}) > 1:
            self.names.append(func._schema.name)
        return out


@pytest.mark.parametrize("starts", [None, torch.tensor([[0] * 10 + [10] * 22, [0] * 32])], ids=["plain", "packed"])
def test_no_layer_leaves_the_device(monkeypatch: pytest.MonkeyPatch, starts: torch.Tensor | None) -> None:
    """Forward and backward of a whole model on PyTorch's meta device, which refuses tensors of another one: as many
    tensors are sent for four layers as for two."""
    monkeypatch.setattr(gpu, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(layer_spec.Attention, "takes_documents", lambda self, q: True)
    sizes = {"hidden_size": 32, "heads": 4, "kv_heads": 2, "head_dim": 8, "intermediate_size": 64}
    ids, crossings = torch.zeros(2, 32, dtype=torch.long, device="meta"), []
    for layers in (2, 4):
        model = Qwen3Config(architecture="qwen3", layers=layers, context_length=32, **sizes)
        with parallel.session(0):
            (chunk,) = build(model, train_fixtures.VOCAB, precision="bf16", packed=True)
            with Crossings() as counted:
                out = chunk(ids, ids, starts)
                out.float().sum().backward()
            assert {p.grad.device.type for p in chunk.parameters()} == {out.device.type} == {"meta"}
            crossings.append(counted.names)
            if layers == 4:
                norm = chunk.decoder.layers[3].input_layernorm
                norm.weight = torch.nn.Parameter(torch.ones(32, dtype=torch.bfloat16))
                with pytest.raises(RuntimeError, match="device"):
                    chunk(ids, ids, starts)
    assert crossings[0] == crossings[1] and "aten::_to_copy" in crossings[0]


def test_full_memory_is_one_sentence() -> None:
    sentence = r"pretrain: rank 0 has no memory left on CPU for 1\.05e\+06 GiB more; `atom plan` says what it needs: lower pretrain\.batch"
    with parallel.session(0) as ranks:
        with pytest.raises(AtomError, match=sentence), full_memory("pretrain", ranks):
            torch.empty(2**50, dtype=torch.uint8)
        with pytest.raises(RuntimeError, match="another fault"), full_memory("pretrain", ranks):
            raise RuntimeError("another fault")


def test_attention_for_documents_fits_every_version_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.13 wants to be told of grouped queries, 2.11 has no switch for it, and 2.10 no window."""
    from torch.nn.attention import varlen

    def of_211(query: Any, *args: Any, return_aux: Any = None, scale: Any = None, window_size: Any = None) -> Any:
        return scale, window_size

    def of_210(query: Any, *args: Any, is_causal: bool = False, return_aux: Any = None) -> Any: ...

    def chosen() -> Any:
        layer_spec.varlen_kernel.cache_clear()
        return layer_spec.varlen_kernel()

    assert chosen().keywords == {"enable_gqa": True} and chosen().func is varlen.varlen_attn
    monkeypatch.setattr(varlen, "varlen_attn", of_211)
    assert chosen()(None, scale=0.1, window_size=(-1, 0)) == (0.1, (-1, 0))
    monkeypatch.setattr(varlen, "varlen_attn", of_210)
    assert chosen() is None
    monkeypatch.undo()
    assert chosen() is not None


@pytest.mark.parametrize(("precision", "engine"), [("fp32", False), ("bf16", True)])
def test_fp32_never_takes_kernels_that_multiply_in_tf32(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, engine: bool
) -> None:
    monkeypatch.setattr(gpt_layer_specs, "HAVE_TE", True)
    with parallel.session(0):
        config = transformer_config(TINY, Layout(), precision)
        assert config.moe_grouped_gemm is engine
        if not engine:
            for spec in layer_spec.layer_spec(config).layer_specs:
                assert not [p for p in _parts(spec) if "transformer_engine" in p.__module__ or "TE" in p.__name__]


def _parts(spec: Any) -> list[type]:
    """All classes in a specification of a layer."""
    if isinstance(spec, type):
        return [spec]
    inner = [getattr(spec, "module", None), *vars(getattr(spec, "submodules", None) or spec).values()]
    return [
        part for x in inner if x is not None and (isinstance(x, type) or hasattr(x, "__dict__")) for part in _parts(x)
    ]


@pytest.mark.parametrize(("precision", "engine"), [("fp32", False), ("bf16", True)])
def test_fusions_are_those_that_the_machine_has(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, engine: bool
) -> None:
    from megatron.core.transformer.moe import moe_utils

    on_cpu = model.fusion_keywords(Layout(), engine, experts=True)
    assert not [name for name, value in on_cpu.items() if value is True]
    assert {f.name for f in dataclasses.fields(TransformerConfig)} >= set(on_cpu)
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cuda"))
    monkeypatch.setattr(moe_utils, "fused_permute", print, raising=False)

    def chosen(layout: Layout, experts: bool = True) -> list[str]:
        return [name for name, value in model.fusion_keywords(layout, engine, experts).items() if value is True]

    assert chosen(Layout()) == ["moe_permute_fusion", "bias_activation_fusion"][not engine :]
    assert chosen(Layout(), experts=False) == ["bias_activation_fusion"] and chosen(Layout(fusions=())) == []
    assert chosen(Layout(fusions=("bias_activation",))) == ["bias_activation_fusion"]
    with pytest.raises(RecipeError, match="fusions = router needs Transformer Engine 2.7"):
        model.fusion_keywords(Layout(fusions=("router",)), engine, experts=True)


def test_cuda_graphs_are_megatrons_of_complete_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the configuration of a model, with the variable that Megatron then asks for; not without a GPU."""
    layout, model = Layout(cuda_graphs=True), Qwen3Config(**train_fixtures.DENSE)
    with parallel.session(0), pytest.raises(RecipeError) as refused:
        build(model, train_fixtures.VOCAB, layout)
    assert str(refused.value) == (
        "parallelism.cuda_graphs = true needs a GPU, which this phase lacks here; leave it out"
    )
    assert "NCCL_GRAPH_REGISTER" not in gpu_environment.variables(Layout())
    assert gpu_environment.variables(layout)["NCCL_GRAPH_REGISTER"] == "0" and layout_label(layout) == "graphs"
    monkeypatch.setattr(gpu, "device", lambda: torch.device("cuda"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 0.19 calls the default, complete layers, by another name
        configs = [transformer_config(model, x) for x in (Layout(), layout)]
    scopes = [getattr(config, "cuda_graph_modules", None) or config.cuda_graph_scope for config in configs]
    assert [config.cuda_graph_impl for config in configs] == ["none", "local"] and not scopes[1]


@pytest.mark.parametrize(
    ("architecture", "layout", "packed", "reason"),
    [
        ("qwen3", {}, False, None),
        ("qwen3_moe", {}, False, "with experts, the number"),
        ("qwen3", {}, True, "with packed rows, whose"),
        ("qwen3", {"recompute": "layer"}, False, "with recompute = layer, as"),
        ("qwen3", {"ranks": 2, "pp": 2}, False, "with pp = 2, where"),
    ],
)
def test_cuda_graphs_are_refused_where_sizes_change(
    architecture: str, layout: dict[str, Any], packed: bool, reason: str | None
) -> None:
    model = Qwen3Config(**train_fixtures.DENSE) if architecture == "qwen3" else TINY
    sentence = problem(Layout(cuda_graphs=True, **layout), model, train_fixtures.VOCAB, [4], packed)
    if reason is None:
        assert sentence is None
    else:
        assert sentence is not None and sentence.startswith(f"parallelism.cuda_graphs = true is not possible {reason}")


def test_rows_of_cuda_graphs_have_one_width(tmp_path: Path) -> None:
    """That of the phase, also where each row of a step is shorter."""
    settings = train_fixtures.config(parallelism={"cuda_graphs": True})
    settings["model"] = train_fixtures.DENSE
    phase = TrainConfig.model_validate(settings).phase
    train_fixtures.make(tmp_path)
    tokens = Artifact.open(tmp_path / "tokens")
    with parallel.session(0) as ranks:
        rows = min(([row] for row in heldout_rows(tokens, phase)), key=lambda rows: rows[0].slots)
        widths = [
            RankBatch.read(rows, Shards(tokens, "heldout"), 1, ranks, slots=slots).width
            for slots in (0, phase.least_slots)
        ]
    assert widths[0] < widths[1] == phase.sequence_length


def test_a_dispatcher_without_its_kernels_is_one_sentence() -> None:
    with parallel.session(0), pytest.raises(RecipeError, match="dispatcher = flex needs GPUs and the package deep_ep"):
        build(TINY, train_fixtures.VOCAB, Layout(dispatcher="flex"))


def test_what_an_image_for_gpus_sets_and_holds_changes_nothing_without_one(tmp_path: Path) -> None:
    """NVIDIA's images make PyTorch multiply fp32 in TF32, and have Transformer Engine, which fails without a GPU."""
    (tmp_path / "transformer_engine").mkdir()
    (tmp_path / "transformer_engine" / "__init__.py").write_text("raise SystemExit('imported')\n")
    code = (
        "import torch; from stages.mcore import layer_spec; from stages.train import parallel\n"
        "before = torch.get_float32_matmul_precision()\n"
        "with parallel.session(0): inside = torch.get_float32_matmul_precision()\n"
        "print(before, inside, torch.get_float32_matmul_precision(), layer_spec.has_transformer_engine())"
    )
    env = {**os.environ, "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    command = [sys.executable, "-W", "ignore", "-c", code]
    process = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert process.stdout.split() == ["high", "highest", "high", "False"], process.stderr


@pytest.mark.parametrize("layout", layout_fixtures.FOUR.values(), ids=layout_fixtures.FOUR)
def test_one_rank_speaks_for_each_part(layout: dict[str, Any]) -> None:
    """The parts that the ranks of a layout hand over are each full tensor, once, by turns of the data ranks or without;
    then one replica's ranks do it all."""
    model = Glm4MoeConfig(**train_fixtures.SIGMOID | {"layers": 4})
    shapes, ranks = model.shapes(train_fixtures.VOCAB), Layout(ranks=4, **layout)
    sent: dict[tuple[bool, str], list[Box]] = {}
    speakers: set[int] = set()
    for rank in range(4):
        with fake_rank_fixtures.as_rank(ranks, rank), torch.device("meta"):
            chunks = build(model, train_fixtures.VOCAB, ranks)
            for name, by_turns in product([*dict(named_tensors(chunks)), *named_buffers(chunks)], (True, False)):
                if speaks_for(name, model.tie_embeddings, by_turns):
                    speakers |= set() if by_turns else {rank}
                    sent.setdefault((by_turns, name), []).extend(boxes(name, shapes[name]))
    assert sent.keys() == set(product((True, False), shapes))
    assert 0 in speakers and len(speakers) <= ranks.tp * ranks.pp * ranks.ep
    for (_, name), parts in sent.items():
        assert len(set(parts)) == len(parts), name
        assert sum(math.prod(b - a for a, b in part) for part in parts) == math.prod(shapes[name]), name
