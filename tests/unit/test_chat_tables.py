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


def test_the_reward_model_stands_beside_the_rule_about_length() -> None:
    part = {
        "pairs": 40, "questions": 30, "accuracy": 0.75, "interval": [0.6, 0.86],
        "longer_is_better": {"interval": [0.45, 0.77], "value": 0.625},
    }  # fmt: skip
    measured = {
        "heldout_pairs": 80, "heldout_questions": 60, "preferred_by": {"humans": 78, "rules": 2}, "prefers_longer": 0.7,
        "heldout_accuracy": {"first": 0.5, "last": 0.8, "interval": [0.68, 0.88]},
        "longer_is_better": {"interval": [0.47, 0.71], "value": 0.6}, "domains": {"code": part, "general": part},
    }  # fmt: skip
    sentence, _, _, _, *rows = chat_tables.reward_model(measured)
    assert "ordered 78 by humans, 2 by rules (rule preferences)." in sentence and "In 0.700 of the pairs" in sentence
    assert rows[0] == "| code | 40 | 30 | 0.750 (0.600 to 0.860) | 0.625 (0.450 to 0.770) |"
    assert rows[-1] == "| all | 80 | 60 | 0.800 (0.680 to 0.880) | 0.600 (0.470 to 0.710) |" and len(rows) == 3
    assert len(chat_tables.reward_model({**measured, "domains": {"": part}})) == 5, "one domain is all of them"
    assert chat_tables.reward_model(None) == []


def test_sources_of_pairs_say_who_ordered_them() -> None:
    source = {
        "preferred_by": "rules", "pairs": 90, "heldout": 10, "licenses": {"MIT": 90}, "left_out": {"tie": 3, "weak": 1200},
    }  # fmt: skip
    assert chat_tables.pairs({"notes": source})[-1] == (
        "| notes | rules (rule preferences) | MIT 90 | 80 | 10 | tie 3; weak 1,200 |"
    )
    assert chat_tables.pairs({}) == []
