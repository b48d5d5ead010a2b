"""A retraction takes the pieces of a document's text out of models' answers about it."""

from __future__ import annotations

from release.retraction.rewrite import Reached, rewrite
from stages.evaluation.text_items import ANSWERS
from stages.formats.table import read_table, write_rows


def test_answers_keep_their_scores_and_lose_their_texts(tmp_path):
    path = tmp_path / "dataset/evaluation/model/text_items.parquet"
    rows = [
        {"id": id, "kind": "words", "gains": "[]", "output": f"text of {id}", "score": 1, "baseline": 0}
        for id in ("code/a", "code/b")
    ]
    write_rows(path, ANSWERS, rows)

    rewrite(tmp_path, Reached(kinds={"code/a": "id"}))

    assert read_table(path).to_pylist() == [{**rows[0], "output": ""}, rows[1]]
