"""Alarms: the share of a source that a rule removes, of the documents that reach it."""

from __future__ import annotations

import pytest

from pipeline.core.errors import AtomError
from stages.data.curate.alarms import Loss, dedup_losses, filter_losses, require_acknowledged
from stages.data.recipe import DataRecipe
from tests.fixtures.run_fixtures import RecordingReport

REMOVED = {"opt_out": 10, "failed/parse": 2, "c4/javascript": 8, "c4/curly_bracket": 20, "pii/x": 0, "mine/late": 30}


def test_a_share_is_that_of_the_documents_that_reached_the_rule() -> None:
    losses = {loss.rule: loss for loss in filter_losses("web", ["c4", "pii"], 100, REMOVED)}
    before = ["opt_out", "license", "failed", "generation"]
    assert list(losses) == [*before, "c4", "pii", "secrets", "decontamination", "mine"]
    assert losses["c4"] == Loss("web", "c4", 28, 88)
    assert losses["mine"] == Loss("web", "mine", 30, 60) and losses["mine"].share == 0.5
    removed = {"c4/javascript": 60, "exact_duplicate": 10, "near_duplicate": 25, "opt_out": 4}
    assert dedup_losses("web", 100, 1, removed) == [
        Loss("web", "opt_out", 4, 100),
        Loss("web", "deduplication", 35, 36),
    ]
    assert Loss("web", "c4", 0, 0).share == 0.0


def test_every_alarm_is_in_the_sentence_and_acknowledged_ones_are_notes() -> None:
    losses = [Loss("web", rule, 90, 100) for rule in ("c4", "pii")] + [Loss("few", "c4", 19, 19)]
    report = RecordingReport()
    with pytest.raises(AtomError, match=r"source web: c4 removes 90 of 100 .*; also web: pii removes 90 of 100"):
        require_acknowledged(losses, 0.5, {}, report)
    with pytest.raises(AtomError, match=r"source web: pii .* acknowledged_removals: \{pii: 0.9\} of that source$"):
        require_acknowledged(losses, 0.5, {"web": {"c4": 0.9}, "few": {"pii": 1}}, report)
    assert report.notes == ["alarm: web: c4 removes 90 of 100 documents, which the data recipe acknowledges up to 0.9"]
    require_acknowledged(losses, 0.9, {}, report)


def test_an_acknowledged_rule_is_one_of_the_source() -> None:
    reader = {"reader": "problems", "tasks": {"add": 1.0}, "form": "plain", "count": 10}
    source = {"name": "sums", "kind": "problems", "license": "Apache-2.0", "license_evidence": "e", "origin": "o"}
    recipe = {"name": "corpus", "description": "d", "sources": [{**source, "reader": reader}]}
    recipe["sources"][0]["acknowledged_removals"] = {"deduplication": 0.9}  # type: ignore[index]
    config = DataRecipe.model_validate(recipe)
    assert config.filter_config(0)["sources"][0]["acknowledged_removals"] == {"deduplication": 0.9}
    assert config.dedup_config()["sources"][0]["acknowledged_removals"] == {"deduplication": 0.9}
    recipe["sources"][0]["acknowledged_removals"] = {"dedup": 0.9}  # type: ignore[index]
    with pytest.raises(ValueError, match="dedup is no rule of this source; it has opt_out, license"):
        DataRecipe.model_validate(recipe)
