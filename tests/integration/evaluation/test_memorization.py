"""What a model gives away: one that is trained by a known order regurgitates what it reads often, and nothing else."""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, Store, write_manifest
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from release.cards import tables
from release.checks.cards import model_card
from release.checks.scores import score_problems
from release.facts.model_facts import read_model_facts
from stages.data.order import tokenize_stage
from stages.data.order.shards import first_tokens, shard_name
from stages.evaluation import memorization
from stages.formats.table import KEPT, ORDER, content_hash, read_table, write_rows
from tests.fixtures import chat_fixtures, release_fixtures
from tests.fixtures.recipe_fixtures import write

STEPS = 125
CONFIG = {"documents": 10, "prefix_tokens": 16, "continuation_tokens": 16, "seed": 0}
OFTEN, ONCE = "prose/0", [f"prose/{n}" for n in range(1, 6)]
ROW = release_fixtures.CONTEXT


def kept() -> Iterator[tuple[str, str, str, int]]:
    """(id, text, split, characters without loss) of each document: of prose the last two cannot be drawn."""
    rng = random.Random(0)
    for n in range(9):
        text = "".join(rng.choices(string.ascii_lowercase, k=90))
        yield f"prose/{n}", text, "train" if n < 6 else "heldout", 0
    yield "prose/short", "too short", "train", 0
    yield "prose/asked", text, "train", 40


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    """Token shards, an order that reads one document in each step and others once, an untrained `model`, and `trained`,
    one that was trained in that order."""
    folder = tmp_path_factory.mktemp("memorization")
    rows: dict[str, list[dict[str, Any]]] = {"prose": []}
    for id, text, split, prompt in kept():
        row = {"id": id, "text": text, "license": "CC0-1.0", "origin": "", "content_hash": content_hash(text)}
        rows[id.split("/")[0]].append({**row, "source": id.split("/")[0], "prompt_chars": prompt, "split": split})
    for source, documents in rows.items():
        write_rows(folder / f"dedup/kept/{source}/part-00000.parquet", KEPT, documents)
    (folder / "tokenizer").mkdir()
    release_fixtures.save_tokenizer(folder / "tokenizer")
    sealed = {role: write_manifest(folder / role, role) for role in ("dedup", "tokenizer")}
    tokens = chat_fixtures.sealed(tokenize_stage.STAGE, {}, sealed, folder / "tokens")
    model = chat_fixtures.model(folder / "export", 1)
    order = write_order(folder / "order", tokens)
    trained = train(model, tokens, read_order(order), folder / "trained")
    return {"tokens": tokens, "order-pretrain": order, "model": model, "trained": trained}


def write_order(folder: Path, tokens: Artifact) -> Artifact:
    places = chat_fixtures.table(tokens, "documents/prose/part-00000.parquet")
    rows: list[dict[str, Any]] = []
    for step in range(1, STEPS + 1):
        read = [row for row in places if row["id"] == OFTEN]
        read += [row for row in places if row["split"] == "train"] if step == 1 else []
        for number, row in enumerate(read):
            place = {name: row[name] for name in ("source", "part", "ordinal", "id")}
            length, loss_from = min(row["tokens"], ROW), max(row["loss_from"] - 1, 0)
            segment = {"step": step, "row": number, "segment": 0, **place}
            rows.append({**segment, "offset": 0, "length": length, "loss_from": loss_from})
            rows.append({**segment, "row": len(read) + number, "offset": ROW - 1, "length": 2, "loss_from": 0})
    write_rows(folder / "part-00000.parquet", ORDER, rows)
    return write_manifest(folder, "order-pretrain")


def read_order(order: Artifact) -> list[list[dict[str, Any]]]:
    rows = [row for row in chat_fixtures.table(order, "part-00000.parquet") if row["length"] == ROW]
    return [[row for row in rows if row["step"] == step] for step in range(1, STEPS + 1)]


def train(model: Artifact, tokens: Artifact, steps: Sequence[Sequence[dict[str, Any]]], out: Path) -> Artifact:
    """An export of the model after one update for each step of the order."""
    import torch
    from transformers import AutoModelForCausalLM

    trained = AutoModelForCausalLM.from_pretrained(model / "model", dtype=torch.float32)
    optimizer = torch.optim.Adam(trained.parameters(), lr=1e-2)
    for rows in steps:
        read = [first_tokens(tokens.path, shard_name("train", row["source"], 0), [row["ordinal"]], ROW)
                for row in rows]  # fmt: skip
        ids = torch.cat([torch.from_numpy(row) for row in read])
        trained(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    trained.save_pretrained(out / "model")
    text = (out / "model/config.json").read_text()
    (out / "model/config.json").write_text(text.replace('"num_local_experts"', '"num_experts"'))
    release_fixtures.save_tokenizer(out / "model")
    return write_manifest(out, "export-trained")


def measure(run_stage: Any, inputs: dict[str, Artifact], model: str, work: Path | None = None, **changes: Any) -> Any:
    """The artifact of the stage for `model` or `trained`."""
    given = {"tokens": inputs["tokens"], "order-pretrain": inputs["order-pretrain"], "model": inputs[model]}
    return run_stage(memorization.STAGE, CONFIG | changes, given, work)


def test_a_document_that_is_read_often_comes_out_and_no_other(run_stage, inputs, tmp_path: Path) -> None:
    artifact = measure(run_stage, inputs, "trained", tmp_path)
    rows = {row["id"]: row for row in chat_fixtures.table(artifact, "documents.parquet")}
    assert {id: rows[id]["times_seen"] for id in (OFTEN, *ONCE, "prose/6")} == {
        OFTEN: STEPS + 1,
        "prose/6": 0,
    } | dict.fromkeys(ONCE, 1)
    assert not {"prose/short", "prose/asked"} & rows.keys()
    prose = artifact.json("scores.json")["by_source"]["prose"]
    assert {seen: (row["identical"]["value"], row["identical"]["n"]) for seen, row in prose.items()} == {
        "0": (0, 3),
        "1": (0, 5),
        "64-127": (1, 1),
    }


def test_an_untrained_model_gives_nothing_away(run_stage, inputs, tmp_path: Path) -> None:
    first, second = (measure(run_stage, inputs, "model", tmp_path / name) for name in ("a", "b"))
    (tmp_path / "b/documents-prose.json").unlink()
    third = measure(run_stage, inputs, "model", tmp_path / "b")
    assert first.digest == second.digest == third.digest
    documents = chat_fixtures.table(first, "documents.parquet")
    assert not any(row["matching"] == row["continuation"] for row in documents)
    assert memorization.summary(documents) == first.json("scores.json")  # type: ignore[arg-type]


def test_the_lottery_draws_some_of_each_stratum_by_the_seed(run_stage, inputs) -> None:
    ids = {}
    for seed in (0, 1):
        artifact = measure(run_stage, inputs, "model", documents=2, seed=seed)
        rows = chat_fixtures.table(artifact, "documents.parquet")
        ids[seed] = {row["id"] for row in rows if row["times_seen"] == 1}
        assert OFTEN in {row["id"] for row in rows} and len(ids[seed]) == 2 and ids[seed] <= set(ONCE)
    assert ids[0] != ids[1]


def test_a_sample_of_the_documents_is_counted_as_among_all(inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    config = memorization.MemorizationConfig.model_validate(CONFIG)
    everything = memorization._count_readings(config, inputs)
    monkeypatch.setattr(memorization, "CANDIDATES", 5)  # of eight documents
    sample = memorization._count_readings(config, inputs)
    assert sample and len(sample) < len(everything)
    assert all(place in everything for place in sample)


def test_matching_tokens_are_those_of_a_greedy_continuation(inputs) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.generation.transformers_model import TransformersModel

    model = AutoModelForCausalLM.from_pretrained(inputs["trained"] / "model", dtype=torch.float32).eval()
    ids = first_tokens(inputs["tokens"].path, shard_name("train", "prose", 0), range(6), 40)
    expected = []
    for row in torch.from_numpy(ids):
        drawn = model.generate(row[None, :16], do_sample=False, max_new_tokens=24, eos_token_id=None, pad_token_id=0)
        expected.append(next((n for n in range(24) if drawn[0, 16 + n] != row[16 + n]), 24))
    oracle = TransformersModel(model, AutoTokenizer.from_pretrained(inputs["trained"] / "model"))
    assert oracle.matching_tokens(ids.tolist(), 16) == expected and max(expected) == 24


def test_documents_that_are_too_short_are_one_sentence(run_stage, inputs) -> None:
    with pytest.raises(AtomError, match="the orders read no document of 96 tokens whose first 80 are all"):
        measure(run_stage, inputs, "model", prefix_tokens=80)


def test_strata_and_the_interval_by_hand() -> None:
    assert [memorization.stratum(n) for n in (0, 1, 2, 3, 4, 7, 8, 1000)] == [
        "0", "1", "2-3", "2-3", "4-7", "4-7", "8-15", "512-1023",
    ]  # fmt: skip
    rows: Any = [{"source": "a", "times_seen": n, "prefix": 4, "continuation": 4, "matching": matching}
                 for n, matching in ((9, 4), (8, 1), (15, 4), (0, 2))]  # fmt: skip
    scores = memorization.summary(rows)
    assert list(scores["by_times_seen"]) == ["0", "8-15"] and scores["by_source"] == {"a": scores["by_times_seen"]}
    often, never = scores["by_times_seen"]["8-15"], scores["by_times_seen"]["0"]
    assert often["identical"]["value"] == pytest.approx(2 / 3) and often["matching"] == {"value": 3, "se": 1, "n": 3}
    assert (often["identical"]["low"], often["identical"]["high"]) == pytest.approx((0.2077, 0.9385), abs=1e-4)
    assert never["matching"] is None and "| a | 0 (held out) | 1 |" in "\n".join(tables.memorization(scores))


def test_a_card_says_what_was_not_measured() -> None:
    (line,) = tables.memorization(None)
    assert line.endswith("not measured.") and "toxicity" in line


def test_a_release_holds_the_tables_and_its_card_the_figures(copy: Path) -> None:
    card = (copy / "model/README.md").read_text()
    assert "| prose | 2 to 3 | 7 | 0.571 (0.250 to 0.842) |" in card
    assert tables.NOT_MEASURED in (copy / "model-base/README.md").read_text()
    assert score_problems(copy / "dataset/evaluation") == []
    table = copy / "dataset/evaluation/memorization/mid/documents.parquet"
    rows = [row | {"matching": 0} for row in read_table(table).to_pylist()]
    write_rows(table, memorization.DOCUMENTS, rows)
    (problem,) = score_problems(copy / "dataset/evaluation")
    assert problem == "evaluation/memorization/mid/scores.json is not what its tables give"


def test_a_changed_figure_on_the_card_is_found(copy: Path) -> None:
    card = copy / "model/README.md"
    card.write_text(card.read_text().replace("0.571 (0.250 to 0.842)", "0.071 (0.250 to 0.842)"))
    assert any(
        "0.571 (0.250 to 0.842)" in problem
        for problem in model_card(copy / "model", read_model_facts(copy / "model")).problems
    )


def test_a_recipe_names_the_models_and_their_orders(tmp_path: Path) -> None:
    section = {"prefix_tokens": 16, "continuation_tokens": 16}
    nodes = compose(tmp_path, section).nodes
    measured = {name: node for name, node in nodes.items() if node.stage.name == "memorization"}
    assert set(measured) == {"memorization-rlvr"}
    orders = {f"order-{phase}" for phase in ("pretrain", "midtrain", "sft", "rlvr")}
    assert set(measured["memorization-rlvr"].inputs) == {"model", "tokens", *orders}
    assert not any(node.stage.name == "memorization" for node in compose(tmp_path, None).nodes.values())
    with pytest.raises(
        RecipeError, match="compares 132 tokens of a document .* and no row of training has more than 129"
    ):
        compose(tmp_path, {"prefix_tokens": 100, "continuation_tokens": 32})


def compose(folder: Path, section: dict[str, Any] | None) -> Any:
    return dag.compose(recipes.load(write(folder / "r.yaml", evaluation__memorization=section)), Store(folder))
