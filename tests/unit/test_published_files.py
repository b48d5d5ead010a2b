"""The list of published files: it names everything that the build makes, and each copy goes where it belongs."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.core.store import Artifact, FileRow
from release import published_files
from release.layout import ALL_SUMS, GATES, PAGE, SUMS, folders_of
from release.opened_release import Release
from release.published_files import NAMES, PLACED, made, placement, unexplained
from release.standards import bundle

FOLDERS = folders_of(["init", "base", "mid", "sft"])


def placed(node: str, *files: str) -> list[str]:
    rows = tuple(FileRow(file, 1, "0" * 64) for file in files)
    return [target for _, target in placement(node, Artifact(node, "", Path(), rows), FOLDERS)]


def test_every_document_of_the_standards_is_on_the_list() -> None:
    for path in (*bundle.DOCUMENTS, bundle.RECORDED, f"dataset/{bundle.PYTHON_LICENSE}"):
        assert made(path), path


def test_an_entry_is_a_copy_or_states_how_it_is_made() -> None:
    for _, listed in PLACED:
        for file in listed.files:
            assert not (file.node and file.origin), file
            assert bool(file.node) == bool(file.source), file


@pytest.mark.parametrize(
    "node, file, targets",
    [
        ("order-midtrain", "part-00000.parquet", ["dataset/order/midtrain/part-00000.parquet"]),
        ("acquire-prose", "source.json", ["dataset/sources/prose.json"]),
        ("filter", "curation.json", ["dataset/curation.json"]),
        ("classifier-quality", "model.bin", []),
        ("pretrain", "step-000040/state.json", ["checkpoints/pretrain-step-40/state.json"]),
        ("pretrain@40", "state.json", ["checkpoints/pretrain-step-40/state.json"]),
        ("size-1", "training.jsonl", ["evidence/training/size-1/training.jsonl"]),
        ("reward", "training.jsonl", ["evidence/training/reward/training.jsonl"]),
        ("rlvr", "rollouts.parquet", ["dataset/rl/rlvr/rollouts.parquet"]),
        ("export-sft", "model/config.json", ["model/config.json"]),
        ("export-init", "model/config.json", []),
        ("variant-fp8", "model/tokenizer.json", ["variant-fp8/tokenizer.json"]),
        ("variant-fp8", "items.parquet", ["variant-fp8/evaluation/items.parquet"]),
        ("contamination", "report.json",
         ["dataset/evaluation/contamination/report.json", "model/evaluation/contamination/report.json"]),
        ("baselines", "baselines.parquet", ["dataset/evaluation/baselines/baselines.parquet"]),
        ("filter", "unknown.bin", []),
        ("pass-rates-rlvr", "pass_rates.json", ["dataset/rl/rlvr/pass_rates.json"]),
        ("pass-rates-rlvr", "answers.parquet", []),
    ],
)  # fmt: skip
def test_a_copy_has_its_place(node: str, file: str, targets: list[str]) -> None:
    assert placed(node, file) == targets


def test_a_card_gets_the_scores_and_logs_of_earlier_models_and_not_of_later_ones() -> None:
    copies = ["model-base/evaluation/base.json", "model-mid/evaluation/base.json", "model/evaluation/base.json"]
    assert placed("evaluate-base", "scores.json") == ["dataset/evaluation/base/scores.json", *copies]
    assert placed("midtrain", "training.jsonl") == [
        "evidence/training/midtrain/training.jsonl",
        "model-mid/training/midtrain.jsonl",
        "model/training/midtrain.jsonl",
    ]
    assert placed("solve-sft", "scores.json")[1:] == ["model/evaluation/test/sft.json"]


def test_only_checksums_gates_and_the_page_need_no_origin() -> None:
    paths = [ALL_SUMS, f"dataset/{SUMS}", GATES, PAGE, "model/config.json", "code/README.md"]
    assert unexplained({"code/README.md": {"generated": "x"}}, paths) == ["model/config.json"]


def test_names_are_used() -> None:
    text = "".join(file.path + file.node + file.source for _, listed in PLACED for file in listed.files)
    text += "".join([*published_files.PLACES, *(file.path for file in published_files.LISTS["repository"].files)])
    assert not [name for name in NAMES if f"{{{name}}}" not in text]


def test_a_release_is_read_once(tmp_path: Path) -> None:
    (tmp_path / "evidence/statements").mkdir(parents=True)
    (tmp_path / "evidence/statements/a.json").write_text("{}")
    release = Release(tmp_path, "evidence")
    assert list(release.statements.values()) == [{}]
    (tmp_path / "evidence/statements/a.json").unlink()
    assert release.statements and not Release(tmp_path, "evidence").statements
    assert release.dataset == tmp_path and Release(tmp_path).dataset == tmp_path / "dataset"
