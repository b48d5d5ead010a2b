"""Task sets in a model's chat template: against lm-evaluation-harness by hand, with thinking, and with thinking that is
cut off."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.store import Artifact, write_manifest
from stages.evaluation import harness
from stages.evaluation.harness_chat import InConversation
from stages.formats import chat
from stages.formats.table import read_table
from stages.formats.tokenizer import SPECIAL_TOKENS
from stages.tasks import benchmarks
from stages.tasks.benchmarks import HarnessSection
from tests.fixtures import taught_fixtures
from tests.fixtures.taught_fixtures import Lesson

ASKED = {  # question: (answer of the model, what it says after its thinking)
    "What is 2+2?": ("", "4, surely."),
    "Why is 3+3 = 6?": ("", "It is 6."),
    "Is 1+3 = 5?": ("<think>\nno! not five\n</think>\n\nNo.", "No."),
    "Count.": ("<think>\n" + " ".join(map(str, range(20))) + "\n</think>\n\nDone.", ""),
}
CUT, ANSWER = 3, 24
GENERATE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: asked.jsonl, train: asked.jsonl}}}}
test_split: test
fewshot_split: train
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: ["!"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
"""
CHOOSE = """
task: choose
dataset_path: json
dataset_kwargs: {data_files: {test: asked.jsonl, train: asked.jsonl}}
test_split: test
fewshot_split: train
num_fewshot: 1
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["It is 6.", "4, surely.", "No."]
doc_to_target: 0
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    folder = tmp_path_factory.mktemp("taught")
    more = [Lesson({"messages": [{"role": "user", "content": q}]}, a, {}) for q, (a, _) in ASKED.items() if a]
    taught_fixtures.save(folder / "export/model", lessons=("plain", "reasoning"), more=more)
    return write_manifest(folder / "export", "export-taught")


@pytest.fixture
def section(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HarnessSection:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "asked.yaml").write_text(GENERATE.format(name="asked"))
    (folder / "choose.yaml").write_text(CHOOSE)
    rows = [{"question": question, "answer": answer} for question, (_, answer) in ASKED.items()]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = {"name": "own", "path": "own", "tasks": ["asked", "choose"], "license": "CC0-1.0"}
    return HarnessSection.model_validate({"folders": [{**own, "license_evidence": "this test", "format": "both"}]})


def test_a_set_in_conversation_is_what_the_harness_gives_by_hand(
    model: Artifact, section: HarnessSection, tmp_path: Path, run_stage: Any
) -> None:
    """Two of four answers, which think within their length and never say what ends an answer, and all choices. The
    harness scores a thinking that is cut off as an answer, and ends one that says a stop string."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    config = {"sets": section.task_sets(tmp_path, "recipe"), "forms": section.forms(True)}
    sealed = run_stage(benchmarks.STAGE, {"sets": config["sets"]}, {})
    scored = run_stage(harness.STAGE, config, {"model": model, "benchmarks": sealed})
    rows = [row for row in read_table(scored / "items.parquet").to_pylist() if row["form"] == "chat"]
    texts = {row["number"]: row for row in rows if row["metric"] == "exact_match"}
    assert [texts[n]["response"] for n in range(4)] == [answer for _, answer in ASKED.values()]
    # An empty answer would match the empty target of the one that was cut off.
    assert [texts[n]["value"] for n in range(4)] == [1, 1, 1, 0] and texts[CUT]["target"] == ""
    assert [row["value"] for row in rows if row["metric"] == "cut_off"] == [0, 0, 0, 1]
    scores = scored.json("scores.json")["own"]
    assert scores["asked"]["exact_match,none,chat"]["value"] == 0.75
    assert scores["asked"]["cut_off,none,chat"] == {**scores["asked"]["cut_off,none,chat"], "value": 0.25, "n": 4}
    assert scores["asked"].keys() == {"exact_match,none", "exact_match,none,chat", "cut_off,none,chat"}
    assert scored.json("tasks.json")["own"]["forms"] == ["raw", "chat"]

    end = SPECIAL_TOKENS.index("</think>")
    by_hand = HFLM(str(model / "model"), dtype="float32", device="cpu", batch_size=1, think_end_token=end)
    with benchmarks.in_folder(tmp_path / "own"):
        manager = benchmarks.task_manager(tmp_path / "own")
        theirs = lm_eval.simple_evaluate(
            by_hand, tasks=["asked", "choose"], task_manager=manager, bootstrap_iters=0, log_samples=True,
            apply_chat_template=True, fewshot_as_multiturn=True, verbosity="ERROR",
        )["samples"]  # fmt: skip
    said = [sample["filtered_resps"][0] for sample in sorted(theirs["asked"], key=lambda sample: sample["doc_id"])]
    assert said[:2] == [texts[n]["response"] for n in range(2)]
    assert said[2].startswith("<think>") and said[CUT].startswith("<think>\n0 1 2"), "the harness keeps thinking"
    ours = {row["number"]: json.loads(row["response"]) for row in rows if row["task"] == "choose"}
    for sample in theirs["choose"]:
        values = [pair[0] for pair in sample["filtered_resps"]]
        assert [pair[0] for pair in ours[sample["doc_id"]]] == pytest.approx(values, abs=1e-4)


def test_longer_answers_are_asked_for_than_a_task_has(
    model: Artifact, section: HarnessSection, tmp_path: Path, run_stage: Any
) -> None:
    config = {"sets": section.task_sets(tmp_path, "recipe"), "forms": {"own": ["chat"]}, "max_new_tokens": 200}
    sealed = run_stage(benchmarks.STAGE, {"sets": config["sets"]}, {})
    scored = run_stage(harness.STAGE, config, {"model": model, "benchmarks": sealed})
    rows = [row for row in read_table(scored / "items.parquet").to_pylist() if row["metric"] == "exact_match"]
    assert [row["response"] for row in rows] == ["4, surely.", "It is 6.", "No.", "Done."]
    assert scored.json("scores.json")["own"]["asked"]["cut_off,none,chat"]["value"] == 0


def test_a_special_token_in_a_question_is_text_and_one_of_the_template_is_not(model: Artifact) -> None:
    conversation = InConversation(harness.language_model(model / "model"), None)
    questions = ["a <|im_end|> b<think>", "What is 2+2?"]
    for question in questions:
        messages = [{"role": "user", "content": question}]
        ids = conversation.tok_encode(conversation.apply_chat_template(messages))
        special = [SPECIAL_TOKENS[token] for token in ids if token < len(SPECIAL_TOKENS)]
        assert special == ["<|im_start|>", "<|im_end|>", "<|im_start|>"]
        assert conversation.tokenizer.decode(ids) == chat.render(messages, ask=True)


def test_a_model_is_asked_in_the_forms_that_it_knows() -> None:
    section = HarnessSection(sets=("arc", "gsm8k"), formats={"gsm8k": "both"}, max_new_tokens=100, limit=10)
    assert section.forms(False) == {"arc": ("raw",), "gsm8k": ("raw",)}
    assert section.forms(True) == {"arc": ("raw",), "gsm8k": ("raw", "chat")}
    assert section.pieces(True) == section.pieces() + 1
    with pytest.raises(ValueError, match="formats names arcs, which is none of its task sets arc"):
        HarnessSection(sets=("arc",), formats={"arcs": "chat"})
