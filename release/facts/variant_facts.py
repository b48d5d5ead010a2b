"""The facts of a variant: what it loses, as its tables give it, and as its `loss.json` states it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.core.errors import CheckFailed
from release.facts.published_tables import read_json, read_rows
from release.layout import LOSS, VARIANT
from release.repositories import model_folders
from stages.evaluation.scores import ModelScores
from stages.export.variants.registry import DISTILLED, VARIANTS, Variant
from stages.export.variants.stage import VariantLoss
from stages.train.imported_weights import NAME as BASE


@dataclass(frozen=True)
class VariantFacts:
    """The content of a variant's repository.

    Attributes:
        variant: The variant.
        loss: Its loss.json.
        file: The file of its weights, if it is one; else "".
        base: The repository on whose model it is an adapter; else "".
    """

    variant: Variant
    loss: VariantLoss
    file: str
    base: str = ""

    @property
    def is_student(self) -> bool:
        """True if it is a smaller model, into which the original was distilled."""
        return self.loss["variant"] == DISTILLED

    def figures(self) -> dict[str, float]:
        """Returns the measured figures of the variant, for bills of materials."""
        return {
            "bits per byte": self.loss["bits_per_byte"]["variant"]["value"],
            "exact match": self.loss["accuracy"]["variant"]["value"],
            "divergence from the original in nats": self.loss["divergence"]["value"],
        }


@dataclass(frozen=True)
class Original:
    """The exported model of a variant.

    Attributes:
        bytes: Of its weights.
        scores: Its scores.
        answers: {problem: its greedy answer}
    """

    bytes: int
    scores: ModelScores
    answers: Mapping[str, str]


def read_variant_facts(folder: Path) -> VariantFacts:
    """Raises CheckFailed for a variant that is unknown to this atom."""
    loss: VariantLoss = read_json(folder / LOSS)
    if (name := loss["variant"]) not in VARIANTS:
        raise CheckFailed(f"{LOSS} names the variant {name}, which this atom does not know; use a later one")
    file = next((path.name for path in sorted(folder.glob("*.gguf"))), "")
    base = str(read_json(folder / BASE)["repo"]) if VARIANTS[name].writer == "peft" else ""
    return VariantFacts(VARIANTS[name], loss, file, base)


def base_of(release: Path, folder: Path) -> Path:
    """Returns the model in a release on which the variant in a folder is an adapter.

    Raises CheckFailed if it holds none.
    """
    from stages.export.variants.adapter_files import digests

    stated = read_json(folder / BASE)["files"]
    for name in model_folders(release):
        if digests(release / name) == stated:
            return release / name
    raise CheckFailed(f"{folder.name}/{BASE} names weights that are none of the release's models; build it again")


def read_variants(release: Path, folders: Iterable[str]) -> dict[str, VariantFacts]:
    """Returns {end of the repository's name: facts} of the variants in these folders of a release."""
    return {name.removeprefix(VARIANT): read_variant_facts(release / name) for name in folders}


def read_original(model: Path, evaluation: Path) -> Original:
    """Reads the original of the variants.

    Args:
        model: The folder of the model.
        evaluation: The folder of its scores and answers in the dataset.
    """
    from stages.export.variants.stage import weight_bytes

    answers = {row["id"]: row["output"] for row in read_rows(evaluation / "items.parquet", ["id", "output"])}
    return Original(weight_bytes(model), read_json(evaluation / "scores.json"), answers)


def compute_loss(folder: Path, stated: VariantLoss, original: Original | None) -> VariantLoss:
    """Returns `loss.json` of a variant from its tables; what measured it is as stated.

    `original` is the model of the variant. If it is None, the figures that only the model shows are as stated, too.
    """
    from stages.evaluation.model_evaluation import summary as scores_of
    from stages.export.variants.stage import summary, weight_bytes

    tables: dict[str, Any] = {
        name: read_rows(folder / f"evaluation/{name}.parquet") for name in ("documents", "items", "divergence")
    }
    scores = scores_of(tables["documents"], tables["items"])
    # A variant's repository alone: what only the original shows is as stated.
    if original is None:
        all_of: Any = {f"{name}_all": stated[name]["original"] for name in ("bits_per_byte", "accuracy")}
        # Empty answers stand in for those of the original; what is computed from them is replaced below.
        known = Original(stated["bytes"]["original"], all_of, {row["id"]: "" for row in tables["items"]})
    else:
        known = original
    sizes = {"variant": weight_bytes(folder), "original": known.bytes}
    name: Any = stated["variant"]
    loss = summary(
        name, sizes, tables["divergence"], scores, known.scores, tables["items"], known.answers, stated["measured_by"]
    )
    return {**loss, "greedy": stated["greedy"]} if original is None else loss
