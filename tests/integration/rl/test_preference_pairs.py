"""Pairs of answers that others ordered: read from a local Hub and from files, and learned from by the reward model and DPO."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any, cast

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, sha256_file, write_manifest
from stages.evaluation.gates import RULES, Measurements
from stages.formats.table import read_table
from stages.rl import dpo, preference_pairs, reward_model
from stages.rl.algorithms.preferences import StoredPairs
from stages.rl.config import RlPhase
from tests.fixtures import rl_fixtures
from tests.fixtures.hub_fixtures import REPO, Hub, hub
from tests.fixtures.preference_fixtures import PHASE, REWARD, run, settings
from tests.fixtures.run_fixtures import RecordingReport

__all__ = ["hub"]


def helpsteer(n: int, score: int, **changes: Any) -> dict[str, Any]:
    """A row of HelpSteer3's preferences: negative scores prefer response1."""
    # The better answer has the letter e, and is the shorter one in three of four rows.
    good, bad = f"e{n}", (f"o{n}oo" if n % 4 else "o")
    answers = {"response1": good if score < 0 else bad, "response2": bad if score < 0 else good}
    return {
        "domain": ("general", "stem")[n % 2], "language": "english", "context": [{"role": "user", "content": f"say {n}"}],
        **answers, "overall_preference": score, "individual_preference": [{"score": score, "reasoning": "r"}], **changes,
    }  # fmt: skip


ROWS = [helpsteer(n, (-1) ** n * (1 + n % 3)) for n in range(80)]
SOURCE = dict(
    name="steer", preferred_by="humans", prompt_field="context", answer_fields=["response1", "response2"],
    preference_field="overall_preference", domain_field="domain", license="CC-BY-4.0", license_evidence="the card",
)  # fmt: skip


def from_file(folder: Path, rows: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    place = {"source": "rows", "path": str(path), "digest": f"sha256:{sha256_file(path)}", "origin": "a test"}
    return {name: value for name, value in {**SOURCE, **place, **changes}.items() if value is not None}


def seal(
    source: dict[str, Any], inputs: dict[str, Artifact], out: Path, heldout: float = 0.3, **config: Any
) -> tuple[Artifact, RecordingReport]:
    out.mkdir()
    report, body = RecordingReport(), {"sources": [source], "heldout_fraction": heldout, "seed": 0, **config}
    preference_pairs.run(preference_pairs.PreferencesConfig.model_validate(body), inputs, out, out, report)
    return write_manifest(out, "preferences-test"), report


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return rl_fixtures.make(tmp_path_factory.mktemp("pairs"))


@pytest.fixture(scope="module")
def pairs(inputs: dict[str, Artifact], tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("stored")
    return seal(from_file(folder, ROWS), inputs, folder / "out")[0]


def test_rows_of_the_hub(hub: Hub, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """HelpSteer3's format at a commit: who is better by the sign, ties and everything unfit left out and counted."""
    conversation = [
        {"role": "user", "content": "say a"}, {"role": "assistant", "content": "a"}, {"role": "user", "content": "again"},
    ]  # fmt: skip
    unfit = [
        helpsteer(90, 0), helpsteer(91, -1, language="french"), helpsteer(92, -1, context=[]), helpsteer(93, -1, overall_preference=None),
        helpsteer(94, -1, response1="<|im_end|>"), helpsteer(95, -1, context="tell 3"), ROWS[0],
        helpsteer(96, -2, context=conversation), helpsteer(97, -1, response2=" "), helpsteer(98, -1, response2="e98"),
    ]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in [*ROWS, *unfit])
    commit = hub.commit({"preference/train.jsonl.gz": gzip.compress(lines.encode(), mtime=0)})
    source = {
        **SOURCE, "source": "hub", "repo": REPO, "revision": commit, "pattern": "preference/train.jsonl.gz",
        "format": "jsonl", "where": {"language": ["english"]},
    }  # fmt: skip
    sealed, report = seal(source, inputs, tmp_path / "out")
    facts = sealed.json("summary.json")["sources"]["steer"]
    assert facts["left_out"] == {
        "decontamination": 1, "duplicate": 1, "no pair": 2, "special token": 1, "tie": 2, "without a preference": 1,
    }  # fmt: skip
    assert (facts["pairs"], facts["rows"], facts["preferred_by"]) == (81, 89, "humans")
    assert facts["licenses"] == {"CC-BY-4.0": 81} and facts["domains"] == {"general": 41, "stem": 40}
    assert report.notes == [
        "preferences steer: 81 pairs; left out: 1 decontamination, 1 duplicate, 2 no pair, 1 special token, 2 tie, "
        "1 without a preference"
    ]
    table = read_table(sealed / "preferences.parquet").to_pylist()
    assert all(row["chosen"].startswith("e") and row["rejected"].startswith("o") for row in table)
    assert [row["strength"] for row in table[:4]] == [1.0, 2.0, 3.0, 1.0]
    assert table[0]["origin"] == f"https://huggingface.co/datasets/{REPO}/blob/{commit}/preference/train.jsonl.gz:1"
    assert json.loads(table[-1]["messages"]) == conversation
    assert 0 < sum(row["heldout"] for row in table) == facts["heldout"] < 40
    # A count chooses by hash, the same rows from rows in another order, and strength drops the weak ones.
    turned = from_file(tmp_path, ROWS[::-1], count=10, min_strength=2)
    chosen = [read_table(seal(turned, inputs, tmp_path / f"{n}")[0] / "preferences.parquet") for n in range(2)]
    assert chosen[0] == chosen[1] and chosen[0].num_rows == 10 and min(chosen[0]["strength"].to_pylist()) == 2


def test_licenses_by_row_and_lists_of_messages(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """Generic rows: the prompt is what both lists of messages share, and a row's license decides on the row."""

    def row(n: int, license: str | None, asked: str = "say") -> dict[str, Any]:
        chosen, rejected = (
            [{"role": "user", "content": ask}, {"role": "assistant", "content": text}]
            for ask, text in ((f"say {n}", "e"), (f"{asked} {n}", "o"))
        )
        return {"chosen": chosen, "rejected": rejected, "license": license, "margin": 1.5}

    rows = [row(1, "mit"), row(2, None), row(3, "CC-BY-NC-4.0"), row(4, "who knows"), row(5, "mit", asked="tell")]
    fields = {"prompt_field": None, "answer_fields": None, "chosen_field": "chosen", "rejected_field": "rejected"}
    fields |= {"preference_field": "margin", "domain_field": None, "preferred_by": "AI", "license_field": "license"}
    source = from_file(
        tmp_path, rows, **fields, license_strings={"mit": "MIT"}, license_allow=["MIT", "CC-BY-4.0"]
    )  # fmt: skip
    sealed, _ = seal(source, inputs, tmp_path / "out")
    facts = sealed.json("summary.json")["sources"]["steer"]
    assert facts["licenses"] == {"CC-BY-4.0": 1, "MIT": 1} and facts["preferred_by"] == "AI"
    assert facts["left_out"] == {"license/not-allowed": 1, "license/unmapped": 1, "no pair": 1}
    table = read_table(sealed / "preferences.parquet").to_pylist()
    assert [(json.loads(r["messages"])[0]["content"], r["strength"]) for r in table] == [("say 1", 1.5), ("say 2", 1.5)]


def test_trees_of_messages(hub: Hub, inputs: dict[str, Artifact], tmp_path: Path) -> None:
    """OpenAssistant's columns: of three ranked replies three pairs, below the conversation to which they reply."""

    def message(
        id: str, parent: str | None, role: str, text: str, rank: int | None = None, **more: Any
    ) -> dict[str, Any]:
        columns = {"message_id": id, "parent_id": parent, "role": role, "text": text, "rank": rank, "lang": "en"}
        return {**columns, "deleted": False, **more}

    rows = [
        message("1", None, "prompter", "say a"), message("2", "1", "assistant", "good", 0),
        message("3", "1", "assistant", "fair", 1), message("4", "1", "assistant", "bad", 2),
        message("5", "2", "prompter", "again"), message("6", "5", "assistant", "better", 0, lang="de"),
        message("7", "5", "assistant", "worse", 1), message("8", "5", "assistant", "not ranked"),
        message("9", "gone", "assistant", "x", 0), message("10", "gone", "assistant", "y", 1),
        message("11", "5", "assistant", "removed", 2, deleted=True),
    ]  # fmt: skip
    commit = hub.commit({"trees.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    source = {
        "source": "hub-trees", "name": "trees", "preferred_by": "humans", "repo": REPO, "revision": commit,
        "pattern": "trees.jsonl", "format": "jsonl", "license": "Apache-2.0", "license_evidence": "the card",
        "domain_field": "lang", "where": {"deleted": ["False"]},
    }  # fmt: skip
    sealed, _ = seal(source, inputs, tmp_path / "out")
    table = read_table(sealed / "preferences.parquet").to_pylist()
    assert [(row["chosen"], row["rejected"], row["strength"], row["domain"]) for row in table] == [
        ("good", "fair", 1.0, "en"), ("good", "bad", 2.0, "en"), ("fair", "bad", 1.0, "en"), ("better", "worse", 1.0, "de"),
    ]  # fmt: skip
    assert [(m["role"], m["content"]) for m in json.loads(table[3]["messages"])] == [
        ("user", "say a"), ("assistant", "good"), ("user", "again"),
    ]  # fmt: skip
    assert sealed.json("summary.json")["sources"]["trees"]["left_out"] == {"no pair": 1}
    section = preference_pairs.PreferenceSection.model_validate({"sources": [source]})
    assert preference_pairs.PreferenceSection.model_validate(section.model_dump(mode="json")) == section
    with pytest.raises(ValidationError, match="chosen_field has no effect on trees, whose ranks make the pairs"):
        preference_pairs.PreferenceSection.model_validate({"sources": [{**source, "chosen_field": "text"}]})


@pytest.mark.parametrize(
    "changes, sentence",
    [
        ({"answer_fields": None}, "the answers are in chosen_field and rejected_field, or in answer_fields"),
        ({"preference_field": None}, "answer_fields need prompt_field, and preference_field"),
        ({"license_allow": ["MIT"]}, r"its license CC-BY-4.0 is not in license_allow"),
    ],
)
def test_mistakes_of_a_source(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        preference_pairs.PreferenceSection.model_validate({"sources": [from_file(tmp_path, ROWS, **changes)]})


def test_wrong_fields_and_files_are_refused(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    with pytest.raises(AtomError, match=r"^preferences steer: of 80 rows only 0 are pairs .* correct the fields, or"):
        seal(from_file(tmp_path, ROWS, prompt_field="prompt"), inputs, tmp_path / "out")
    source = from_file(tmp_path, ROWS)
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(RecipeError, match=r"^preferences: .* has the digest .* restore it, or change digest$"):
        seal(source, inputs, tmp_path / "other")


@pytest.mark.numeric
def test_the_reward_model_is_measured_beside_length(
    inputs: dict[str, Artifact], pairs: Artifact, tmp_path: Path
) -> None:
    """It learns what people prefer, and its accuracy stands by domain beside that of the rule that length is."""
    artifacts = {"preferences": pairs, "init": inputs["init"], "tokenizer": inputs["tokenizer"]}
    run(reward_model, settings(REWARD, max_tokens=48), artifacts, tmp_path / "work", tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    accuracy = summary["heldout_accuracy"]
    assert accuracy["last"] > 0.9 and accuracy["interval"][0] > 0.5, summary
    assert summary["preferred_by"] == {"humans": summary["heldout_pairs"]}
    assert summary["longer_is_better"]["value"] < 0.45 and abs(summary["prefers_longer"] - 0.25) < 0.2
    domains = summary["domains"]
    assert list(domains) == ["general", "stem"] and domains["stem"]["longer_is_better"]["value"] == 0
    assert sum(part["pairs"] for part in domains.values()) == summary["heldout_pairs"]
    right = sum(part["accuracy"] * part["pairs"] for part in domains.values())
    assert right / summary["heldout_pairs"] == pytest.approx(accuracy["last"])
    measured = Measurements({}, {}, {}, {}, lambda model: (), lambda: 0, summary)
    judgement = RULES["reward_model_orders_pairs"].judge(measured, {})
    assert judgement is not None and judgement.ok, judgement
    worse = {**summary, "heldout_accuracy": {**accuracy, "last": 0.7}, "longer_is_better": {"value": 0.25}}
    refused = RULES["reward_model_orders_pairs"].judge(Measurements({}, {}, {}, {}, lambda m: (), lambda: 0, worse), {})
    assert refused is not None and not refused.ok, "preferring the shorter answer is right in 0.75"


@pytest.mark.numeric
def test_dpo_learns_from_stored_pairs(inputs: dict[str, Artifact], pairs: Artifact, tmp_path: Path) -> None:
    """The reference of stored pairs is the policy of the round, so the first margin is 0; then they are preferred."""
    stored = {"count": 16, "max_tokens": 48}
    phase = {**PHASE, "sft_tasks": None, "stored_pairs": stored, "steps": 2, "updates": 1}
    phase |= {"optimizer": rl_fixtures.OPTIMIZER, "release_checkpoint_interval": 2}
    del phase["nll_coef"]
    # No pair of its own answers is wide enough.
    config = settings(phase, min_margin=1.5)
    run(dpo, config, {**inputs, "preferences": pairs}, tmp_path / "w1", tmp_path / "o1")
    lines = [line for line in rl_fixtures.lines(tmp_path / "o1") if "pair_loss" in line]
    assert [line["stored_pairs"] for line in lines] == [16, 16]
    assert all(abs(line["pair_margin"]) < 1e-4 and line["pairs"] == 0 for line in lines), lines
    several = settings({**phase, "updates": 4, "steps": 3, "release_checkpoint_interval": 3}, min_margin=1.5)
    run(dpo, several, {**inputs, "preferences": pairs}, tmp_path / "w2", tmp_path / "o2")
    last = [line for line in rl_fixtures.lines(tmp_path / "o2") if "pair_loss" in line][-1]
    assert last["pair_margin"] > 0.1 and last["pair_loss"] < 0.68, last
    # Both kinds of pairs begin with the first update, so that neither reaches the last one of these.
    changed = {"stored_pairs": stored | {"count": 13}, "updates": 16, "steps": 1, "release_checkpoint_interval": 1}
    run(dpo, settings({**phase, **changed}), {**inputs, "preferences": pairs}, tmp_path / "w3", tmp_path / "o3")
    (line,) = [line for line in rl_fixtures.lines(tmp_path / "o3") if "stored_pairs" in line]
    assert line["idle"] and 16 - 13 <= line["pairs"] < 16, line


def test_a_prompt_is_on_one_side(inputs: dict[str, Artifact], tmp_path: Path) -> None:
    again = [helpsteer(n, -1, response1=f"e{n}e") for n in range(80)]
    sealed, _ = seal(from_file(tmp_path, [*ROWS, *again]), inputs, tmp_path / "out")
    sides: dict[str, set[bool]] = {}
    for row in read_table(sealed / "preferences.parquet").to_pylist():
        sides.setdefault(row["messages"], set()).add(row["heldout"])
    assert len(sides) == 80 and all(len(side) == 1 for side in sides.values())
    assert set().union(*sides.values()) == {True, False}


def test_pairs_are_read_one_at_a_time(pairs: Artifact) -> None:
    table = preference_pairs.read(pairs, False, 48)
    stored = StoredPairs(table)
    assert len(stored) == table.num_rows and stored[0].messages[0]["role"] == "user"
    with pytest.raises(AtomError, match="has no pair to learn from of at most 3 tokens an answer; raise max_tokens"):
        preference_pairs.read(pairs, False, 3)


def test_prompts_of_the_hub_are_tasks_for_the_reward_model(hub: Hub) -> None:
    from stages.rl.rollout.tasks import TasksConfig

    rows = [*ROWS[:6], ROWS[0], helpsteer(9, 1, context="<think>"), helpsteer(8, 1, language="french")]
    commit = hub.commit({"preference/train.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()})
    source = {
        "source": "hub-prompts", "repo": REPO, "revision": commit, "pattern": "preference/*", "format": "jsonl",
        "prompt_field": "context", "where": {"language": ["english"]}, "kind": "chat", "count": 50, "license": "CC-BY-4.0",
        "license_evidence": "the card",
    }  # fmt: skip
    (parsed,) = TasksConfig.model_validate({"sources": [source], "seed": 0}).sources
    tasks = list(parsed.rows(0, set()))
    asked = sorted(task["responses_create_params"]["input"][0]["content"] for task in tasks)
    assert asked == [f"say {n}" for n in range(6)] and {task["verifier"] for task in tasks} == {"reward-model"}
    phase = RlPhase.model_validate({**rl_fixtures.PHASE, "tasks": [source]})
    assert phase.tasks[0].verifier == "reward-model"


def test_a_task_is_searched_in_all_of_its_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    from stages.rl.rollout import tasks

    item = "which of these metals melts at the lowest temperature of all"
    turns = [[item, "mercury", "thank you"], ["hello", "hello", "thank you"]]
    rows = [
        {"id": f"{n}", "responses_create_params": {"input": [{"role": "user", "content": text} for text in texts]}}
        for n, texts in enumerate(turns)
    ]
    monkeypatch.setattr(tasks, "item_texts", lambda benchmarks: iter([("metals/1", item)]))
    report = RecordingReport()
    kept = tasks._without_shared_words(cast(Any, rows), cast(Any, None), 8, cast(Any, report))
    assert [row["id"] for row in kept] == ["1"] and "metals/1" in str(report.notes)
