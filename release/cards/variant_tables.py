"""The tables of a variant's card."""

from __future__ import annotations

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


def serving(facts: VariantFacts) -> list[str]:
    return [facts.variant.serving]
