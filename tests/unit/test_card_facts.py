"""What the cards show beside the figures: answers by a rule, and changes since the version before."""

from __future__ import annotations

import ast
import dataclasses
import json
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError
from release.cards import chat_tables, tables
from release.cards.render import size_category
from release.facts.run_facts import (
    Changes,
    Checkpoint,
    _leaves,
    compare_with_previous,
    find_optimizers,
    read_changes,
)
from release.facts.score_facts import SHOWN, ExampleAnswer, best_example, read_examples
from stages.mcore.optimizer import KINDS
from tests.fixtures.release_fixtures import table


def test_answers_are_chosen_by_their_ids(tmp_path: Path) -> None:
    rows = [
        {"id": f"{kind}/{n}", "kind": kind, "sample": sample, "text": f"answer {n}", "reward": reward}
        for kind, rewards in {"add": (1.0, 0.0, 1.0, 1.0), "courtesy": (0.4, 0.5, 0.6, 0.7)}.items()
        for n, reward in enumerate(rewards)
        for sample in (0, -1)
    ]
    table(tmp_path / "evaluation/test/sft/answers.parquet", rows[::-1])
    questions = [{"id": row["id"], "question": f"ask {row['id']}"} for row in rows]
    (tmp_path / "evaluation/chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in questions))
    examples = read_examples(tmp_path, "sft")
    assert [(row.kind, row.right, row.request) for row in examples] == [
        ("add", True, "ask add/0"), ("add", True, "ask add/2"), ("add", False, "ask add/1"),
    ]  # fmt: skip
    assert SHOWN == 2 and chat_tables.examples(examples)[2] == "- add, right: `ask add/0` → `answer 0`"
    assert read_examples(tmp_path, "base") == [] and chat_tables.examples([]) == []


def test_a_model_without_conversation_has_continuations(tmp_path: Path) -> None:
    rows = [{"id": "add/0", "task": "add", "prompt": "1+1=", "output": "2|\n`x` <b>", "score": 1}]
    table(tmp_path / "evaluation/base/items.parquet", rows)
    (line,) = chat_tables.examples(read_examples(tmp_path, "base"))[2:]
    assert line == "- add, right: `1+1=` → `2/ 'x' <b>`"


def test_changes_since_the_version_before(tmp_path: Path) -> None:
    sections = [{"name": "x", "e": 3}]
    leaves = {"a.b": 1, "c": [1, 2], "d.x.name": "x", "d.x.e": 3}
    assert dict(_leaves({"a": {"b": 1}, "c": [1, 2], "d": sections})) == leaves
    with pytest.raises(AtomError, match="is no release folder; --previous takes one that `atom build` made"):
        compare_with_previous(tmp_path, {}, None)  # type: ignore[arg-type]
    assert read_changes(tmp_path) is None and len(tables.changes(None)) == 1
    figures = {"right, in plain text": [{"value": 0.5, "se": 0.1}, {"value": 0.75, "se": 0.1}]}
    body = {"version": "0.1.0", "settings": [["pretrain.steps", 60, 90]], "figures": figures}
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence/changes.json").write_text(json.dumps(body))
    assert tables.changes(read_changes(tmp_path)) == [
        "Since version 0.1.0, settings of the recipe:", "", "- `pretrain.steps`: 60 → 90", "",
        "Figures of the final model:", "", "- right, in plain text: 0.500 ± 0.100 → 0.750 ± 0.100",
    ]  # fmt: skip
    many = Changes("0.1.0", [(f"s{n}", None, n) for n in range(50)], {})
    assert tables.changes(many)[-1] == "- 20 further settings" and len(tables.changes(many)) == 33


def test_the_answer_that_a_card_shows_is_right_if_there_is_a_right_one() -> None:
    empty, wrong, right = (
        ExampleAnswer("add", f'say "{text}"\n``` twice', text, text == "right", True) for text in ("", "wrong", "right")
    )
    assert best_example([empty, wrong, right]) == right and best_example([empty, wrong]) == wrong
    assert best_example([empty]) is None and best_example([]) is None
    (line,) = chat_tables.request(right)
    assert ast.literal_eval(line.removeprefix("chat = ")) == [{"role": "user", "content": right.request}]
    assert chat_tables.output(right) == ["````text", "right", "````"]
    plain = dataclasses.replace(wrong, in_conversation=False, text="a\n````\nb" + "x" * 700)
    assert chat_tables.request(plain) == ['inputs = tokenizer("say \\"wrong\\"\\n``` twice", return_tensors="pt")']
    lines = chat_tables.output(plain)
    assert lines[2] != "````" and len(lines) == 5 and lines[3].endswith("x…")
    assert chat_tables.request(None) == ['inputs = tokenizer("The", return_tensors="pt")']


@pytest.mark.parametrize(
    ("documents", "category"),
    [
        (0, "n<1K"),
        (999, "n<1K"),
        (1000, "1K<n<10K"),
        (10**10 - 1, "1B<n<10B"),
        (10**10, "10B<n<100B"),
        (10**13, "n>1T"),
    ],
)
def test_a_number_of_documents_is_in_the_category_of_the_hub(documents: int, category: str) -> None:
    assert size_category(documents) == category


def test_the_optimizer_of_each_phase_is_named_with_its_settings() -> None:
    adam = {"lr": 0.003, "final_lr": 0.0003, "beta1": 0.9, "decay_steps": None}
    muon = {"kind": "muon", "schedule": "wsd", "decay_steps": 5, "momentum": 0.95}
    own = {"kind": "lion", "rho": 3}

    sentence, blank, *rows = tables.optimizers({"pretrain": muon, "sft": adam, "dpo": own})

    assert sentence == tables.OPTIMIZERS["muon"]["sentence"] and not blank
    assert rows[2:] == [
        "| pre-training | Muon | schedule wsd, steps of the final decay 5, momentum 0.95 |",
        "| SFT | AdamW | peak learning rate 0.003, final learning rate 0.0003, schedule cosine, β₁ 0.9 |",
        "| DPO | `lion` | schedule cosine, rho 3 |",
    ]
    assert tables.optimizers({"sft": adam})[0].startswith("| phase |") and tables.optimizers({}) == []
    assert tables.OPTIMIZERS.keys() == KINDS.keys()


def test_settings_of_optimizers_are_those_of_the_last_checkpoint_of_a_phase() -> None:
    states = {0: {"lr": 1}, 5: {"lr": 2}}
    rows = [Checkpoint("", "sft", step, {"config": {"phase": {"optimizer": lr}}}) for step, lr in states.items()]
    imported = Checkpoint("", "import", 0, {"step": 0})
    other = Checkpoint("", "reward", 5, rows[0].state)

    assert find_optimizers([imported, *rows, other], ["import", "sft"]) == {"sft": {"lr": 2}}
