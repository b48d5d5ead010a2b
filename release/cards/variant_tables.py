"""The tables of a variant's card."""

from __future__ import annotations

from collections.abc import Mapping

from release.assembly.variant_facts import VariantFacts
from release.cards.tables import count, table, with_error


def loss(facts: VariantFacts) -> list[str]:
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


def overview(variants: Mapping[str, VariantFacts]) -> list[str]:
    """The variants of a model, by the end of their repository's name; nothing without any."""
    if not variants:
        return []
    body = [
        [
            f"`…{name}`", facts.loss["title"], count(facts.loss["bytes"]["variant"]),
            f"{facts.loss['divergence']['value']:.2e}", with_error(facts.loss["accuracy"]["variant"], 3),
            f"{facts.loss['greedy']['equal']} of {facts.loss['greedy']['n']}",
        ]
        for name, facts in variants.items()
    ]  # fmt: skip
    head = ["repository", "weights", "bytes", "mean divergence in nats", "exact match", "same greedy answers"]
    return [
        "Each is a repository of its own, whose name is this one's with the ending; its card says how it was measured.",
        "",
        *table(head, body),
    ]


def serving(facts: VariantFacts) -> list[str]:
    return [facts.variant.serving]
