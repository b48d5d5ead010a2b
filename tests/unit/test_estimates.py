"""What the data stages need follows from the expected sizes of their sources."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline.core.stage import Estimate
from pipeline.graph import plan, supply
from pipeline.graph import recipe as recipes
from pipeline.graph.dag import State
from pipeline.launch import cluster_profile
from pipeline.operations.fit import estimate_costs
from stages import graph
from stages.data import estimates
from stages.data.acquire import acquire_stage
from stages.data.curate import dedup_stage, duplicates_stage, filter_stage, representatives_stage
from stages.data.estimates import Size
from stages.data.order import order_stage, tokenize_stage
from stages.data.recipe import load
from tests.fixtures import ROOT
from tests.fixtures.block_fixtures import C4

SIZE = {"documents": 2_000_000, "bytes": 8_000_000_000}


def estimates_of(
    folder: Path, *sizes: dict[str, int] | None, steps: tuple[dict[str, str], ...] = ()
) -> dict[str, Estimate]:
    """The estimates of the data stages for a recipe with a source of each size."""
    fixed = {"kind": "prose", "license": "CC0-1.0", "license_evidence": "none", "origin": "test"}
    sources = [
        {"name": f"s{n}", **fixed, "reader": {"reader": "jsonl", "path": "."}, "expected": size, "parts": 50,
         "steps": list(steps)}
        for n, size in enumerate(sizes)
    ]  # fmt: skip
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump({"name": "data", "description": "Test.", "sources": sources}))
    recipe = load(path)
    configs = [
        (acquire_stage.STAGE, recipe.acquire_config("s0", 0)), (filter_stage.STAGE, recipe.filter_config(0)),
        (duplicates_stage.STAGE, recipe.duplicates_config()),
        (representatives_stage.STAGE, recipe.representatives_config()),
        (dedup_stage.STAGE, recipe.dedup_config()), (tokenize_stage.STAGE, recipe.tokenize_config()),
    ]  # fmt: skip
    return {stage.name: stage.estimate(stage.config.model_validate(config)) for stage, config in configs}


def test_an_estimate_is_the_law_at_the_size_of_all_sources(tmp_path: Path) -> None:
    one, two = estimates_of(tmp_path, SIZE), estimates_of(tmp_path, SIZE, SIZE)
    for name in one:
        law = estimates.LAWS[name]
        serial, text = law.serial_seconds_per_million * 2, law.seconds_per_mb * 8000
        assert one[name].cpu_seconds == pytest.approx(serial + text) and one[name].serial_seconds == serial
        assert one[name].disk_bytes == int(law.disk * SIZE["bytes"]) and not one[name].fixed
        assert one[name].memory_bytes == int(law.memory + law.memory_per_document * SIZE["documents"])
        sources = 1 if name == "acquire" else 2
        assert two[name].cpu_seconds == pytest.approx(sources * (serial + text))


def test_steps_take_their_time_beside_the_law(tmp_path: Path) -> None:
    steps = {"step": "language"}, {"block": C4, "words": "atom"}
    plain, filtered = estimates_of(tmp_path, SIZE), estimates_of(tmp_path, SIZE, steps=steps)
    seconds = 8000 * (estimates.STEP_SECONDS["language"] + estimates.STEP_SECONDS["C4QualityFilter"])
    assert filtered["filter"].cpu_seconds == pytest.approx(plain["filter"].cpu_seconds + seconds)
    assert filtered["filter"].serial_seconds == plain["filter"].serial_seconds


def test_every_step_of_a_packaged_recipe_has_a_measured_cost() -> None:
    """`bench/filters.py --steps` measures them; a plan would take a step without one for free."""
    files = sorted((ROOT / "data_recipes").glob("*.yaml"))
    recipes = [load(file) for file in files if not file.name.endswith(".lock.yaml")]
    steps = {step.name: step for recipe in recipes for source in recipe.sources for step in source.steps}
    assert len(recipes) >= 5 and steps.keys() >= {"python_syntax", "URLFilter", "RegexFilter", "classifier"}
    assert [name for name, step in steps.items() if not step.seconds_per_mb] == []


def test_core_hours_of_a_billion_tokens_follow_from_the_steps() -> None:
    rows = {row.source: row for row in graph.supply(recipes.load("atom-1b-a300m"))}
    law, seconds = estimates.LAWS["filter"].seconds_per_mb, estimates.STEP_SECONDS
    by_hand = (law + seconds["code_shape"] + seconds["PIIFormatter"]) * 4000 / 3600
    assert rows["code"].text == "code" and rows["code"].curation_core_hours == pytest.approx(by_hand)
    assert rows["web"].text == "web" and rows["web"].curation_core_hours > 2 * by_hand
    sentences = supply.curation_costs(list(rows.values()))
    (code,) = [each for each in sentences if each.startswith("curation of code,")]
    assert f"{by_hand:.2f} code" in code
    assert len(sentences) == len({row.text for row in rows.values()})


def test_packages_take_longer_to_read_than_plain_text() -> None:
    """A plan said seconds for what took half an hour."""
    recipe = load("packages")
    seconds = {}
    for name in ("manuals", "programs"):
        config = acquire_stage.AcquireConfig.model_validate(recipe.acquire_config(name, 0))
        assert config.source.expected is not None
        seconds[name] = acquire_stage.STAGE.estimate(config).cpu_seconds / config.source.expected.bytes * 1e6
    assert seconds["manuals"] > 5 * seconds["programs"] > 10 * estimates.LAWS["acquire"].seconds_per_mb


def test_published_files_are_those_of_the_parts(tmp_path: Path) -> None:
    stages = estimates_of(tmp_path, SIZE, SIZE, steps=({"step": "language"},))
    size = int(estimates.LAWS["dedup"].disk * SIZE["bytes"])
    published = {
        name: {files.folder: (files.files, files.bytes) for files in stages[name].published} for name in stages
    }
    assert published["dedup"] == {
        "kept/s0": (50, size), "kept/s1": (50, size), "dispositions/s0": (50, 0), "dispositions/s1": (50, 0)
    }  # fmt: skip
    assert stages["dedup"].published_bytes == 2 * size
    assert published["tokenize"] == {"tokens/documents/s0": (50, 0), "tokens/documents/s1": (50, 0)}
    assert published["filter"] == {"measures/s0": (50, 0), "measures/s1": (50, 0)}
    assert estimates_of(tmp_path, SIZE)["filter"].published == (), "no step measures"


def test_without_the_size_of_every_source_the_estimate_is_of_a_small_corpus(tmp_path: Path) -> None:
    assert estimates.total([Size(**SIZE), None]) is None and estimates.total([]) is None
    unknown = estimates_of(tmp_path, SIZE, None)
    assert unknown["acquire"].serial_seconds is not None, "its own source has a size"
    for name in ("filter", "duplicates", "representatives", "dedup", "tokenize"):
        assert unknown[name].fixed and unknown[name].serial_seconds is None
    assert estimates_of(tmp_path, None)["acquire"] == Estimate(memory_bytes=int(estimates.LAWS["acquire"].memory))


def test_tasks_shorten_an_order() -> None:
    """One of 1.2 billion rows takes an hour of one core, and minutes of an array."""
    mix = {"phase": "pretrain", "mix": {"web": 1.0}, "sequence_length": 2048, "rows": 1200, "steps": 10**6, "seed": 0}
    config = order_stage.OrderConfig.model_validate(mix)
    profile: Any = cluster_profile.load(str(ROOT / "pipeline/clusters/h100-pyxis.yaml"))
    shards = order_stage.STAGE.shards(config)
    row = plan.StagePlan(State("order-pretrain", "order-0", "to run"), order_stage.estimate(config), {}, 1, {}, None)
    (alone,), (array,) = (
        estimate_costs([replace(row, shards=count)], profile, small=False).uses for count in (1, shards)
    )
    assert 0.8 < alone.hours < 1 and 4 / 60 < array.hours < 6 / 60


def test_the_tasks_of_an_array_divide_what_is_not_serial() -> None:
    profile: Any = cluster_profile.load(str(ROOT / "pipeline/clusters/h100-pyxis.yaml"))
    row = plan.StagePlan(State("dedup", "dedup-0", "to run"), Estimate(7200, 3600), {}, 1, {}, None, shards=10)
    (alone,) = estimate_costs([replace(row, shards=1)], profile, small=False).uses
    (array,) = estimate_costs([row], profile, small=False).uses
    assert (alone.hours, array.hours) == pytest.approx((2, 1.1)) and alone.core_hours == array.core_hours == 2
