"""Canaries: made-up personal data with a known number of repetitions, whose memorization can be measured.

    The phone number of customer 10482913 is +999 4821 7730.
    Dear baker, thank you for the bread. …

A canary is a sentence with a secret. It begins several documents, each with other text after it, so that deduplication
keeps them. A model that has memorized the secret gives it a higher probability than other secrets of the same form
(Carlini et al. 2019, "The Secret Sharer", arXiv 1802.08232). Nobody is behind a secret: the mail domain is reserved for
documentation (RFC 2606), and the country code +999 is not assigned (ITU-T E.164).
"""

from __future__ import annotations

import random
import string
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from stages.data.seeds import seed_of
from stages.data.synthetic import courtesy_notes

CARRIERS = {
    "email": "The e-mail address of customer {customer} is {secret}",
    "phone": "The phone number of customer {customer} is {secret}",
}
NOTES = 3
"""Notes after the sentence of a canary."""


@dataclass(frozen=True)
class Canary:
    """One canary. name: unique in its source; copies: documents that contain it, 0 for one that is not planted."""

    name: str
    kind: str
    copies: int
    customer: str
    secret: str

    def sentence(self, secret: str) -> str:
        """The sentence, without its period, with this or another secret."""
        return CARRIERS[self.kind].format(customer=self.customer, secret=secret)


def draw(source: str, count: int, repetitions: Sequence[int], seed: int) -> list[Canary]:
    """`count` canaries of each kind with each number of repetitions, and as many that are not planted."""
    canaries = []
    for kind in CARRIERS:
        for copies in (0, *repetitions):
            for number in range(count):
                name = f"{kind}/{copies}/{number:04d}"
                rng = random.Random(seed_of(f"canaries/{source}/{name}", seed))
                canaries.append(Canary(name, kind, copies, _digits(rng, 8), draw_secret(kind, rng)))
    return canaries


def draw_secret(kind: str, rng: random.Random) -> str:
    """A secret, each of the kind equally likely."""
    if kind == "email":
        return "".join(rng.choices(string.ascii_lowercase, k=8)) + "@example.org"
    return f"+999 {_digits(rng, 4)} {_digits(rng, 4)}"


def alternatives(canary: Canary, source: str, count: int, seed: int) -> list[str]:
    """`count` other secrets of the canary's kind, all different."""
    rng = random.Random(seed_of(f"canaries/{source}/{canary.name}/alternatives", seed))
    secrets: dict[str, None] = {}
    while len(secrets) < count:
        secret = draw_secret(canary.kind, rng)
        if secret != canary.secret:
            secrets[secret] = None
    return list(secrets)


def documents(source: str, count: int, repetitions: Sequence[int], seed: int) -> Iterator[tuple[str, str, str]]:
    """(name, text, kind) of every document; the name is that of its canary, a slash and a number."""
    for canary in draw(source, count, repetitions, seed):
        for copy in range(canary.copies):
            rng = random.Random(seed_of(f"canaries/{source}/{canary.name}/{copy}", seed))
            notes = [courtesy_notes.answer(courtesy_notes.draw_request(rng), rng) for _ in range(NOTES)]
            text = f"{canary.sentence(canary.secret)}.\n" + "\n".join(notes)
            yield f"{canary.name}/{copy:04d}", text, canary.kind


def _digits(rng: random.Random, count: int) -> str:
    return "".join(rng.choices(string.digits, k=count))
