"""The cards' tables of single measurements: a prediction, memorization, task sets, and variants of the weights."""

from __future__ import annotations

from collections.abc import Mapping

from release.cards.tables import count, table, with_error, with_interval
from release.facts.forecast import FOLDER, NAMES
from release.facts.model_facts import ModelFacts
from release.facts.score_facts import HarnessFacts
from release.facts.variant_facts import VariantFacts
from stages.evaluation.scores import MemorizationScores, Regurgitation

NOT_MEASURED = "Memorization of training data and toxicity: not measured."
TOXICITY = "Toxicity: not measured. No prompt set and classifier are open, small and run offline."


def prediction(model: ModelFacts) -> list[str]:
    """What was predicted before training, and what was measured; none of a model without a prediction."""
    if model.prediction is None:
        return []
    sealed = model.prediction
    smallest, largest = sealed.points[0], sealed.points[-1]
    body = [
        [
            NAMES[row.forecast.figure],
            f"{row.forecast.value:.4f}",
            f"{row.forecast.low:.4f} to {row.forecast.high:.4f}",
            f"{row.measured:.4f}",
            "yes" if row.within else "no",
        ]
        for row in model.outcomes
    ]
    return [
        f"Sealed before pre-training, from {count(len(sealed.points))} runs of {smallest.flops:.3g} to "
        f"{largest.flops:.3g} training FLOPs; this model has {sealed.target.flops:.3g}. Nine of ten such runs "
        f"should fall into a band. The evidence repository has the prediction and its statement in `{FOLDER}/`.",
        "",
        *table(["figure", "predicted", "band of 90 %", "measured", "in the band"], body),
    ]


def memorization(scores: MemorizationScores | None) -> list[str]:
    """What a model gives away of its training data: verbatim text, planted secrets, toxicity.

    Args:
        scores: None if the recipe does not measure it.
    """
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
    return [count(share["n"]), with_interval(share), "one document" if matching is None else with_error(matching, 2)]


def task_sets(facts: HarnessFacts | None) -> list[str]:
    """The scores of task sets of lm-evaluation-harness; none if the recipe has no task sets."""
    if facts is None:
        return []
    body = [
        [task_set, task, metric.removesuffix(",none"), count(figure["n"]), with_error(figure, 3)]
        for task_set, tasks in facts.scores.items()
        for task, metrics in tasks.items()
        for metric, figure in metrics.items()
    ]
    licenses = [
        f"{name}: {stated['license']} ({stated['license_evidence']}"
        + (f"; revision {stated['revision']})" if stated["revision"] else ")")
        for name, stated in facts.task_sets.items()
    ]
    return [
        "Means over items, ± standard error. Decontamination searched the training data for these items.",
        "",
        *table(["set", "task", "metric", "items", "score"], body),
        "",
        f"Licenses of the data: {'; '.join(licenses)}.",
    ]


def variant_loss(facts: VariantFacts) -> list[str]:
    """What the variant loses, measured on the same documents and problems as the original."""
    loss = facts.loss
    divergence, greedy = loss["divergence"], loss["greedy"]
    body = [
        ["bytes of the weights", count(loss["bytes"]["original"]), count(loss["bytes"]["variant"])],
        *(
            [title, *(with_error(measure[side], digits) for side in ("original", "variant"))]
            for title, measure, digits in (
                ("bits per byte", loss["bits_per_byte"], 4),
                ("exact match", loss["accuracy"], 3),
            )
        ),
        ["divergence, mean in nats", "", f"{divergence['value']:.2e} ± {divergence['se']:.1e}"],
        ["divergence, largest in nats", "", f"{divergence['max']:.2e}"],
        [
            "same likeliest token",
            "",
            f"{divergence['same_likeliest']:.4f} of {count(divergence['positions'])} positions",
        ],
        ["same greedy answer", "", f"{greedy['equal']} of {greedy['n']} problems"],
    ]
    return [*table(["measure", "original", "variant"], body), "", f"Measured by {loss['measured_by']}."]


def variants(by_suffix: Mapping[str, VariantFacts]) -> list[str]:
    """The variants of a model, by the end of their repository's name; nothing without any."""
    if not by_suffix:
        return []
    body = [
        [
            f"`…{name}`", facts.loss["title"], count(facts.loss["bytes"]["variant"]),
            f"{facts.loss['divergence']['value']:.2e}", with_error(facts.loss["accuracy"]["variant"], 3),
            f"{facts.loss['greedy']['equal']} of {facts.loss['greedy']['n']}",
        ]
        for name, facts in by_suffix.items()
    ]  # fmt: skip
    head = ["repository", "weights", "bytes", "mean divergence in nats", "exact match", "same greedy answers"]
    return [
        "Each is a repository of its own, whose name is this one's with the ending; its card says how it was measured.",
        "",
        *table(head, body),
    ]


def variant_serving(facts: VariantFacts) -> list[str]:
    return [facts.variant.serving]
