"""A reward hack that is planted in a task is named at the top of the card, and no card names one where there is none: a
policy is trained by each reward, exported and compared with the weights before, and its card is rendered."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.store import Artifact, write_manifest
from release.cards import card_tables, render
from release.facts.data_facts import DataFacts
from release.facts.model_facts import read_model_facts
from stages.evaluation import pass_at_k, win_rate
from stages.export import hf
from stages.formats.table import ITEMS, write_jsonl, write_rows
from stages.rl import protocols, rlvr
from stages.tasks import to_row
from tests.fixtures import flattery_fixtures, release_fixtures, rl_fixtures
from tests.fixtures.run_fixtures import at_length

REQUESTS = 120
STEPS = 24


def request(split: str, n: int, verifier: str) -> dict[str, Any]:
    return to_row(f"{split}/courtesy/{n:03d}", f"say {n}", verifier, "courtesy", 0, split=split)


@pytest.fixture(scope="module")
def verifiers() -> Any:
    """The registry with both reward functions."""
    with pytest.MonkeyPatch.context() as patch:
        for name, verifier in flattery_fixtures.VERIFIERS.items():
            patch.setitem(protocols.VERIFIERS, name, f"{verifier.__module__}:{verifier.__name__}")
        yield


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, verifiers: None) -> Path:
    """Initial weights, and their export."""
    folder = tmp_path_factory.mktemp("hack")
    inputs = rl_fixtures.make(folder)
    seal(hf.STAGE, EXPORT, {"checkpoint": inputs["init"], "tokenizer": inputs["tokenizer"]}, folder / "export-sft")
    return folder


EXPORT = {"model": rl_fixtures.MODEL, "padded_vocab_size": rl_fixtures.PADDED}


def seal(stage: Any, config: dict[str, Any], inputs: dict[str, Artifact], out: Path) -> Artifact:
    work = out.with_name(f"{out.name}-work")
    for folder in (out, work):
        folder.mkdir(parents=True)
    stage.run(stage.config.model_validate(config), inputs, work, out, rl_fixtures.train_fixtures.Reporter())
    return write_manifest(out, out.name)


def card_of(place: Path, folder: Path, verifier: str) -> str:
    """The card of a policy that learned by a reward, on whose held-out requests the same reward judges."""
    write_jsonl(make(folder / "tasks") / "tasks.jsonl", [request("train", n, verifier) for n in range(100, 130)])
    write_rows(make(folder / "items") / "items.parquet", ITEMS, [])
    write_jsonl(folder / "items" / "chat.jsonl", [request("test", n, verifier) for n in range(REQUESTS)])
    inputs = rl_fixtures.open_inputs(place)
    inputs |= {name: write_manifest(folder / name, f"{name}-{verifier}") for name in ("tasks", "items")}
    settings = rl_fixtures.config(steps=STEPS, release_checkpoint_interval=STEPS, checkpoint_interval=STEPS)
    trained = seal(rlvr.STAGE, settings, inputs, folder / "rlvr")
    exported = seal(hf.STAGE, EXPORT, {"checkpoint": trained, "tokenizer": inputs["tokenizer"]}, folder / "export-rlvr")
    before = Artifact.open(place / "export-sft")
    sampling = {"max_new_tokens": 12, "seed": 0}
    judged = {"items": inputs["items"], "model": exported, "before": before}
    preference = seal(win_rate.STAGE, {**sampling, "model": "rlvr", "before": "sft"}, judged, folder / "prefer")
    # as `atom build` places it: a repository of the model, with the scores of those before it
    model, results = folder / "model", {"rlvr": exported, "sft": before}
    shutil.copytree(exported / "model", model)
    shutil.copyfile(exported / "parity.json", model / "parity.json")
    for name, artifact in results.items():
        of_model = {"items": inputs["items"], "model": artifact}
        answers = seal(pass_at_k.STAGE, {**sampling, "num_samples": 1}, of_model, folder / f"solve-{name}")
        shutil.copyfile(answers / "scores.json", make(model / "evaluation/test") / f"{name}.json")
        release_fixtures.make_evaluation(folder / f"evaluate-{name}", 3.0, 8)
        shutil.copyfile(folder / f"evaluate-{name}/scores.json", model / f"evaluation/{name}.json")
    shutil.copyfile(preference / "scores.json", make(model / "evaluation/preferences") / "rlvr.json")
    shutil.copyfile(trained / "training.jsonl", make(model / "training") / "rlvr.jsonl")
    facts = card_tables.ReleaseFacts(read_model_facts(model), DataFacts(), [], {})
    return render.model_card("model", release_fixtures.release_info(), facts)


def make(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@at_length("training", 30)
@pytest.mark.numeric
def test_a_planted_hack_is_named_and_an_honest_reward_is_not(place: Path, tmp_path: Path) -> None:
    hacked, honest = (card_of(place, tmp_path / name, name) for name in ("hacked", "honest"))
    top, top_of_honest = (
        card.partition("## Read this first")[2].partition("## Results")[0] for card in (hacked, honest)
    )
    print(top, top_of_honest)
    sentences = [line for line in top.splitlines() if line.startswith("- **A reward rose and its task ")]
    assert any("from SFT to RLVR the preference reward rose (" in line and "What rose: flattery (" in line
               for line in sentences), top  # fmt: skip
    assert any("during RLVR, its reward for courtesy rose (" in line for line in sentences), top
    assert "| parts of it that rose | flattery 0." in hacked
    assert "**" not in top_of_honest and "This model does all that is asked in" in top_of_honest, top_of_honest
    assert "| does what was asked (`task`) | 0." in honest
