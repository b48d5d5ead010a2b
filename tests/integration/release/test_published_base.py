"""Releases whose first phase begins with a published model: what they hold of it, and adapters on a release at length."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pipeline.core.errors import AtomError
from pipeline.core.store import sha256_file
from release.assembly import assemble
from release.assembly import build_release as builder
from release.audit.verify import verify
from release.checks.weights import published_base
from release.facts.published_tables import read_json
from release.hub.local.server import LOCAL_TOKEN, running
from release.opened_release import Release
from tests.fixtures import release_fixtures
from tests.fixtures.home_fixtures import SMOKE
from tests.fixtures.replay_fixtures import build
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed

pytestmark = pytest.mark.numeric

REPO, LICENSE = "local/published", "MIT"
INPUTS = {
    node: [{"pretrain": "import"}.get(parent, parent) for parent in parents if parent != "order-pretrain"]
    for node, parents in {"import": [], **release_fixtures.INPUTS}.items()
    if node not in ("pretrain", "order-pretrain", "export-init", "evaluate-init")
}
"""The graph of a run whose mid-training begins with a published model."""


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> assemble.BuildInput:
    make_node = release_fixtures.make_node

    def make(name: str, out: Path) -> None:
        if name != "import":
            return make_node(name, out)
        make_node("export-base", out)
        files = {path.name: sha256_file(path) for path in (out / "model").iterdir()}
        about = {"repo": REPO, "license": LICENSE, "digest": f"sha256:{'1' * 64}", "files": files}
        release_fixtures.write_json(out / "base.json", about)
        return None

    monkeypatch.setattr(release_fixtures, "make_node", make)
    return release_fixtures.build_input(tmp_path, INPUTS, parts=1)


def metadata(card: Path) -> dict[str, Any]:
    fields: dict[str, Any] = yaml.safe_load(card.read_text().split("---\n")[1])
    return fields


@at_length("release", 15)
def test_its_evidence_and_its_cards_name_the_published_model(source: assemble.BuildInput, tmp_path: Path) -> None:
    release = builder.build(source, tmp_path / "home")
    base, gates = read_json(release / "evidence/base.json"), read_json(release / "evidence/gates.json")
    assert gates["base"] == {"ok": True, "detail": f"2 files of {REPO}, sha256:{'1' * 64}"}
    assert "midtraining_keeps_bits_per_byte" in gates and "pretraining_lowers_bits_per_byte" not in gates
    weights = "model.safetensors"
    assert base["files"][weights] == sha256_file(release / f"model-base/{weights}")
    final, copy = (metadata(release / f"{name}/README.md") for name in ("model", "model-base"))
    assert (final["base_model"], final["base_model_relation"], final["license"]) == (REPO, "finetune", "apache-2.0")
    assert (copy["base_model"], copy["license"]) == (REPO, "mit") and not {"base_model_relation", "datasets"} & set(
        copy
    )
    text = (release / "model-base/README.md").read_text()
    assert f"This is a copy of the published model [{REPO}]" in text and "after pre-training" not in text
    text = (release / "model/README.md").read_text()
    assert "final model, after mid-training, of release" in text and "| measure | published base | this model |" in text
    assert "spdx.org/licenses/MIT" in (release / "model-base/LICENSE").read_text()
    bom = read_json(next((release / "evidence/standards").glob("*cdx.json")))
    osaid = {row["requirement"]: row for row in read_json(release / "evidence/standards/osaid.json")["requirements"]}
    listed = osaid["all data of training is listed, and where to get it"]
    assert not listed["met"] and f"those of {REPO}, which training began with, are not" in listed["reason"]
    models = {c["name"]: c for c in [bom["metadata"]["component"], *bom["components"]] if "pedigree" in c}
    assert models["tiny-base"]["licenses"] == [{"expression": LICENSE}]
    assert models["tiny-base"]["pedigree"]["notes"].startswith("It is a copy of these weights")

    verdict = verify(release)
    assert verdict.ok and {check.name: check.ok for check in verdict.checks}["base"] is True
    assert verify(Path(shutil.copytree(release / "model-base", tmp_path / "alone"))).ok
    second = [sys.executable, str(release / "evidence/independent_verifier.py"), str(release)]
    assert subprocess.run(second, check=False).returncode == 0

    changed = bytearray((release / f"model-base/{weights}").read_bytes())
    changed[-1] ^= 1
    (release / f"model-base/{weights}").write_bytes(changed)
    assert published_base(Release(release)).problems == [
        f"model-base/{weights} is not that of {REPO}; a release holds the published model bit for bit, so train it in "
        "the precision in which it was published"
    ]


def test_only_the_published_model_replaces_a_phase(source: assemble.BuildInput) -> None:
    without = {node: artifact for node, artifact in source.artifacts.items() if node != "import"}
    assemble.require_nodes(source.artifacts)
    with pytest.raises(AtomError, match="the release needs the artifact of order-pretrain, which is not sealed"):
        assemble.require_nodes(without)


ADAPTER = {"rank": 4, "alpha": 8, "targets": ["attention", "mlp"]}
TOLERANCE = 5e-5
"""Of a logit: PEFT adds the product of an adapter to a layer's result, and a merged model to its matrix."""
FROM_THE_HUB = """
import json, sys
from huggingface_hub import HfApi
from peft import AutoPeftModelForCausalLM
model = AutoPeftModelForCausalLM.from_pretrained("local/adapted-adapter")
assert model.peft_config["default"].base_model_name_or_path == "local/atom-smoke"
cards = {name: HfApi().model_info(f"local/{name}").card_data.to_dict() for name in sys.argv[1:]}
keys = ("base_model", "base_model_relation", "license")
print(json.dumps({name: [card.get(key) for key in keys] for name, card in cards.items()}))
"""


@at_length("release", 300)
def test_an_adapter_on_a_published_release_is_published(smoke_home: Path, tmp_path: Path) -> None:
    """By the packaged recipe, with the base from a Hub; and pulled from there by a stranger with an empty cache."""
    base = build(smoke_home, "atom-smoke", tmp_path / "base")
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, *DATA)
    with running(tmp_path / "hub") as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": LOCAL_TOKEN}
        # stages get no token, so that only a public model is pulled
        atom(home, "publish", str(base), "--to", "local", "--public", "--acknowledge", "dirty", **hub)
        begin = ("--from", "atom-smoke-adapter", "--start-from", "local/atom-smoke@v0.1.0")
        atom(home, "init", "adapted", *begin, cwd=tmp_path, **hub)
        recipe = str(tmp_path / "adapted.yaml")
        assert yaml.safe_load(Path(recipe).read_text())["start_from"] == {
            "repo": "local/atom-smoke", "digest": f"sha256:{sha256_file(base / 'model/SHA256SUMS')}",
            "license": "Apache-2.0", "revision": "v0.1.0",
        }  # fmt: skip
        atom(home, "validate", recipe)
        atom(home, "run", recipe, timeout=1800, **hub)
        atom(home, "build", recipe, timeout=1800)
        release = home / "releases/adapted-0.1.0"
        require_its_base(home, release, base)
        require_its_logits(release, base)

        atom(home, "publish", str(release), "--to", "local", **hub)
        stranger = {**hub, "HF_HOME": str(tmp_path / "stranger"), "HF_HUB_DISABLE_XET": "1"}
        names = ("adapted", "adapted-base", "adapted-adapter")
        for name in names:
            atom(tmp_path / "elsewhere", "verify", f"local/{name}", "--deep", **stranger)
        command = [sys.executable, "-c", FROM_THE_HUB, *names]
        process = subprocess.run(command, env={**os.environ, **stranger}, capture_output=True, text=True, check=False)
        assert process.returncode == 0, process.stderr
        assert json.loads(process.stdout.splitlines()[-1]) == {
            "adapted": ["local/atom-smoke", "finetune", "apache-2.0"],
            "adapted-base": ["local/atom-smoke", None, "apache-2.0"],
            "adapted-adapter": ["local/atom-smoke", "adapter", "apache-2.0"],
        }
    assert ": bitwise" in atom(home, "replay", str(release), "sft").stdout


def require_its_base(home: Path, release: Path, base: Path) -> None:
    verdict = json.loads(atom(home, "verify", str(release), "--deep", "--json").stdout)
    checks = {check["name"]: check["ok"] for check in verdict["checks"]}
    assert verdict["ok"] and checks["base"] is checks["variant_weights"] is True
    stated = read_json(release / "variant-adapter/base.json")["files"]
    assert stated == {name: sha256_file(base / "model" / name) for name in stated}, "those of the published model"
    rows = json.loads(atom(home, "verify", str(release), "--openness", "--json").stdout)["openness"]
    openness = {row["name"]: row for row in rows}
    assert openness["every document"]["answer"] == "P" and openness["executable replay of every phase"]["answer"] == "Y"
    assert "trained from  local/atom-smoke, Apache-2.0," in atom(home, "show", str(release)).stdout
    assert "of sft" in atom(home, "trace", str(release), "--step", "1").stdout


def require_its_logits(release: Path, base: Path) -> None:
    """The adapter on the base, by PEFT, and merged by PEFT, against the merged model."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.randint(0, 384, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(release / "model", dtype=torch.float32)(ids).logits
        published = AutoModelForCausalLM.from_pretrained(base / "model", dtype=torch.float32)
        plain = published(ids).logits
        wrapped = PeftModel.from_pretrained(published, release / "variant-adapter")
        adapted = wrapped(ids).logits
        unloaded = wrapped.merge_and_unload()(ids).logits
    differences = [float((logits - merged).abs().max()) for logits in (adapted, unloaded, plain)]
    print(f"PEFT {differences[0]:.2e}, merged by PEFT {differences[1]:.2e}, without the adapter {differences[2]:.2e}")
    assert max(differences[:2]) < TOLERANCE and differences[2] > 0.1


@at_length("release", 150)
def test_an_adapter_on_a_phase_of_its_run_is_trained_again(smoke_home: Path, tmp_path: Path) -> None:
    home, body = tmp_path / "home", yaml.safe_load(SMOKE.read_text())
    copy_sealed(smoke_home, home, "*")
    del body["rlvr"]
    body |= {"name": "adapted", "sft": {**body["sft"], "lora": ADAPTER}}
    recipe = tmp_path / "adapted.yaml"
    recipe.write_text(yaml.safe_dump(body))
    atom(home, "run", str(recipe), timeout=1800)
    atom(home, "build", str(recipe), timeout=1800)
    release = home / "releases/adapted-0.1.0"
    card = metadata(release / "variant-adapter/README.md")
    assert (card["base_model"], card["base_model_relation"]) == ("local/adapted-mid", "adapter")
    assert ": bitwise" in atom(home, "replay", str(release), "sft").stdout
