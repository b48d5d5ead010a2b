"""The data card's table about filters: their agreement with the reference that published thresholds were made for."""

from __future__ import annotations

from pipeline.core.text import escaped
from release.assembly.data_facts import DataFacts
from release.cards.tables import count, table


def agreement(data: DataFacts) -> list[str]:
    """One row for each rule; none for a release without figures."""
    figures = data.filter_agreement
    if not figures:
        return []
    body = [
        [
            escaped(rule),
            f"{row['agreement']:.1%}",
            f"{row['kappa']:.2f}",
            count(row["kept"]),
            count(row["reference_kept"]),
        ]
        for rule, row in figures["rules"].items()
    ]
    head = ["rule", "agreement", "Cohen's κ", "kept by this pipeline", "kept by the reference"]
    sentence = (
        f"Thresholds of the rules are those published for the reference, {escaped(figures['reference'])}. At equal "
        f"settings the rules gave these verdicts on {count(figures['documents'])} documents "
        f"({escaped(figures['corpus'])}):"
    )
    return [sentence, "", *table(head, body)]
