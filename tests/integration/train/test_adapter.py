"""Low-rank adapters trained by this project: the base stays, PEFT reads them, and every layout trains the same."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.assembly import build_release as builder
from release.assembly import collect
from release.audit.verify import verify
from stages.export import hf
from stages.export.variants import adapter_files
from stages.mcore.lora import Lora
from stages.models.mixture import Qwen3MoeConfig
from stages.train.checkpoint import release_checkpoint
from stages.train.config import SftConfig
from tests.fixtures import layout_fixtures, train_fixtures, variant_fixtures
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.run_fixtures import at_length

pytestmark = pytest.mark.numeric

LORA: dict[str, Any] = {"rank": 4, "alpha": 8, "targets": ["attention", "mlp"]}
OPTIMIZER = {"lr": 1e-2, "final_lr": 1e-3, "warmup_steps": 3, "weight_decay": 0.0}
MODEL = Qwen3MoeConfig(**train_fixtures.MODEL)
LAST = release_checkpoint.name_of(train_fixtures.PHASE["steps"])
PEFT_TOLERANCE = 1e-5
"""Of a logit: PEFT adds the product of an adapter to a layer's result, and a merged model to its matrix."""


def settings(**phase: Any) -> dict[str, Any]:
    return train_fixtures.config(**{"lora": LORA, "optimizer": OPTIMIZER, **phase})


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens and order, and a base that has been trained a little."""
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pretrain(folder, folder / "work", folder / "init", train_fixtures.config())
    write_manifest(folder / "init", "pretrain-test")
    return folder


@pytest.fixture(scope="module")
def adapter(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("adapter")
    train_fixtures.pretrain(corpus, folder / "work", folder / "out", settings())
    return write_manifest(folder / "out", "sft-test")


def test_only_the_adapter_is_trained_and_sealed(corpus: Path, adapter: Artifact) -> None:
    base = Artifact.open(corpus / "init")
    shapes = Lora(**LORA).shapes(MODEL.shapes(train_fixtures.VOCAB))
    tensors = release_checkpoint.Tensors(adapter / LAST)
    assert tensors.shapes() == shapes and all("lora_" in name for name in shapes)
    begin = release_checkpoint.Tensors(adapter / release_checkpoint.name_of(0))
    assert all(not tensor.any() for name, tensor in begin.items() if name.endswith("lora_B"))
    assert all(tensor.any() for tensor in tensors.values())
    summary = adapter.json("summary.json")
    assert summary["base"] == {"artifact": base.key, "digest": base.digest}
    assert summary["lora"]["parameters"] == sum(torch.Size(shape).numel() for shape in shapes.values())
    # it begins as its base, which ends with the same held-out rows, and learns
    before, after = (train_fixtures.losses(folder, "heldout_loss") for folder in (base.path, adapter.path))
    assert after[0] == pytest.approx(before[-1], rel=1e-6) and after[-1] < after[0] - 0.1


@at_length("training", 35)
def test_peft_computes_the_merged_model(corpus: Path, adapter: Artifact, tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    inputs = {"tokenizer": train_fixtures.tokenizer(tmp_path / "tokenizer")}
    base = {"checkpoint": Artifact.open(corpus / "init")}
    for name, entries, lora in (
        ("base", base, None),
        ("merged", {"checkpoint": adapter, "base": base["checkpoint"]}, LORA),
    ):
        config = hf.ExportConfig(model=MODEL, padded_vocab_size=train_fixtures.VOCAB, lora=lora)
        (tmp_path / name).mkdir()
        hf.run(config, inputs | entries, tmp_path, tmp_path / name, train_fixtures.Reporter())  # type: ignore[arg-type]
    folders = [tmp_path / name / "model" for name in ("base", "merged")]
    tensors = release_checkpoint.Tensors(adapter / LAST)
    peft = tmp_path / "peft"
    adapter_files.write(tensors, Lora(**LORA), MODEL, train_fixtures.VOCAB, folders[0], "local/base", peft)
    difference, explained = adapter_files.largest_difference(folders[0], peft, folders[1])
    assert difference <= explained < 1e-5
    assert json.loads((peft / "adapter_config.json").read_text())["base_model_name_or_path"] == "local/base"
    assert (peft / "adapter_model.safetensors").stat().st_size < (
        adapter / LAST / "optimizer.safetensors"
    ).stat().st_size

    ids = torch.randint(0, train_fixtures.VOCAB, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        models = [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) for folder in folders]
        plain, merged = (model(ids).logits for model in models)
        wrapped = PeftModel.from_pretrained(models[0], peft)
        adapted = wrapped(ids).logits
        unloaded = wrapped.merge_and_unload()(ids).logits
    print(
        f"PEFT {float((adapted - merged).abs().max()):.2e}, merged by PEFT {float((unloaded - merged).abs().max()):.2e}"
    )
    assert (adapted - merged).abs().max() < PEFT_TOLERANCE and (unloaded - merged).abs().max() < PEFT_TOLERANCE
    assert (plain - merged).abs().max() > 0.1

    for name in ("config.json", "model.safetensors"):
        shutil.copyfile(folders[1] / name, tmp_path / name)
    with pytest.raises(CheckFailed, match="is an adapter of other weights"):
        list(adapter_files.combined(tmp_path, peft))


@at_length("training", 12)
def test_a_kill_leaves_the_same_bytes(corpus: Path, adapter: Artifact, tmp_path: Path) -> None:
    killed = train_fixtures.fresh(corpus, tmp_path, at=7, number=signal.SIGKILL, settings=settings())
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors[-2000:]
    report = train_fixtures.Reporter()
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", settings(), report)
    assert report.notes[0] in (f"pretrain: going on after step {step}" for step in (4, 6))  # 6 may be half written
    (tmp_path / "out/manifest.json").write_bytes((adapter / "manifest.json").read_bytes())
    assert train_fixtures.digest(tmp_path / "out") == train_fixtures.digest(adapter.path)


@pytest.mark.parametrize(("recompute", "tolerance"), [("selective", 1e-5), ("layer", 0)])
def test_what_is_computed_again_has_gradients(
    corpus: Path, adapter: Artifact, tmp_path: Path, recompute: str, tolerance: float
) -> None:
    """Their input is that of a frozen table, which requires none. Modules alone may add gradients in another order."""
    again = settings(parallelism={"recompute": recompute})
    train_fixtures.pretrain(corpus, tmp_path / "work", tmp_path / "out", again)
    losses = train_fixtures.losses(adapter.path)
    assert train_fixtures.losses(tmp_path / "out") == pytest.approx(losses, rel=tolerance, abs=0)


ATTENTION = {**LORA, "targets": ["attention"]}
LAYOUTS = {
    "TP2+SP": {"tp": 2},
    "EP2": {"ep": 2},
    "DP2": {},
    "PP2": {"pp": 2},
    "CP2": {"cp": 2},
    "TP2 EP2 ETP1": {"tp": 2, "ep": 2, "etp": 1},
}


@at_length("training", 60)
def test_every_layout_trains_the_same_adapter(tmp_path: Path) -> None:
    train_fixtures.make(tmp_path, {"batch": layout_fixtures.BATCH})
    runs = {}
    for name, layout in LAYOUTS.items():
        lora = ATTENTION if name == "TP2+SP" else LORA
        one = layout_fixtures.settings_of({}, 1, lora=lora, optimizer=OPTIMIZER)
        runs[name] = (tmp_path, layout_fixtures.in_layout(one, layout, 2))
    alone = {
        "attention": (tmp_path, layout_fixtures.settings_of({}, 1, lora=ATTENTION, optimizer=OPTIMIZER)),
        "all": (tmp_path, layout_fixtures.settings_of({}, 1, lora=LORA, optimizer=OPTIMIZER)),
    }
    reference = layout_fixtures.compare_runs(alone, 1, tmp_path / "one.json")
    for name, steps in layout_fixtures.compare_runs(runs, 2, tmp_path / "two.json").items():
        layout_fixtures.agree(steps, reference["attention" if name == "TP2+SP" else "all"], 1e-5, name)


@pytest.mark.parametrize(
    ("phase", "sentence"),
    [
        (
            {"parallelism": {"ranks": 2, "tp": 2}},
            "etp = 2 splits each expert, whose adapters would be summed over no rank",
        ),
        ({"precision": "fp8-tensorwise"}, "precision = fp8-tensorwise does not train lora"),
        ({"lora": {**LORA, "rank": 17}}, "lora.rank = 17 is more than the 16 of the narrowest target"),
    ],
)
def test_what_cannot_be_trained_is_refused(phase: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        SftConfig.model_validate(settings(**phase))


def test_a_recipe_trains_an_adapter_on_a_phase_or_on_a_release(tmp_path: Path) -> None:
    body = yaml.safe_load(SMOKE.read_text())
    body["evaluation"]["waived_gates"] = {}  # of phases that some of these recipes leave out
    lora = {"rank": 4, "alpha": 8}

    def graph(**changes: Any) -> dag.Graph:
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({k: v for k, v in {**body, **changes}.items() if v is not None}))
        return dag.compose(recipes.load(str(path)), Store(tmp_path))

    plain = graph()
    nodes = graph(sft={**body["sft"], "lora": lora}, rlvr=None).nodes
    assert nodes["export-sft"].inputs["base"] == "midtrain" and nodes["export-sft"].inputs["checkpoint"] == "sft"
    changed = {name for name, node in plain.nodes.items() if name in nodes and node.key != nodes[name].key}
    assert "sft" in changed and not {"midtrain", "order-sft", "export-mid", "evaluate-mid"} & changed
    with pytest.raises(RecipeError, match="sft.lora trains an adapter, and rlvr would train the weights"):
        graph(sft={**body["sft"], "lora": lora})

    begin = {"repo": "local/base", "digest": f"sha256:{'1' * 64}", "license": "MIT"}
    on_release = graph(sft={**body["sft"], "lora": lora}, rlvr=None, pretrain=None, midtrain=None, start_from=begin)
    nodes = on_release.nodes
    with pytest.raises(AtomError, match="acquire-docstrings and 2. more stages are not sealed yet"):
        collect.build_input(on_release, Store(tmp_path))
    with pytest.raises(AtomError, match="trains no model after pretrain, and a release has one beside its base"):
        collect.build_input(graph(midtrain=None, rlvr=None, sft=None, start_from=begin), Store(tmp_path))
    assert nodes["sft"].inputs["init"] == nodes["export-base"].inputs["checkpoint"] == "import"
    assert nodes["export-sft"].inputs["base"] == "import" and "pretrain" not in nodes and "export-init" not in nodes
    with pytest.raises(RecipeError, match="pretrain is missing, and only a recipe with start_from can do without"):
        graph(pretrain=None)
    with pytest.raises(RecipeError, match="the recipe trains nothing"):
        graph(
            pretrain=None,
            midtrain=None,
            sft=None,
            rlvr=None,
            start_from=begin,
            evaluation={**body["evaluation"], "chat": None},
        )
    assert json.dumps({n: x.key for n, x in graph().nodes.items()}) == json.dumps(
        {n: x.key for n, x in plain.nodes.items()}
    )


@at_length("release", 45)
def test_a_release_holds_the_adapter_and_proves_that_it_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    release = builder.build(variant_fixtures.adapter_input(tmp_path, monkeypatch), tmp_path / "home")
    folder = release / "variant-adapter"
    loss, card = json.loads((folder / "loss.json").read_text()), (folder / "README.md").read_text()
    assert loss["divergence"]["value"] < 1e-6 and loss["bytes"]["variant"] < loss["bytes"]["original"] / 2
    assert "base_model: local/tiny-base\n" in card and "base_model_relation: adapter" in card and "PeftModel" in card
    (run,) = (run for run in json.loads((release / "evidence/runtimes.json").read_text()) if run["runtime"] == "PEFT")
    print(run)
    assert run["status"] == "passed" and run["largest_difference"] < 1e-4
    checks = {check.name: check for check in verify(release, deep=True).checks}
    assert not [check.wrong for check in checks.values() if check.ok is False]
    assert checks["variant_weights"].ok is True
    assert verify(Path(shutil.copytree(folder, tmp_path / "alone"))).ok

    tensors = load_file(folder / "adapter_model.safetensors")
    name = next(name for name in tensors if name.endswith("q_proj.lora_B.weight"))
    tensors[name][0, 0] += 0.01
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    builder.write_checksums(release)
    (wrong,) = (check.wrong for check in verify(release, deep=True).checks if check.name == "variant_weights")
    assert "variant-adapter is no adapter of model" in wrong[0] and "differs from" in wrong[0]
