"""Traces and checks of a release with an order that is a function, against a search of every row by DuckDB."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.store import Artifact
from release import tracing
from release.checks import documents, order
from release.facts.published_tables import read_json
from release.layout import all_files, disposition_files, kept_files, token_files
from release.opened_release import Release
from release.tracing.documents import find_documents, find_uses
from release.tracing.release_data import ReleaseData, steps_by_file
from stages.data.order import order_stage
from stages.data.order.computed_order import ComputedOrder, read_indexes
from stages.data.order.order_config import DataCursor, OrderConfig
from stages.formats.table import order_files, write_table
from tests.fixtures.corpus_fixtures import make_corpus
from tests.fixtures.run_fixtures import RecordingReport, at_length

ROWS = 256
PHASES = {
    "pretrain": {"mix": {"web": 0.6, "code": 0.4}, "sequence_length": 16},
    "midtrain": {
        "mix": {"web": 0.8, "code": 0.2}, "sequence_length": 48, "pack": True, "block_rows": 4096,
        "long_documents": {"over": 32, "share": 0.2, "max_epochs": 4.0},
    },
}  # fmt: skip
SIZES = [20_000, pytest.param(1_000_000, marks=at_length("data-plane", 120))]


OUTSIDE = """
    SELECT DISTINCT step, row FROM read_parquet($orders) AS used
    LEFT JOIN (SELECT * FROM read_parquet($files) WHERE split = 'train') AS document USING (source, part, ordinal)
    WHERE document.id IS NULL OR document.id != used.id OR used."offset" + length > tokens
"""


def search(sql: str, files: list[Path], **tables: list[Path]) -> list[dict[str, Any]]:
    """The rows of a search through every row of some tables, by DuckDB."""
    parameters = {name: list(map(str, paths)) for name, paths in {"files": files, **tables}.items()}
    with duckdb.connect() as database:
        rows: list[dict[str, Any]] = database.sql(sql, params=parameters).to_arrow_table().to_pylist()
    return rows


@pytest.fixture(scope="module", params=SIZES)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset folder of a release, with an order of the stage. Tests that alter it copy the altered files back."""
    size, folder = request.param, tmp_path_factory.mktemp("release")
    make_corpus(folder / "dataset", size, max(2, size // 10_000))
    tokens = Artifact("tokenize", "", folder / "dataset/tokens", ())
    shutil.rmtree(folder / "dataset/order")
    for phase, settings in PHASES.items():
        config = OrderConfig(phase=phase, rows=ROWS, steps=size // ROWS, seed=0, **settings)  # type: ignore[arg-type]
        out = folder / "dataset/order" / phase
        out.mkdir(parents=True)
        order_stage.run(config, {"tokens": tokens}, folder / "work" / phase, out, RecordingReport())
    return folder / "dataset"


def tables(data: Path) -> dict[str, list[Path]]:
    """The files of each table of a release."""
    return {
        "dispositions": all_files(disposition_files(data)),
        "kept": all_files(kept_files(data)),
        "tokens": all_files(token_files(data)),
        "order": order_files(data / "order/pretrain"),
    }


def test_traces_are_those_of_a_search_of_every_row(data: Path, tmp_path: Path) -> None:
    files = tables(data)
    ids = [
        row["id"]
        for row in search("SELECT id FROM read_parquet($files) ORDER BY hash(id) LIMIT 200", files["dispositions"])
    ]
    among = "FROM read_parquet($files) WHERE id IN ({})".format(", ".join(f"'{id}'" for id in ids))
    traced = find_documents(ReleaseData.locate(data), ids)
    fates = search(f"SELECT * {among}", files["dispositions"])
    assert len(fates) == len(traced) == 200
    for row in fates:
        (fate,) = traced[row["id"]].fates
        assert {name: getattr(fate, name, row["id"]) for name in row} == row
    for phase in PHASES:
        rows = search(
            f'SELECT id, step, row, segment, "offset", length {among} ORDER BY id, step, row, segment',
            order_files(data / "order" / phase),
        )
        assert len(rows) > 100
        assert [tuple(row.values()) for row in rows] == [
            (id, use.step, place.row, place.segment, place.offset, place.length)
            for id in sorted(ids)
            for use in traced[id].uses
            if use.phase == phase
            for place in use.rows
        ]
    assert find_uses(ReleaseData.locate(data), ids) == {id: each.uses for id, each in traced.items() if each.uses}
    assert tracing.trace_document(data, ids[0]) == traced[ids[0]]

    config = OrderConfig.model_validate({
        name: value for name, value in read_json(data / "order/pretrain/meta.json").items()
        if name in OrderConfig.model_fields
    })  # fmt: skip
    indexes = read_indexes(config, data / "tokens", tmp_path)
    computed = ComputedOrder(config, indexes, DataCursor(1, config.seed), tmp_path)
    for row in search(f"SELECT id, source, part, ordinal {among} AND split = 'train'", files["tokens"]):
        steps = computed.steps_of(row["source"], row["part"], row["ordinal"])
        assert steps == [use.step for use in traced[row["id"]].uses if use.phase == "pretrain"]
    for step in (1, config.steps // 3, config.steps):
        rows = search(
            f"SELECT id, row FROM read_parquet($files) WHERE step = {step} ORDER BY row, segment", files["order"]
        )
        traced_rows = [(segment.id, segment.row) for segment in tracing.trace_step(data, "pretrain", step).segments]
        assert traced_rows == [(row["id"], row["row"]) for row in rows]
        assert computed.documents_of(step)["id"].to_pylist() == [row["id"] for row in rows]


def test_few_rows_are_read_of_an_order_that_is_a_function(data: Path, tmp_path: Path) -> None:
    (row,) = search(
        "SELECT id, source, part FROM read_parquet($files) WHERE split = 'train' ORDER BY hash(id) LIMIT 1",
        all_files(token_files(data)),
    )
    places = {row["id"]: (row["source"], row["part"])}
    for phase in PHASES:
        folder = data / "order" / phase
        steps = steps_by_file(data, folder, places)
        assert steps is not None and len(steps) < len(order_files(folder)) / 2, phase
        meta = read_json(folder / "meta.json")
        for name, changed in (
            ("later", {"function": {"version": 999}}),
            ("other", {"sources": {source: {"chunks": 1} for source in meta["sources"]}}),
            ("broken", {"mix": "web"}),
            ("broken too", {"function": [], "parts": [{"start": 3}], "end": {}, "pack": True}),
            ("long", {"steps": 10**8, "rows": 10**6, "ramp": [], "pack": False}),
            ("short", {"parts": meta["parts"][:-1], "pack": True, "end": {}}),
        ):
            (tmp_path / f"{phase}-{name}").mkdir()
            (tmp_path / f"{phase}-{name}/meta.json").write_text(json.dumps(meta | changed))
            assert steps_by_file(data, tmp_path / f"{phase}-{name}", places) is None, "its rows are searched"


def test_checks_find_what_a_search_of_every_row_finds(data: Path) -> None:
    files, subject = tables(data), Release(data, "dataset")
    for check in (order.segments, documents.dispositions, documents.content_hashes):
        assert check(subject).problems == []
    assert search(OUTSIDE, files["tokens"], orders=files["order"]) == []
    rng = random.Random(0)
    changes = {
        files["order"][1]: {"ordinal": 10**6, "id": "web/nothing", "length": 400},
        files["kept"][-1]: {"text": "another text"},
    }
    try:
        for file, values in changes.items():
            shutil.copyfile(file, file.with_suffix(".before"))
            table = pq.read_table(file)
            for column, value in values.items():
                place = table.schema.get_field_index(column)
                cells = table[column].to_pylist()
                for row in rng.sample(range(len(cells)), 5):
                    cells[row] = value
                table = table.set_column(place, column, pa.array(cells, table.schema.field(place).type))
            write_table(file, table)
        outside = search(OUTSIDE, files["tokens"], orders=files["order"])
        assert 10 <= len(outside) <= 15
        problems = order.segments(Release(data, "dataset")).problems
        assert {" ".join(text.split()[1:5]) for text in problems} == {
            f"step {row['step']} row {row['row']}" for row in outside
        }
        other = search("SELECT id FROM read_parquet($files) WHERE sha256(text) != content_hash", files["kept"])
        sentences = [f"the text of {row['id']} is not what its content hash says" for row in other]
        problems = documents.content_hashes(Release(data, "dataset")).problems
        assert sorted(text.partition(": ")[2] for text in problems) == sorted(sentences) and len(sentences) == 5
    finally:
        for file in changes:
            file.with_suffix(".before").replace(file)
