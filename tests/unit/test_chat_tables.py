"""The card's tables about chat models have no rows for figures that do not exist."""

from __future__ import annotations

from release.cards import chat_tables
from stages.evaluation.contamination import scores_by_verdict
from stages.evaluation.pass_at_k import Answer, summary
from stages.evaluation.scores import pass_at_1


def test_a_model_with_judged_requests_only_has_no_row_of_problems() -> None:
    answered: list[Answer] = [
        {
            "id": f"request-{n}", "kind": "courtesy", "sample": 0, "seed": n, "text": "yes",
            "answer": "yes", "finished": True, "tokens": 2, "reward": 0.5, "parts": "{}",
            "verifier": "courtesy", "verifier_version": "1",
        }
        for n in range(3)
    ]  # fmt: skip
    scores = {"dpo": summary(answered)}
    rows = [line for line in chat_tables.answers(scores) if line.startswith("| courtesy")]
    assert rows[0].startswith("| courtesy (preference reward) | DPO | 3 |")
    assert pass_at_1(scores) == {}


def test_a_kind_with_a_single_item_has_no_row_of_clean_scores() -> None:
    scores = {"a": ("sort", 1.0), "b": ("add", 1.0), "c": ("add", 0.0)}
    kinds = scores_by_verdict(scores, dict.fromkeys(scores, "clean"))
    lines = chat_tables.clean({"scores": {"solve-dpo": kinds}}, {})  # type: ignore[typeddict-item]
    assert lines == ["For 1 of 1 scores every item is clean, so nothing changes."]


def test_scores_on_clean_items_have_no_names_of_nodes() -> None:
    scores = {"a": ("add", 1.0), "b": ("add", 1.0), "c": ("add", 0.0)}
    kinds = scores_by_verdict(scores, {"a": "clean", "b": "clean", "c": "overlap"})
    names = ("evaluate-mid", "solve-online-rlhf", "fresh-solve-dpo")
    lines = chat_tables.clean({"scores": dict.fromkeys(names, kinds)}, {})  # type: ignore[typeddict-item]
    assert lines[0] == "For 0 of 3 scores every item is clean, so nothing changes. For the others:"
    assert [line.split(" | ")[:2] for line in lines[4:]] == [
        ["| add, in plain text", "mid-training"],
        ["| add, in conversation", "online RLHF"],
        ["| add, on new problems", "DPO"],
    ]
