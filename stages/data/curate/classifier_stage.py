"""Classifier: a fastText model that tells documents like those of some sources from documents like those of others.

The labels are the sources themselves, as in FineWeb-Edu's and DCLM's filters (Penedo et al. 2024, Li et al. 2024), so
the labelled set is sealed, licensed and published like any source. fastText runs in one thread, where a seed fixes its
result. The text of a document is one line, in lower case and with its punctuation.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from pipeline.core.bounds import MOST_SOURCES, Range, Seed, Share, SourceName
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.data.curate.fasttext_training import train
from stages.formats.seeds import seed_of
from stages.formats.table import content_hash, part_files, split_of, write_json
from stages.formats.text_sample import Sample

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1
MODEL = "model.bin"
POSITIVE = "__label__positive"
LABELS = (POSITIVE, "__label__negative")
MOST_CHARACTERS = 100_000  # of one document
Sources = Annotated[tuple[SourceName, ...], Field(min_length=1, max_length=MOST_SOURCES)]


class ClassifierSettings(Config):
    """A quality classifier of a data recipe."""

    name: SourceName
    """name of the classifier, as in the steps that use it"""
    positive: Sources
    """sources whose documents are examples of good text"""
    negative: Sources
    """sources whose documents are examples of other text"""
    documents: Annotated[int, Range(20, 1e8)] = 200_000
    """maximum number of examples of each source, those with the smallest content hashes"""
    heldout_fraction: Share = 0.1
    """share of the examples on which the classifier is measured"""
    dimension: Annotated[int, Range(1, 1000)] = 64
    """size of the vector of a word"""
    epochs: Annotated[int, Range(1, 1000)] = 5
    """passes over the examples"""
    learning_rate: Annotated[float, Range(0, 10, above=True)] = 0.1
    """first learning rate"""
    word_ngrams: Annotated[int, Range(1, 5)] = 2
    """words of the longest n-gram"""
    buckets: Annotated[int, Range(1, 1e7)] = 200_000
    """hashed n-grams, each with a vector"""


class ClassifierConfig(Config):
    classifier: ClassifierSettings
    """settings of the classifier"""
    seed: Seed
    """seed of the recipe"""


def run(config: ClassifierConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `model.bin` and `meta.json`: the examples by source, and accuracy and ROC AUC on held-out ones.

    The inputs are the acquired documents of each source of the classifier, under its name.

    Raises:
        AtomError: A label has no example of either split.
    """
    settings, counts = config.classifier, dict[str, dict[str, int]]()
    examples, heldout = work / "examples.txt", work / "heldout.txt"
    with open(examples, "w", encoding="utf-8") as train_file, open(heldout, "w", encoding="utf-8") as heldout_file:
        files = {"train": train_file, "heldout": heldout_file}
        streams = [
            (label, name, _texts(inputs[name].path / "documents", settings.documents))
            for label, names in zip(LABELS, (settings.positive, settings.negative), strict=True)
            for name in names
        ]
        for label, name, text in _alternating(streams):
            # By the content, so that a repeated text is never in both splits.
            split = split_of(content_hash(text), settings.heldout_fraction)
            files[split].write(f"{label} {as_line(text)}\n")
            source = counts.setdefault(name, {"train": 0, "heldout": 0})
            source[split] += 1
    # fastText would train on one label without an error, and every score would be 1.
    _require_both_labels(settings, counts)
    failure = train(
        examples,
        out / MODEL,
        seed=seed_of(f"classifier/{settings.name}", config.seed) % 2**31,  # fastText's seed is an int of 32 bits
        dim=settings.dimension,
        epoch=settings.epochs,
        lr=settings.learning_rate,
        wordNgrams=settings.word_ngrams,
        bucket=settings.buckets,
    )
    if failure is not None:
        raise AtomError(
            f"classifier {settings.name} cannot be trained ({failure}); lower learning_rate, or give it more examples"
        )
    measured = _measure(out / MODEL, heldout)
    write_json(out / "meta.json", {"classifier": settings.model_dump(), "examples": counts, "heldout": measured})
    report.note(f"classifier {settings.name}: accuracy {measured['accuracy']:.3f}, ROC AUC {measured['auc']:.3f}")


def as_line(text: str) -> str:
    """Returns a document as fastText reads it: one line, in lower case.

    Words of the form of a label are no labels here.
    """
    # fastText takes a word that begins so for a label.
    return " ".join(text[:MOST_CHARACTERS].lower().replace("__label__", " ").split())


def scorer(model: Path) -> Any:
    """Returns a function score(text): the probability that a text is like the positive examples."""
    from fasttext.FastText import _FastText  # type: ignore[import-untyped]

    predict = _FastText(str(model)).f.predict

    def score(text: str) -> float:
        # The line break stands for the word at the end of each line of the training.
        predictions = predict(as_line(text) + "\n", len(LABELS), 0.0, "strict")
        # fastText's probabilities can be a little above 1.
        return float(next((min(share, 1.0) for share, label in predictions if label == POSITIVE), 0.0))

    return score


def _texts(documents: Path, count: int) -> Iterator[str]:
    sample = Sample.draw(part_files(documents.parent, documents.name), None, count)
    for batch in sample.texts(min(count, len(sample.hashes))):
        yield from batch


def _alternating(streams: list[tuple[str, str, Iterator[str]]]) -> Iterator[tuple[str, str, str]]:
    """Yields (label, source, text), one of each stream in turn until all are exhausted.

    fastText learns in this order.
    """
    left = list(streams)
    while left:
        for stream in list(left):
            label, name, texts = stream
            if (text := next(texts, None)) is None:
                left.remove(stream)
            else:
                yield label, name, text


def _require_both_labels(settings: ClassifierSettings, counts: dict[str, dict[str, int]]) -> None:
    for label, names in (("positive", settings.positive), ("negative", settings.negative)):
        for split in ("train", "heldout"):
            if not sum(counts.get(name, {}).get(split, 0) for name in names):
                raise AtomError(
                    f"classifier {settings.name} has no {label} example in the split {split} ({', '.join(names)}); "
                    "give its sources more documents, or change heldout_fraction"
                )


def _measure(model: Path, heldout: Path) -> dict[str, Any]:
    """Returns the accuracy at a score of one half, and area under the ROC curve, on the held-out examples."""
    import numpy as np

    score, labels, scores = scorer(model), [], []
    with open(heldout, encoding="utf-8") as lines:
        for line in lines:
            label, _, text = line.rstrip("\n").partition(" ")
            labels.append(label == POSITIVE)
            scores.append(score(text))
    positive, values = np.array(labels), np.array(scores)
    return {
        "examples": len(labels),
        "accuracy": float(((values > 0.5) == positive).mean()),
        "auc": _auc(values[positive], values[~positive]),
    }


def _auc(positive: NDArray[Any], negative: NDArray[Any]) -> float:
    """Returns the probability that a positive example scores above a negative one; equal scores count half."""
    import numpy as np

    ordered = np.sort(negative)
    # The rank statistic of Mann and Whitney, in n log n.
    below, up_to = (np.searchsorted(ordered, positive, side) for side in ("left", "right"))
    return float((below + up_to).mean() / 2 / len(negative))


def estimate(config: ClassifierConfig) -> Estimate:
    return Estimate(cpu_seconds=10.0, fixed=True, memory_bytes=1_000_000_000, disk_bytes=1_000_000_000)


STAGE = Stage("classifier", VERSION, ClassifierConfig, run, estimate=estimate)
