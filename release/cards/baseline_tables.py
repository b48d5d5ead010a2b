"""Bits per byte of a model beside those of its baselines, as a table and in words."""

from __future__ import annotations

from collections.abc import Iterator

from release.cards.tables import count, table, with_error
from release.facts.model_facts import ModelFacts
from stages.confidence import Figure, half_width


def compared(difference: float, baseline: str, half: float | None = None) -> str:
    """Returns a sentence's end on a model and a baseline, such as `better than xz by 0.12`.

    Args:
        difference: Bits per byte of the model less those of the baseline.
        baseline: Name of the baseline.
        half: Half the width of the 95 % interval of the difference; None if there is none.
    """
    word, sign = ("worse", 1) if difference > 0 else ("better", -1)
    ends = "" if half is None else " ({:.2f} to {:.2f})".format(*(sign * difference + side for side in (-half, half)))
    return f"{word} than {baseline} by {abs(difference):.2f}{ends}"


def worse(model: ModelFacts) -> Iterator[str]:
    """Yields a sentence on the sources for which a baseline needs fewer bits than the model; none if there is none."""
    sources = []
    for source, differences in _differences(model).items():
        if lost := [compared(value, name, half) for name, value, half in differences if value > 0]:
            sources.append(f"{source}: {' and '.join(lost)}")
    if sources:
        yield (
            "**A simple program encodes held-out text in fewer bits than this model**, in bits per byte by source: "
            f"{'; '.join(sources)}. The program knows the training text of the source; xz reads the held-out "
            "documents of a source together."
        )


def in_words(model: ModelFacts) -> Iterator[str]:
    """Yields a line for each source on the model beside its baselines, the largest loss first."""
    sources = sorted(_differences(model).items(), key=lambda item: -max(value for _, value, _ in item[1]))
    for source, differences in sources:
        yield f"{source}: {'; '.join(compared(value, name, half) for name, value, half in differences)}"


def comparison(model: ModelFacts) -> list[str]:
    """Returns a row for each source with the bits per byte of the model and of the baselines, and the overlap."""
    report = model.baselines
    if report is None:
        return []
    ngram, scores, body = _ngram(model), model.own_scores()["bits_per_byte"], []
    for source, figures in report["models"][model.name()].items():
        rows: list[Figure] = [scores[source], figures["ngram"], figures["unigram"]]
        of_model, of_ngram, of_bytes = (with_error(row, 3) for row in rows)
        words = "; ".join(compared(value, name, half) for name, value, half in _differences(model)[source])
        share = f"{report['overlap'][source]['value']:.1%}"
        body.append([source, of_model, f"{figures['xz']['value']:.3f}", of_ngram, of_bytes, words, share])
    known = {source: row for source, row in report["training"].items() if row["bytes"] < row["all_bytes"]}
    samples = ", ".join(f"{source} {count(row['bytes'])} of {count(row['all_bytes'])}" for source, row in known.items())
    sentence = (
        f"Bits per byte beside those of baselines that know the training text of the source: xz, and models of {ngram} "
        "and of single bytes (Kneser-Ney). All encode the same bytes of the same documents; xz encodes those of a "
        "source together. 95 % intervals of differences (Student's) are over works, such as packages, where whole "
        "works are held out, otherwise over documents. *In training text*: share of these bytes that lie in 50 bytes "
        "which the training split has as well."
    )
    if samples:
        sentence += f" Of large sources the baselines know a sample; bytes: {samples}."
    head = ["held-out text", "this model", "xz", ngram, "single bytes", "this model is", "in training text"]
    return [sentence, "", *table(head, body)]


def _ngram(model: ModelFacts) -> str:
    return f"byte {model.baselines['order']}-grams" if model.baselines else ""


def _differences(model: ModelFacts) -> dict[str, list[tuple[str, float, float | None]]]:
    """Returns (baseline, difference, half its interval) by source; xz has one figure for a source, and so none."""
    report, scores = model.baselines, model.own_scores()["bits_per_byte"]
    figures = report["models"].get(model.name(), {}) if report else {}
    return {
        source: [
            ("xz", scores[source]["value"] - row["xz"]["value"], None),
            (_ngram(model), row["less_ngram"]["value"], half_width(row["less_ngram"])),
        ]
        for source, row in figures.items()
    }
