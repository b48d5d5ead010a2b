"""Pre-training that begins with a published model: its weights, its tokenizer, its license."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from pipeline.core.errors import AtomError, CheckFailed, RecipeError
from pipeline.core.store import Artifact, Store, sha256_file
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.hub.local.store import Commit, current_time
from stages.data.acquire.readers.row_files import Parquet
from stages.export import hf
from stages.formats import tokenizer
from stages.formats.table import KEPT, content_hash, write_rows
from stages.mcore.model import Initial
from stages.models.mixture import Qwen3MoeConfig
from stages.train import imported_weights
from stages.train.checkpoint import release_checkpoint
from stages.train.pretrain import STAGE as PRETRAIN
from tests.fixtures import train_fixtures
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.hub_fixtures import Hub

pytestmark = pytest.mark.numeric

PADDED = train_fixtures.VOCAB + 16
MODEL = Qwen3MoeConfig(**train_fixtures.MODEL)
REPO = "local/base"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's repository as it is published, as far as it is read: drawn weights of seed 3."""
    folder = tmp_path_factory.mktemp("exported")
    (folder / "out").mkdir()
    inputs = {"tokenizer": train_fixtures.tokenizer(folder / "t")}
    config = hf.ExportConfig(model=MODEL, padded_vocab_size=PADDED, seed=3)
    hf.run(config, inputs, folder, folder / "out", train_fixtures.Reporter())  # type: ignore[arg-type]
    model = folder / "out/model"
    (model / "README.md").write_text("---\nlicense: other\nlicense_name: licenseref-base\n---\n\n# Base\n")
    seal(model)
    return model


def seal(model: Path) -> None:
    names = sorted(path.name for path in model.iterdir() if path.name != "SHA256SUMS")
    (model / "SHA256SUMS").write_text("".join(f"{sha256_file(model / name)}  {name}\n" for name in names))


def config(model: Path, **changes: Any) -> dict[str, Any]:
    digest = f"sha256:{sha256_file(model / 'SHA256SUMS')}"
    stated = {"repo": REPO, "digest": digest, "license": "LicenseRef-base", "folder": str(model)}
    return {**stated, "model": MODEL.model_dump(), "padded_vocab_size": PADDED, **changes}


@pytest.fixture
def imported(exported: Path, run_stage: Any) -> Artifact:
    artifact: Artifact = run_stage(imported_weights.STAGE, config(exported), {})
    return artifact


def test_the_tensors_are_those_that_were_exported(exported: Path, imported: Artifact) -> None:
    tensors = release_checkpoint.Tensors(imported / "step-000000")
    original = Initial(MODEL.shapes(PADDED), MODEL, 3)
    assert set(tensors) == set(original)
    for name, tensor in tensors.items():
        rows = train_fixtures.VOCAB if name == "embedding.word_embeddings.weight" else len(tensor)
        assert torch.equal(tensor[:rows], original[name][:rows]) and not tensor[rows:].any(), name
    about = imported.json("base.json")
    assert about["repo"] == REPO and about["license"] == "LicenseRef-base"
    assert about["files"]["model.safetensors"] == sha256_file(exported / "model.safetensors")


def test_training_goes_on_from_them(exported: Path, imported: Artifact, tmp_path: Path) -> None:
    """The first loss is that of the published model by transformers, and step 0 is published as an export again."""
    train_fixtures.make(tmp_path, {"steps": 4})
    inputs = {role: Artifact.open(tmp_path / role) for role in ("tokens", "order")} | {"init": imported}
    settings = {**train_fixtures.config(steps=4, release_checkpoint_interval=4), "padded_vocab_size": PADDED}
    for folder in ("work", "out"):
        (tmp_path / folder).mkdir()
    phase = PRETRAIN.config.model_validate(settings)
    PRETRAIN.run(phase, inputs, tmp_path / "work", tmp_path / "out", train_fixtures.Reporter())
    begin, end = (release_checkpoint.Tensors(tmp_path / f"out/step-00000{step}") for step in (0, 4))
    assert all(torch.equal(begin[name], tensor) for name, tensor in imported_tensors(imported).items())
    assert any(not torch.equal(begin[name], end[name]) for name in begin)

    from stages.train.data import Order, Shards

    order, shards = Order(inputs["order"], phase.phase), Shards(inputs["tokens"], "train")
    model = AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32)
    total, count = 0.0, 0
    for row in order.rows(1):
        for segment in row.segments:
            ids = torch.as_tensor(shards.read(segment))[None].long()
            losses = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            kept = losses[segment.loss_from :]
            total, count = total - float(kept.sum()), count + len(kept)
    assert train_fixtures.losses(tmp_path / "out")[0] == pytest.approx(total / count, rel=1e-5)


def imported_tensors(imported: Artifact) -> dict[str, torch.Tensor]:
    return dict(release_checkpoint.Tensors(imported / "step-000000").items())


def test_the_tokenizer_is_taken_over(tmp_path: Path, run_stage: Any) -> None:
    row = {name: 0 if kind == "int32" else name for name, kind in KEPT.items()}
    row |= {"split": "train", "text": "abc", "content_hash": content_hash("abc")}
    write_rows(tmp_path / "kept/notes/part-00000.parquet", KEPT, [row])
    imported = train_fixtures.tokenizer(tmp_path / "import", 300)
    (imported / "base.json").write_text(json.dumps({"repo": REPO}))
    inputs = {"dedup": Artifact("dedup", "", tmp_path, ()), "import": imported}
    with pytest.raises(RecipeError, match=r"vocab_size = 384, but the imported tokenizer has 300"):
        run_stage(tokenizer.STAGE, {"vocab_size": 384, "padded_vocab_size": 384}, inputs)
    sealed = run_stage(tokenizer.STAGE, {"vocab_size": 300, "padded_vocab_size": 320}, inputs)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (sealed / name).read_bytes() == (imported / name).read_bytes()
    assert sealed.json("stats.json")["vocab_size"] == 300


def test_the_documents_of_a_release_are_a_source(tmp_path: Path) -> None:
    """For replay beside new data: the reader takes the kept documents as they are published, each with its license."""
    row: dict[str, Any] = {name: 0 if kind == "int32" else name for name, kind in KEPT.items()}
    rows = [
        row | {"split": "train", "text": f"text {n}", "license": license} for n, license in enumerate(("MIT", "0BSD"))
    ]
    write_rows(tmp_path / "kept/notes/part-00000.parquet", KEPT, rows)
    reader = Parquet.model_validate(
        {"reader": "parquet", "path": str(tmp_path / "kept/notes"), "license_field": "license"}
    )
    documents: Any = list(reader.documents("old", 0, reader.files("old")))
    assert [(d.text, d.license) for d in documents] == [("text 0", "MIT"), ("text 1", "0BSD")]


def test_what_is_refused(exported: Path, tmp_path: Path, run_stage: Any) -> None:
    def refused(error: type[AtomError], match: str, model: Path = exported, **changes: Any) -> None:
        with pytest.raises(error, match=match):
            run_stage(imported_weights.STAGE, config(model, **changes), {})

    refused(CheckFailed, "SHA256SUMS of local/base has the digest", digest=f"sha256:{'0' * 64}")
    refused(RecipeError, "states licenseref-base; give the license", license="MIT")
    refused(
        RecipeError, f"{REPO} is published in float32, and .* set the precision of that phase to fp32", dtype="bfloat16"
    )
    wider = MODEL.model_copy(update={"moe_intermediate_size": 32}).model_dump()
    with pytest.raises(RecipeError, match="intermediate_size = 32, the model section gives 64"):
        run_stage(imported_weights.STAGE, {**config(exported), "model": wider}, {})
    changed = Path(shutil.copytree(exported, tmp_path / "changed"))
    data = bytearray((changed / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (changed / "model.safetensors").write_bytes(data)
    refused(CheckFailed, "model.safetensors of local/base is missing, or not the file", changed)
    (changed / "SHA256SUMS").unlink()
    with pytest.raises(CheckFailed, match="has no SHA256SUMS"):
        run_stage(imported_weights.STAGE, {**config(exported), "folder": str(changed)}, {})


def test_it_is_pulled_from_a_hub(hub: Hub, exported: Path, run_stage: Any, tmp_path: Path) -> None:
    repo = hub.store.create("model", REPO, False, "local")
    files = {path.name: hub.store.text_file(path.read_bytes()) for path in exported.iterdir()}
    repo.add("main", Commit(repo.branches["main"], "t", "", "local", current_time(), files))
    hub.store.save(repo)
    settings = {**config(exported), "folder": None}
    artifact = run_stage(imported_weights.STAGE, settings, {})
    assert artifact.json("base.json")["files"]
    (pulled,) = (tmp_path / "home/models").iterdir()
    assert not (pulled / "generation_config.json").exists(), "only what is read is pulled"
    hub.requests.clear()
    run_stage(imported_weights.STAGE, {**settings, "dtype": "float32"}, {})
    assert not hub.requests, "it is here"

    stated = {"repo": REPO, "digest": settings["digest"], "license": "LicenseRef-base"}
    assert imported_weights.start_from_section(REPO) == imported_weights.start_from_section(f"{REPO}@main") == stated
    with pytest.raises(AtomError, match=f"reading {REPO}@v9: the repository has no such revision"):
        imported_weights.start_from_section(f"{REPO}@v9")
    with pytest.raises(AtomError, match=r"has no SHA256SUMS, which every model that atom published has"):
        imported_weights.start_from_section(foreign(hub))


def foreign(hub: Hub) -> str:
    """A repository that atom has not published."""
    repo = hub.store.create("model", "local/foreign", False, "local")
    files = {"README.md": hub.store.text_file(b"---\nlicense: mit\n---\n")}
    repo.add("main", Commit(repo.branches["main"], "t", "", "local", current_time(), files))
    hub.store.save(repo)
    return "local/foreign"


def test_it_is_an_input_of_tokenizer_and_pretraining(tmp_path: Path) -> None:
    """Only its digest, its name and its license are in keys; without it, no key changes."""
    body = yaml.safe_load(SMOKE.read_text())

    def keys(**start: Any) -> dict[str, str]:
        path = tmp_path / "r.yaml"
        path.write_text(yaml.safe_dump({**body, **({"start_from": start} if start else {})}))
        graph = dag.compose(recipes.load(str(path)), Store(tmp_path))
        if start:
            assert graph.nodes["tokenizer"].inputs["import"] == "import" == graph.nodes["pretrain"].inputs["init"]
        return {name: node.key for name, node in graph.nodes.items()}

    begin = {"repo": REPO, "digest": f"sha256:{'1' * 64}", "license": "MIT"}
    plain, started = keys(), keys(**begin)
    same = {name for name, key in plain.items() if started[name] == key}
    assert {"dedup", "filter", "items"} <= same and not {"tokenizer", "tokenize", "pretrain", "export-base"} & same
    assert keys(**begin, revision="v0.1.0", folder="/somewhere") == started
    assert keys(**{**begin, "digest": f"sha256:{'2' * 64}"})["import"] != started["import"]
    assert json.dumps(plain) == json.dumps(keys())
