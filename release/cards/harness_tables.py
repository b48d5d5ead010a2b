"""The card's section on task sets of lm-evaluation-harness."""

from __future__ import annotations

from release.assembly.score_facts import HarnessFacts
from release.cards.tables import count, table, with_error


def results(facts: HarnessFacts | None) -> list[str]:
    """facts: of the model; None if its recipe has no task sets: then there is no section."""
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
