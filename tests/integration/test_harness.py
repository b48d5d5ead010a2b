"""lm-evaluation-harness on a release's model: an offline task from a YAML file, against plain transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from release.audit import harness
from tests.fixtures import release_fixtures

TASK = """
task: next_words
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{label}}}}"
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("harness")
    release_fixtures.save_model(folder / "model", seed=3)
    return folder


def log_probability(folder: Path, context: str, text: str) -> float:
    """log p(text | context) by transformers alone."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before, after = tokenizer(context).input_ids, tokenizer(text).input_ids
    with torch.inference_mode():
        logits = model(torch.tensor([before + after])).logits[0, len(before) - 1 : -1]
    return float(torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(after)[:, None]).sum())


def test_a_task_from_a_yaml_file_runs_offline_and_scores_as_transformers_does(
    release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    rows = [
        {"question": "the quick brown:", "choices": ["fox", "dog", "sum"], "label": 0},
        {"question": "2+2=", "choices": ["4", "5"], "label": 1},
    ]
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/next_words.yaml").write_text(TASK.format(data=data))

    results = harness.evaluate(harness.language_model(release / "model"), ["next_words"], tmp_path / "tasks")

    right = 0
    for row, sample in zip(rows, sorted(results["samples"]["next_words"], key=lambda s: s["doc_id"]), strict=True):
        expected = [log_probability(release / "model", row["question"], choice) for choice in row["choices"]]
        assert [pair[0][0] for pair in sample["resps"]] == pytest.approx(expected, abs=1e-4)
        right += expected.index(max(expected)) == row["label"]
    assert results["results"]["next_words"]["acc,none"] == right / 2


def test_what_is_missing_is_reported_in_a_sentence(
    release: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert harness.main([str(tmp_path)]) == 1
    assert harness.main([str(tmp_path), "--tasks", "arc_easy"]) == 2
    assert harness.main([str(release), "--tasks", "no_such_task"]) == 2
    lines = capsys.readouterr().err.splitlines()
    messages = [line for line in lines if line.startswith("release.audit.harness: ")]
    assert "Traceback" not in "".join(lines) and len(messages) == 3
    assert (
        "evidence/recipe.json" in messages[0]
        and "contains no model" in messages[1]
        and "no task no_such_task" in messages[2]
    )
