"""The words and the table of a model beside its baselines follow from the figures alone."""

from __future__ import annotations

from typing import Any

from release.cards import baseline_tables, caveats
from release.facts.model_facts import ModelFacts, Parameters


def ratio(value: float, se: float = 0.05) -> dict[str, Any]:
    return {"value": value, "se": se, "documents": 9, "bytes": 1000}


def figures(xz: float, ngram: float, less: float) -> dict[str, Any]:
    return {
        "xz": {"value": xz, "bits": int(1000 * xz)},
        "ngram": ratio(ngram),
        "unigram": ratio(4.5),
        "less_ngram": ratio(less, 0.04),
    }


def facts(known: int = 500) -> ModelFacts:
    scores: Any = {"base": {"bits_per_byte": {"code": ratio(1.68), "sums": ratio(1.07)}, "accuracy": {}}}
    report: Any = {
        "order": 8,
        "models": {"base": {"code": figures(1.29, 1.30, 0.38), "sums": figures(3.94, 2.8, -1.73)}},
        "training": {name: {"documents": 5, "bytes": known, "all_bytes": 500} for name in ("code", "sums")},
        "overlap": {name: {"value": value, "bytes": 1000} for name, value in (("code", 0.255), ("sums", 0.0))},
    }
    return ModelFacts("Qwen3ForCausalLM", {}, "float32", Parameters(1, 1, 1), scores, baselines=report)


def test_words_state_the_size_and_the_interval_of_a_difference() -> None:
    assert baseline_tables.compared(0.387, "xz") == "worse than xz by 0.39"
    assert baseline_tables.compared(-0.12, "xz", 0.1) == "better than xz by 0.12 (0.02 to 0.22)"
    assert baseline_tables.compared(0.02, "xz", 0.1) == "worse than xz by 0.02 (-0.08 to 0.12)"


def test_the_first_caveat_names_where_a_baseline_is_better() -> None:
    first = caveats.caveat_sentences(facts())[0]

    assert "code: worse than xz by 0.39 and worse than byte 8-grams by 0.38 (0.29 to 0.47)." in first
    assert "sums" not in first


def test_a_model_that_beats_its_baselines_has_no_such_caveat() -> None:
    model = facts()
    model.baselines["models"]["base"].pop("code")  # type: ignore[index]

    assert caveats.caveat_sentences(model) == [caveats.NONE]


def test_the_table_has_a_row_for_each_source() -> None:
    sentence, _, _, _, code, sums = baseline_tables.comparison(facts())

    words = "worse than xz by 0.39; worse than byte 8-grams by 0.38 (0.29 to 0.47)"
    assert code == f"| code | 1.680±0.050 | 1.290 | 1.300±0.050 | 4.500±0.050 | {words} | 25.5% |"
    assert "| better than xz by 2.87; better than byte 8-grams by 1.73 (1.64 to 1.82) | 0.0% |" in sums
    assert "sample" not in sentence


def test_a_sample_of_the_training_text_is_stated() -> None:
    assert "bytes: code 400 of 500, sums 400 of 500." in baseline_tables.comparison(facts(known=400))[0]


def test_a_release_without_baselines_states_none() -> None:
    model = facts()
    model.baselines = None

    assert baseline_tables.comparison(model) == list(baseline_tables.in_words(model)) == []
    assert list(baseline_tables.worse(model)) == []


def test_each_source_has_a_line() -> None:
    lines = list(baseline_tables.in_words(facts()))

    assert lines[1] == "sums: better than xz by 2.87; better than byte 8-grams by 1.73 (1.64 to 1.82)"
    assert [line.partition(":")[0] for line in lines] == ["code", "sums"]
