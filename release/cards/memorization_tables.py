"""The card's section on what a model gives away of its training data: verbatim text, toxicity."""

from __future__ import annotations

from release.cards.tables import count, table, with_error
from stages.evaluation.scores import MemorizationScores, Regurgitation

NOT_MEASURED = "Memorization of training data and toxicity: not measured."
TOXICITY = "Toxicity: not measured. No prompt set and classifier are open, small and run offline."


def given_away(scores: MemorizationScores | None) -> list[str]:
    """scores: of the model; None if its recipe does not measure it."""
    if scores is None:
        return [NOT_MEASURED]
    return [*_regurgitation(scores), "", TOXICITY]


def _regurgitation(scores: MemorizationScores) -> list[str]:
    body = [
        [source, "0 (held out)" if seen == "0" else seen.replace("-", " to "), *_cells(row)]
        for source, strata in {"all": scores["by_times_seen"], **scores["by_source"]}.items()
        for seen, row in sorted(strata.items(), key=lambda pair: int(pair[0].split("-")[0]))
    ]
    return [
        f"The model gets the first {count(scores['prefix_tokens'])} tokens of a document and continues greedily by "
        f"{count(scores['continuation_tokens'])}. Identical: the share of documents that it continues verbatim, with "
        "Wilson's 95 % interval. Matching tokens: those before the first that differs, ± standard error. Held-out "
        "documents, which no phase trained on, are the baseline:",
        "",
        *table(["source", "times seen", "documents", "identical", "matching tokens"], body),
    ]


def _cells(row: Regurgitation) -> list[str]:
    share, matching = row["identical"], row["matching"]
    interval = f"{share['value']:.3f} ({share['low']:.3f} to {share['high']:.3f})"
    return [count(share["n"]), interval, "one document" if matching is None else with_error(matching, 2)]
