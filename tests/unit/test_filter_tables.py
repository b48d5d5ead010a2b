"""The data card states how far the filters agree with stock datatrove."""

from __future__ import annotations

from release.cards.document_tables import filter_agreement
from release.facts.data_facts import DataFacts
from stages.data.curate.agreement import agreement_of, read_figures


def test_agreement_counts_verdicts_and_not_reasons() -> None:
    figures = agreement_of(["short", None, None, "long"], ["other", None, "short", None])
    assert figures == {"agreement": 0.5, "kappa": 0.0, "kept": 2, "reference_kept": 2}
    assert agreement_of([None, None], [None, None])["kappa"] == 1.0


def test_the_table_has_a_row_for_each_measured_rule() -> None:
    figures = read_figures()
    sentence, blank, head, rule, *rows = filter_agreement(DataFacts(filter_agreement=figures))
    assert "datatrove" in sentence and f"{figures['documents']:,} documents" in sentence and not blank
    assert head.split(" | ")[0] == "| rule" and set(rule) == {"|", "-"}
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in figures["rules"]]


def test_an_older_release_has_no_table() -> None:
    assert filter_agreement(DataFacts()) == []
