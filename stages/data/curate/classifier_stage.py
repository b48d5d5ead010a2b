"""Classifier: a fastText model that tells documents like those of some sources from documents like those of others.

Named sources are the positive examples and random documents of others the negative ones, as in DCLM's filter (Li et
al. 2024), so the labelled set is sealed, licensed and published like any source. A regular expression can divide
sources instead, as LaTeX does for OpenWebMath's classifier (Paster et al. 2023). fastText runs in one thread, where a
seed fixes its result. The text of a document is one line, in lower case and with its punctuation.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, zip_longest
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from pipeline.core.bounds import MOST_SOURCES, Range, Seed, Share, SourceName, Words
from pipeline.core.errors import AtomError
from pipeline.core.stage import Config, Estimate, Inputs, Report, Stage
from stages.data.curate.settings import expression_problem
from stages.formats.seeds import seed_of
from stages.formats.table import content_hash, sources_of, split_of, write_json
from stages.formats.text_sample import Sample, choose_files

VERSION = 1
MODEL, META = "model.bin", "meta.json"
POSITIVE, NEGATIVE = "positive", "negative"
# fastText takes a word that begins so for a label.
LABEL = "__label__"
MOST_CHARACTERS = 100_000  # of one document
# Words and pairs of words; fewer hashed pairs than by default, so that a model has 51 MB beside its words. The default
# rate of 0.1 is too low for two thousand documents (docs/lab-log.md).
FASTTEXT = {"thread": 1, "verbose": 0, "dim": 64, "lr": 0.5, "wordNgrams": 2, "bucket": 200_000}
_TRAIN = "import fasttext, json, sys; fasttext.train_supervised(**json.loads(sys.argv[1])).save_model(sys.argv[2])"
Sources = Annotated[tuple[SourceName, ...], Field(min_length=1, max_length=MOST_SOURCES)]


class ClassifierSettings(Config):
    """A classifier of a data recipe."""

    name: SourceName
    """name of the classifier, as in the steps that use it"""
    positive: Sources
    """sources with the positive examples"""
    negative: Sources
    """sources with the negative examples, drawn at random"""
    pattern: Annotated[str, Words(500, empty=True, test=expression_problem)] = ""
    """regular expression that is in every positive example and in no negative one, so that a source can give both; it
    is cut out before training, so that the words around it are learned; empty: the sources alone are the labels"""
    keep: Annotated[float, Range(0, 1, above=True)] = 0.1
    """share of the held-out negative examples that score above the threshold; where these are a random draw of the
    filtered source, this is the share of it that the step keeps"""
    documents: Annotated[int, Range(20, 1e8)] = 200_000
    """documents drawn from each source for each label, of some of its parts"""
    heldout_fraction: Share = 0.1
    """share of the examples on which the threshold is set, and precision and recall are measured"""
    epochs: Annotated[int, Range(1, 1000)] = 5
    """passes over the examples"""

    @model_validator(mode="after")
    def _check_labels(self) -> ClassifierSettings:
        both = sorted(set(self.positive) & set(self.negative))
        if both and not self.pattern:
            raise ValueError(f"{both[0]} is both positive and negative; give `pattern`, or name it once")
        return self


class ClassifierConfig(Config):
    classifier: ClassifierSettings
    """settings of the classifier"""
    seed: Seed
    """seed of the recipe"""


def run(config: ClassifierConfig, inputs: Inputs, work: Path, out: Path, report: Report) -> None:
    """Seals `model.bin` and `meta.json`: the examples, the threshold, and precision and recall on held-out examples.

    The inputs are the acquired documents of each source of the classifier, under its name. Memory holds the hashes of
    the drawn documents, and the model. Time grows with `documents`, and not with the sources.

    Raises:
        AtomError: A label has no example of either split, or the classifier would keep nothing.
    """
    settings, counts = config.classifier, Counter[str]()
    examples, heldout = work / "examples.txt", work / "heldout.txt"
    streams = [
        _examples(settings, inputs[name].path, label)
        for label, names in ((POSITIVE, settings.positive), (NEGATIVE, settings.negative))
        for name in names
    ]
    with open(examples, "w", encoding="utf-8") as train_file, open(heldout, "w", encoding="utf-8") as heldout_file:
        files = {"train": train_file, "heldout": heldout_file}
        # fastText learns in this order: one example of each source in turn.
        for label, text in filter(None, chain.from_iterable(zip_longest(*streams))):
            # Hashed again, since the drawn documents are those with the least hashes. A text is never in both splits.
            split = split_of(content_hash(f"classifier/{content_hash(text)}"), settings.heldout_fraction)
            files[split].write(f"{LABEL}{label} {as_line(text)}\n")
            counts[f"{label}_{split}"] += 1
    # fastText would train on one label without an error, and every score would be 1.
    if missing := {f"{label}_{split}" for label in (POSITIVE, NEGATIVE) for split in files} - set(counts):
        kind, split = min(missing).split("_")
        raise AtomError(
            f"classifier {settings.name} has no {kind} example in the split {split}; give its sources more documents, "
            "or change heldout_fraction or pattern"
        )
    _train(config, examples, out / MODEL)
    measured = _measure(settings, out / MODEL, heldout)
    write_json(out / META, {"classifier": settings.model_dump(), "examples": counts, **measured})
    report.note("classifier {}: precision {precision:.3f}, recall {recall:.3f}".format(settings.name, **measured))


def _train(config: ClassifierConfig, examples: Path, model: Path) -> None:
    """Trains in a process of its own, whose memory is filled with a constant.

    With one thread, fastText sets a tenth of its input vectors at random and leaves the others as the allocator gave
    them: two trainings in one process differ, or end in "Encountered NaN". glibc fills new memory if MALLOC_PERTURB_ is
    set as the process starts, so the other vectors start at -3e-13.
    """
    # fastText's seed is an int of 32 bits.
    seed = seed_of(f"classifier/{config.classifier.name}", config.seed) % 2**31
    arguments = {**FASTTEXT, "input": str(examples), "seed": seed, "epoch": config.classifier.epochs}
    command = [sys.executable, "-P", "-c", _TRAIN, json.dumps(arguments), str(model)]
    environment = {**os.environ, "MALLOC_PERTURB_": "85"}
    subprocess.run(command, env=environment, check=True)


def as_line(text: str) -> str:
    """Returns a document as fastText reads it: one line, in lower case and without words that look like a label."""
    return " ".join(text[:MOST_CHARACTERS].lower().replace(LABEL, " ").split())


def scorer(model: Path) -> Any:
    """Returns a function score(text): the probability that a text is like the positive examples."""
    from fasttext.FastText import _FastText  # type: ignore[import-untyped]

    predict = _FastText(str(model)).f.predict

    def score(text: str) -> float:
        # The line break stands for the word at the end of each line of the training.
        predictions = predict(as_line(text) + "\n", 2, 0.0, "strict")
        # fastText's probabilities can be a little above 1.
        return float(next((min(share, 1.0) for share, label in predictions if label == LABEL + POSITIVE), 0.0))

    return score


def _examples(settings: ClassifierSettings, acquired: Path, label: str) -> Iterator[tuple[str, str]]:
    """Yields (label, text) of the documents of a source with the least content hashes that fit the label.

    Only as many parts are read as hold a few times the drawn documents, at 4 kB each.
    """
    pattern = re.compile(settings.pattern) if settings.pattern else None
    leave_out = {*sources_of(acquired)} - {"documents"}
    files = choose_files(acquired, leave_out, settings.documents * 4000)["documents"]
    sample = Sample.draw(files, None, settings.documents)
    for text in chain.from_iterable(sample.texts(min(settings.documents, len(sample.hashes)))):
        if pattern is None:
            yield label, text
        elif (pattern.search(text) is not None) == (label == POSITIVE):
            yield label, pattern.sub(" ", text)


def _measure(settings: ClassifierSettings, model: Path, heldout: Path) -> dict[str, float]:
    """Returns the threshold by the negative held-out examples, and precision and recall of what scores above it."""
    score, scores = scorer(model), dict[str, list[float]]({POSITIVE: [], NEGATIVE: []})
    with open(heldout, encoding="utf-8") as lines:
        for line in lines:
            label, _, text = line.rstrip("\n").partition(" ")
            scores[label.removeprefix(LABEL)].append(score(text))
    negative = sorted(scores[NEGATIVE], reverse=True)
    kept = int(settings.keep * len(negative))
    threshold = negative[min(kept, len(negative) - 1)]
    true, false = (sum(value > threshold for value in scores[label]) for label in (POSITIVE, NEGATIVE))
    if not kept or not true:
        raise AtomError(
            f"classifier {settings.name} keeps nothing: keep = {settings.keep:g} of {len(negative)} held-out negative "
            f"examples is a threshold of {threshold:.3f}, above which {true} of {len(scores[POSITIVE])} positive ones "
            "score; raise keep or documents, or name other sources"
        )
    return {"threshold": threshold, "precision": true / (true + false), "recall": true / len(scores[POSITIVE])}


def estimate(config: ClassifierConfig) -> Estimate:
    """Returns the resources for documents of 4 kB: 1.1 core seconds a MB were measured, in one thread."""
    drawn = config.classifier.documents * len((*config.classifier.positive, *config.classifier.negative))
    return Estimate(cpu_seconds=drawn * 4.4e-3, fixed=True, memory_bytes=1_000_000_000, disk_bytes=200_000_000)


STAGE = Stage("classifier", VERSION, ClassifierConfig, run, estimate=estimate)
