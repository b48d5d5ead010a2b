"""The code for GPUs, with real values, on an emulated one (tests/fixtures/emulated_gpu.py): what it gives on the CPU."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F

from pipeline.core import provenance
from pipeline.core.store import Store
from stages.mcore import gpu_environment, layer_spec
from tests.fixtures import (
    ROOT,
    architecture_fixtures,
    emulated_gpu,
    gpu_step_fixtures,
    layout_fixtures,
    run_fixtures,
    train_fixtures,
)

pytestmark = pytest.mark.numeric

EMULATED = ("tests.fixtures.emulated_gpu",)
assert "TEST_THROUGH" not in os.environ, "on an emulated GPU, what these tests compare would be the same"


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return folder


def runs_of(corpus: Path, **phase: Any) -> dict[str, tuple[Path, dict[str, Any]]]:
    place = corpus / "packed" if phase.get("pack") else corpus
    return {
        name: (place, {**train_fixtures.config(**phase), "model": model})
        for name, model in architecture_fixtures.MODELS.items()
    }


def test_every_architecture_trains_as_on_a_cpu(corpus: Path, tmp_path: Path) -> None:
    """Packed rows in bf16, as the recipes for clusters have them: attention is then another kernel, and rounds
    elsewhere."""
    runs = runs_of(corpus, pack=True, precision="bf16")
    on_cpu = layout_fixtures.compare_runs(runs, 1, tmp_path / "cpu.json", 1)
    on_gpu = layout_fixtures.compare_runs(runs, 1, tmp_path / "gpu.json", 1, through=EMULATED)
    for name in runs:
        losses = [[line.get("loss", line.get("heldout_loss")) for line in of[name]] for of in (on_gpu, on_cpu)]
        assert losses[0] == pytest.approx(losses[1], rel=3e-3), name


@run_fixtures.at_length("emulated-gpu", 120)
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("pack", [False, True])
def test_every_architecture_trains_as_on_a_cpu_in_fp32(
    corpus: Path, tmp_path: Path, pack: bool, deterministic: bool
) -> None:
    runs = runs_of(corpus, pack=pack, parallelism={"deterministic": deterministic})
    on_cpu = layout_fixtures.compare_runs(runs, 1, tmp_path / "cpu.json", 3)
    on_gpu = layout_fixtures.compare_runs(runs, 1, tmp_path / "gpu.json", 3, through=EMULATED)
    for name in runs:
        layout_fixtures.agree(on_gpu[name], on_cpu[name], 1e-4, name)


@run_fixtures.at_length("emulated-gpu", 1200)
@pytest.mark.parametrize(("pack", "precision"), [(False, "fp32"), (True, "bf16")])
def test_every_layout_trains_as_one_process_on_a_cpu(corpus: Path, tmp_path: Path, pack: bool, precision: str) -> None:
    """In bf16, losses and norms of gradients: rounding there sends some tokens to other experts."""
    place = corpus / "packed" if pack else corpus
    settings = train_fixtures.config(batch=layout_fixtures.BATCH, pack=pack, precision=precision)
    settings |= {"model": layout_fixtures.MODEL}
    (one,) = layout_fixtures.compare(place, {"one": {}}, 1, settings, tmp_path / "one.json", 3).values()
    for ranks, named in ((2, layout_fixtures.TWO), (4, layout_fixtures.FOUR)):
        runs = {n: (place, layout_fixtures.in_layout(settings, x, ranks)) for n, x in named.items()}
        out = tmp_path / f"{ranks}.json"
        for name, curve in layout_fixtures.compare_runs(runs, ranks, out, 3, through=EMULATED).items():
            if precision == "fp32":
                layout_fixtures.agree(curve, one, 1e-5, name)
                continue
            for step, expected in zip(curve, one, strict=True):
                for figure in expected.keys() & {"loss", "grad_norm", "heldout_loss"}:
                    assert step[figure] == pytest.approx(expected[figure], rel=5e-3), f"{name}: {figure}"


def steps_of(command: str, *names: str) -> dict[str, Any]:
    """What tests/fixtures/gpu_step_fixtures.py prints of these architectures."""
    models = json.dumps({name: architecture_fixtures.MODELS[name] for name in names})
    module = "tests.fixtures.gpu_step_fixtures"
    codes, logs = layout_fixtures.end(layout_fixtures.spawn(*EMULATED, [module, command, models], 1))
    assert codes == [0], logs[0][-3000:]
    printed: dict[str, Any] = json.loads(next(line for line in logs[0].splitlines() if line.startswith("{")))
    return printed


def test_the_host_waits_for_the_tokens_of_experts_only() -> None:
    """No more in four layers than in two without experts. With them, Megatron reads their numbers of tokens, and its
    sorting of tokens without Transformer Engine selects by a mask: twice in 0.16, once in 0.19."""
    waits = steps_of("waits", "qwen3", "qwen3_moe")
    assert waits["qwen3"]["2"] == waits["qwen3"]["4"] and 0 < sum(waits["qwen3"]["2"].values()) < 10
    added = {name: count - waits["qwen3_moe"]["2"][name] for name, count in waits["qwen3_moe"]["4"].items()}
    by_mask = added.pop("aten::masked_select") / 2
    assert by_mask in (1, 2) and {name: count / 2 for name, count in added.items() if count} == {"aten::_to_copy": 1}


def test_cuda_graphs_compute_what_their_layers_do() -> None:
    """Megatron records each layer, forward and backward, in the first step, in which the host may not wait. From the
    second on it replays both for each micro-batch, and in an evaluation the first."""
    forward = architecture_fixtures.MODELS["qwen3"]["layers"] * 2  # micro-batches
    for precision, figures in steps_of("graphs", "qwen3")["qwen3"].items():
        assert figures["replays"] == [0, 2 * forward, 2 * forward, forward], precision
        bound = 1e-4 if precision == "fp32" else 1e-2  # copies may be aligned otherwise, which another processor rounds
        for one, other in zip(figures["with"], figures["without"], strict=True):
            assert one == pytest.approx(other, rel=bound), precision
        assert figures["with"][2][0] < figures["with"][0][0] - 0.1, precision


@run_fixtures.at_length("emulated-gpu", 120)
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"cp": 2}, {"overlap_weights": True}], ids=str)
def test_layouts_train_alike_with_cuda_graphs(layout: dict[str, Any], corpus: Path, tmp_path: Path) -> None:
    runs = {}
    for name, graphs in (("without", False), ("with", True)):
        parallelism = {"ranks": 2, "cuda_graphs": graphs, **layout}
        runs[name] = (corpus, {**train_fixtures.config(parallelism=parallelism), "model": train_fixtures.DENSE})
    curves = layout_fixtures.compare_runs(runs, 2, tmp_path / "two.json", 3, through=EMULATED)
    layout_fixtures.agree(curves["with"], curves["without"], 1e-5, str(layout))


@run_fixtures.at_length("emulated-gpu", 15)
def test_the_sampler_draws_as_on_a_cpu() -> None:
    """With deterministic kernels only: by this project's decoder, and by transformers' own models."""
    on_cpu = {name: gpu_step_fixtures.tokens_of(model) for name, model in architecture_fixtures.MODELS.items()}
    assert steps_of("tokens", *on_cpu) == on_cpu


@pytest.fixture
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's, which needs a GPU, does not start."""
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)


@pytest.mark.usefixtures("without_cuda")
def test_what_a_gpu_refuses_is_refused_and_waits_are_counted() -> None:
    x, host = emulated_gpu.OnGpu(torch.arange(6.0).view(2, 3)), torch.ones(2, 3)
    with emulated_gpu.emulated():
        for operation in (lambda: x + host, lambda: torch.cat([x, host]), lambda: F.embedding(host.long(), x)):
            with pytest.raises(RuntimeError, match="a tensor of .2, 3. is on the host, and others are on cuda:0"):
                operation()
        emulated_gpu.WAITS.clear()
        assert x[torch.tensor([1])].device == x.mul_(2).device == torch.device("cuda", 0)
        assert not emulated_gpu.WAITS
        assert (x.sum().item(), x[x > 4].shape, x.cpu().tolist()) == (30.0, (3,), [[0, 2, 4], [6, 8, 10]])
        assert emulated_gpu.WAITS == {"aten::_local_scalar_dense": 1, "aten::index": 1, "aten::_to_copy": 1}


@pytest.mark.usefixtures("without_cuda")
def test_a_group_takes_tensors_of_its_backend_alone(request: pytest.FixtureRequest) -> None:
    """NCCL those of the device, gloo those of the host; PyTorch moves objects by itself."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    dist.init_process_group(emulated_gpu.NCCL, rank=0, world_size=1, store=dist.HashStore())
    request.addfinalizer(dist.destroy_process_group)
    objects = dist.new_group(backend="gloo")
    device, host = emulated_gpu.OnGpu(torch.ones(2)), torch.ones(2)
    with emulated_gpu.emulated():
        dist.all_reduce(device)
        dist.all_reduce(host, group=objects)
        for tensor, group, kind in ((host, None, "cpu"), (device, objects, "cuda")):
            with pytest.raises(RuntimeError, match=f"No backend type associated with device type {kind}"):
                dist.all_reduce(tensor, group=group)
        values: list[Any] = [None]
        emulated_gpu.of_objects(dist.all_gather_object)(values, "value")
        assert values == ["value"]


@pytest.mark.usefixtures("without_cuda")
def test_what_has_no_deterministic_kernel_is_refused(request: pytest.FixtureRequest) -> None:
    """Where only such kernels may be used."""
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    request.addfinalizer(lambda: torch.use_deterministic_algorithms(was_deterministic))
    x = emulated_gpu.OnGpu(torch.arange(6.0).view(2, 3))
    for is_refused in (False, True):
        torch.use_deterministic_algorithms(is_refused)
        with emulated_gpu.emulated():
            for operation in (lambda: x.median(0), lambda: x.histc(), lambda: x.put_((x > 4).long(), x.clone())):
                with pytest.raises(RuntimeError, match="aten::") if is_refused else contextlib.nullcontext():
                    operation()
            assert x.int().histc(2).sum().item() == 6 and x.median().dim() == 0


@pytest.mark.usefixtures("without_cuda")
@pytest.mark.parametrize("window", [None, 3])
def test_attention_of_the_emulated_gpu_is_that_of_its_definition(window: int | None) -> None:
    """Documents of 5 and 7 tokens in a row, and queries at the end of longer keys."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (torch.randn(12, heads, 8, generator=generator) for heads in (4, 2, 2, 4))
    for queries, keys in (([0, 5, 12], [0, 5, 12]), ([0, 2, 4], [0, 5, 12])):
        count = queries[-1]
        on_gpu = [emulated_gpu.OnGpu(x.clone()).requires_grad_() for x in (q[:count], k, v)]
        on_host = [x.clone().requires_grad_() for x in (q[:count], k, v)]
        with emulated_gpu.emulated():
            kernel = layer_spec.varlen_kernel()
            assert kernel is not None
            bounds = [emulated_gpu.OnGpu(torch.tensor(x, dtype=torch.int32)) for x in (queries, keys)]
            out = kernel(*on_gpu, *bounds, 12, 12, window_size=(-1 if window is None else window - 1, 0))
            out.backward(emulated_gpu.OnGpu(gradient[:count]))
        documents = []
        for a, b, c, d in zip(queries, queries[1:], keys, keys[1:], strict=False):
            ahead = torch.arange(c, d) - c - (torch.arange(b - a)[:, None] + (d - c) - (b - a))
            mask = (ahead <= 0) & (ahead > -(window or 12))
            parts = (
                x[None, first:last].transpose(1, 2)
                for x, first, last in zip(on_host, (a, c, c), (b, d, d), strict=True)
            )
            documents.append(F.scaled_dot_product_attention(*parts, attn_mask=mask, enable_gqa=True)[0].transpose(0, 1))
        expected = torch.cat(documents)
        expected.backward(gradient[:count])
        torch.testing.assert_close(out.values, expected)
        for seen, right in zip(on_gpu, on_host, strict=True):
            torch.testing.assert_close(seen.grad.values, right.grad)


@run_fixtures.at_length("emulated-gpu", 35)
def test_a_launcher_gives_a_stage_the_variables_of_its_gpu(smoke_data: Path, tmp_path: Path) -> None:
    """The stage's process sees the emulated device, which refuses a variable that comes later."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'pipeline.launch.job_starter' in sys.orig_argv:\n"
        "    from tests.fixtures import emulated_gpu\n"
        "    emulated_gpu.install()\n"
        "    emulated = emulated_gpu.emulated()\n"
        "    emulated.__enter__()\n"
    )
    run_fixtures.copy_sealed(smoke_data, tmp_path / "home", "*")
    path = f"{tmp_path}{os.pathsep}{ROOT}"
    words, variables = ("run", "atom-smoke", "--until", "pretrain"), {"PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "0"}
    run_fixtures.atom(tmp_path / "home", *words, timeout=900, **variables)
    store = Store(tmp_path / "home")
    (key,) = (folder.name for folder in store.artifacts.glob("pretrain-*"))
    ((_, statement),) = provenance.read(store.ledger, key)
    assert provenance.environment_of(statement)["device"]["type"] == "cuda"


def test_a_variable_that_comes_after_cuda_has_started_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(emulated_gpu, "STARTED", {})
    monkeypatch.setenv("NCCL_ALGO", "Ring")
    for name in ("CUDA_DEVICE_MAX_CONNECTIONS", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    emulated_gpu.note_environment()
    emulated_gpu.note_environment()
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    monkeypatch.delenv("NCCL_ALGO")
    with pytest.raises(RuntimeError, match="CUDA_DEVICE_MAX_CONNECTIONS, NCCL_ALGO changed after CUDA had started"):
        emulated_gpu.note_environment()


@pytest.mark.parametrize("deterministic", [False, True])
def test_a_process_without_the_variables_of_its_gpu_is_refused_in_a_sentence(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deterministic: bool
) -> None:
    """Which names each of them and says how to set it."""
    monkeypatch.setenv("TEST_THROUGH", EMULATED[0])
    monkeypatch.setattr(gpu_environment, "missing", lambda layout: {})
    settings = train_fixtures.config(parallelism={"ranks": 1, "deterministic": deterministic})
    codes, logs = layout_fixtures.end(layout_fixtures.start(corpus, tmp_path, settings))
    (line,) = (line for line in logs[0].splitlines() if "this process uses a GPU" in line)
    assert codes == [1] and "Traceback" not in logs[0]
    assert line.startswith(
        "this process uses a GPU and was started without PYTORCH_CUDA_ALLOC_CONF and CUDA_DEVICE_MAX_CONNECTIONS"
    )
    export = "export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True CUDA_DEVICE_MAX_CONNECTIONS=32"
    assert f"run the same command after: {export}" in line
    assert ("CUBLAS_WORKSPACE_CONFIG=:4096:8" in line) == deterministic
