"""Packed rows: what shares a row, what is up-weighted, and that a document in company computes as it does alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.core.errors import AtomError
from pipeline.core.store import Artifact, write_manifest
from stages.data.order import order_stage, packing
from stages.data.order.chunks import ALL, LONG, SHORT
from stages.data.order.order_config import LongDocuments
from stages.formats.table import TOKENIZED, write_rows
from tests.fixtures import train_fixtures

pytestmark = pytest.mark.numeric


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=300), st.integers(40, 90), st.integers(1, 40))
def test_rows_hold_each_item_once_and_no_more_than_fits(sizes: list[int], capacity: int, rows: int) -> None:
    slots = np.array(sizes)
    items, place = packing.fill(slots, capacity, rows)
    assert len(set(items.tolist())) == len(items) and list(place) == sorted(place)
    used = np.bincount(place, slots[items], rows)
    assert used.max() <= capacity and len(used) == rows
    if slots.sum() >= 2 * rows * capacity:  # enough to fill every row: none is left empty
        assert used.min() > 0
    if len(items) < len(slots):
        assert used.sum() > 0.5 * rows * capacity


def test_rows_are_well_filled() -> None:
    rng = np.random.default_rng(0)
    slots = np.minimum(rng.lognormal(5, 1, 20000).astype(int) + 1, 2048)
    items, place = packing.fill(slots, 2048, 1500)
    assert slots[items].sum() / (1500 * 2048) > 0.97 and place.max() == 1499


def tokens(folder: Path) -> Artifact:
    for source, lengths in (("a", [30] * 60 + [200] * 4), ("b", [12] * 100)):
        rows = []
        for ordinal, length in enumerate(lengths):
            common = {"source": source, "split": "train", "content_hash": "", "license": "CC0-1.0", "bytes": 1}
            place = {"id": f"{source}/{ordinal}", "part": 0, "ordinal": ordinal}
            rows.append({**place, "tokens": length, "loss_from": 2, **common})
        write_rows(folder / "documents" / source / "part-00000.parquet", TOKENIZED, rows)
    return write_manifest(folder, "tokenize")


def config(**changes: Any) -> dict[str, Any]:
    about = {"phase": "midtrain", "mix": {"a": 0.75, "b": 0.25}, "sequence_length": 128, "rows": 4, "steps": 10}
    return {**about, "seed": 0, "pack": True, **changes}


def test_the_order_of_a_packed_phase(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    artifact = run_stage(order_stage.STAGE, config(ramp=[[2, 2]]), inputs)
    rows = pq.read_table(artifact / "part-00000.parquet").to_pylist()
    places = [(r["step"], r["row"], r["segment"]) for r in rows]
    assert places == sorted(places) and len(set(places)) == len(places) and max(p[2] for p in places) > 2
    slots: dict[tuple[int, int], int] = {}
    for r in rows:
        slots[r["step"], r["row"]] = slots.get((r["step"], r["row"]), 0) + r["length"] - 1
    assert set(slots) == {(s, r) for s in range(1, 11) for r in range(2 if s <= 2 else 4)}
    assert max(slots.values()) <= 128 and sum(slots.values()) / (36 * 128) > 0.9
    meta = artifact.json("meta.json")
    assert meta["fill"] == round(sum(slots.values()) / (36 * 128), 6) and meta["pack"] is True
    shares = {name: part["tokens"] / meta["tokens"] for name, part in meta["sources"].items()}
    assert shares == {"a": pytest.approx(0.75, abs=0.03), "b": pytest.approx(0.25, abs=0.03)}
    assert run_stage(order_stage.STAGE, config(ramp=[[2, 2]]), inputs).digest == artifact.digest
    assert run_stage(order_stage.STAGE, config(ramp=[[2, 2]], seed=1), inputs).digest != artifact.digest


def test_long_documents_are_up_weighted_and_their_shortage_is_reported(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    plain = run_stage(order_stage.STAGE, config(), inputs)
    rule = {"over": 100, "share": 0.5, "max_epochs": 100.0}
    ordered = run_stage(order_stage.STAGE, config(long_documents=rule), inputs)

    def share(artifact: Artifact) -> float:
        source_rows = [r for r in pq.read_table(artifact / "part-00000.parquet").to_pylist() if r["source"] == "a"]
        return sum(r["length"] - 1 for r in source_rows if r["length"] - 1 > 100) / sum(
            r["length"] - 1 for r in source_rows
        )

    assert share(plain) < 0.35 and share(ordered) == pytest.approx(0.5, abs=0.05)
    assert ordered.json("meta.json")["sources"]["a"]["long"]["missing_tokens"] == 0
    short = run_stage(order_stage.STAGE, config(long_documents={**rule, "max_epochs": 1.0}), inputs)
    report = short.json("meta.json")["sources"]["a"]["long"]
    quota = 0.5 * 0.75 * 4 * 10 * 128
    assert report == {
        "over": 100, "chunks": 4, "available_tokens": 4 * 128, "wanted_tokens": round(quota),
        "missing_tokens": round(quota - 4 * 128),
    }  # fmt: skip
    assert short.json("meta.json")["sources"]["b"]["long"]["chunks"] == 0


def test_the_tokens_of_long_and_short_chunks() -> None:
    assert packing.split({ALL: (3, 220)}, 1000, None) == ({ALL: 1.0}, None)
    rule = LongDocuments(over=100, share=0.5, max_epochs=2)
    shares, report = packing.split({LONG: (1, 200), SHORT: (2, 20)}, 1000, rule)
    assert shares == {LONG: 0.4, SHORT: 0.6} and report is not None and report["missing_tokens"] == 100
    shares, report = packing.split({LONG: (2, 500), SHORT: (0, 0)}, 5000, rule)
    assert shares[LONG] == 1 and report is not None, "nothing shorter can stand in"
    assert report["missing_tokens"] == 2500 - 2 * 500


def test_a_packed_phase_goes_on_as_it_was_or_packs_the_rest_anew(tmp_path: Path, run_stage: Any) -> None:
    inputs = {"tokens": tokens(tmp_path / "t")}
    artifact = run_stage(order_stage.STAGE, config(), inputs)
    meta, table = artifact.json("meta.json"), pq.read_table(artifact / "part-00000.parquet").to_pylist()
    read = {name: sum(r["source"] == name and r["step"] <= 6 for r in table) for name in ("a", "b")}
    state = {"phase": "midtrain", "step": 6, "data_position": order_stage.position(meta, read, 6)}
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint/state.json").write_text(json.dumps(state))
    inputs["continue"] = write_manifest(tmp_path / "checkpoint", "midtrain@6")
    rest = run_stage(order_stage.STAGE, config(first_step=7), inputs)
    assert pq.read_table(rest / "part-00000.parquet").to_pylist() == [r for r in table if r["step"] > 6]
    other = run_stage(order_stage.STAGE, config(first_step=7, mix={"a": 0.5, "b": 0.5}, steps=14), inputs)
    rows = pq.read_table(other / "part-00000.parquet").to_pylist()
    assert {(r["step"], r["row"]) for r in rows} == {(s, r) for s in range(7, 15) for r in range(4)}
    tokens_of = {name: sum(r["length"] - 1 for r in rows if r["source"] == name) for name in ("a", "b")}
    assert tokens_of["a"] == pytest.approx(tokens_of["b"], rel=0.1)
    assert other.json("meta.json")["walk"]["first_step"] == 7


def test_a_document_in_company_computes_as_alone(tmp_path: Path) -> None:
    """Logits and gradients of three documents in one packed row are those of three rows; positions start anew."""
    from stages.mcore.model import build, full_tensor
    from stages.models.mixture import Qwen3MoeConfig
    from stages.train import parallel
    from tests.fixtures.model_fixtures import load_tensors

    model = Qwen3MoeConfig(**train_fixtures.MODEL)
    full = {n: full_tensor(n, s, model, 0) for n, s in model.shapes(train_fixtures.VOCAB).items()}
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randint(6, train_fixtures.VOCAB, (n,), generator=generator) for n in (19, 7, 30)]
    with parallel.session(0):
        (gpt,) = build(model, train_fixtures.VOCAB, packed=True)
        load_tensors([gpt], model, train_fixtures.VOCAB, full)

        def gradients(outputs: torch.Tensor) -> list[torch.Tensor]:
            gpt.zero_grad()
            outputs.square().mean().backward()
            return [p.grad.clone() for p in gpt.parameters() if p.grad is not None]

        gpt.eval()  # no balancing loss, which does see a row as a whole
        row, starts, at = torch.cat(parts)[None], torch.zeros(1, 56, dtype=torch.long), 0
        for part in parts:
            starts[0, at : at + len(part)] = at
            at += len(part)
        where = torch.arange(56)[None]
        together = gpt(row, where, starts)
        alone = torch.cat([gpt(p[None], where[:, : len(p)], None) for p in parts], 1)
        torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-5)
        for a, b in zip(gradients(together), gradients(alone), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        unaware = gpt(row, where, None)
        assert (unaware[:, :19] - alone[:, :19]).abs().max() < 1e-5 < (unaware - alone).abs().max()


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    train_fixtures.make(folder)
    train_fixtures.pack(folder, {})
    return folder / "packed"


def test_a_packed_phase_trains_and_resumes_bit_by_bit(packed: Path, tmp_path: Path) -> None:
    pack_config = train_fixtures.config(pack=True)
    train_fixtures.pretrain(packed, tmp_path / "work", tmp_path / "out", pack_config)
    with pytest.raises(KeyboardInterrupt):
        train_fixtures.pretrain(packed, tmp_path / "w2", tmp_path / "o2", pack_config, train_fixtures.Reporter(7, 15))
    train_fixtures.pretrain(packed, tmp_path / "w2", tmp_path / "o3", pack_config)
    assert train_fixtures.digest(tmp_path / "o3") == train_fixtures.digest(tmp_path / "out")
    losses = train_fixtures.losses(tmp_path / "out")
    assert losses[-1] < losses[0] - 0.5
    lines = [json.loads(x) for x in (tmp_path / "out/training.jsonl").read_text().splitlines()]
    rows = pq.read_table(packed / "order/part-00000.parquet").to_pylist()
    assert max(x.get("tokens", 0) for x in lines) == sum(r["length"] - 1 for r in rows)
    state = json.loads((tmp_path / "out/step-000012/state.json").read_text())
    assert sum(state["data_position"]["rows"].values()) == len(rows)


def test_an_order_and_a_phase_that_differ_in_packing(packed: Path, corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(AtomError, match="was made for pack = True, not False"):
        train_fixtures.pretrain(packed, tmp_path / "w1", tmp_path / "o1", train_fixtures.config())
    with pytest.raises(AtomError, match="was made for pack = None, not True"):
        train_fixtures.pretrain(corpus, tmp_path / "w2", tmp_path / "o2", train_fixtures.config(pack=True))


def test_packed_batches(packed: Path) -> None:
    from stages.train import parallel
    from stages.train.config import TrainConfig
    from stages.train.data import Order, RankBatch, Shards

    phase = TrainConfig.model_validate(train_fixtures.config(pack=True)).phase
    rows = Order(Artifact.open(packed / "order"), phase).rows(3)
    shards = Shards(Artifact.open(packed / "tokens"), "train")
    with parallel.session(0) as ranks:
        share = RankBatch.read(rows, shards, phase.micro_rows, ranks, packed=True)
    assert len(rows) == 8 and any(len(row.segments) > 1 for row in rows)
    assert share.targets == sum(int(b.loss_mask.sum()) for b in share.micro)
    for batch, part in zip(share.micro, (rows[:4], rows[4:]), strict=True):
        for n, row in enumerate(part):
            at = 0
            for segment in row.segments:
                ids, size = shards.read(segment).tolist(), segment.length - 1
                assert batch.ids[n, at : at + size].tolist() == ids[:-1]
                assert batch.labels[n, at : at + size].tolist() == ids[1:]
                assert set(batch.starts[n, at : at + size].tolist()) == {at}
                assert batch.loss_mask[n, at : at + size].sum() == segment.targets
                at += size
            assert batch.padding[n].tolist() == [False] * at + [True] * (share.width - at)
            assert set(batch.starts[n, at:].tolist()) <= {at}
