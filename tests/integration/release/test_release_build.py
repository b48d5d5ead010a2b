"""Building a release from a finished run, and what makes the gates refuse it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import write_manifest
from release.assembly import build_release as builder
from release.checks.check import Findings
from release.facts.model_facts import read_model_facts
from release.layout import ALL_SUMS, GATES, GATES_STATED, PAGE, SUMS
from release.opened_release import Release
from release.repositories import files_below
from release.schema import read_release
from stages.recipe import ReleaseSection
from tests.fixtures import ROOT, release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.run_fixtures import at_length


def replace_artifact(source: builder.BuildInput, node: str, tmp_path: Path, change) -> builder.BuildInput:
    """The same run with another, honestly stated artifact for one node."""
    old = source.artifacts[node]
    folder = tmp_path / "changed"
    shutil.copytree(old.path, folder)
    change(folder)
    (folder / "manifest.json").unlink()
    new = write_manifest(folder, old.key)
    parents = [source.artifacts[p] for p in release_fixtures.INPUTS[node]]
    statement = release_fixtures.write_statement(tmp_path, new, parents)
    changed = {**source.artifacts, node: new}
    # Consumers state the digest that they really used, so they are stated again.
    consumers = [n for n in changed if node in release_fixtures.INPUTS[n]]
    others = [
        release_fixtures.write_statement(tmp_path, changed[n], [changed[p] for p in release_fixtures.INPUTS[n]])
        for n in consumers
    ]
    statements = [path for path in source.statements if path.parent.name not in [changed[n].key for n in consumers]]
    return dataclasses.replace(source, artifacts=changed, statements=[*statements, statement, *others])


def require_refusal(source: builder.BuildInput, tmp_path: Path, gate: str, match: str) -> None:
    with pytest.raises(CheckFailed, match=f"refused by the gate {gate}: .*{match}"):
        builder.build(source, tmp_path / "home")
    folders = sorted(p.name for p in (tmp_path / "home/releases").iterdir())
    assert folders == ["tiny-0.1.0.refused"]
    gates = json.loads((tmp_path / "home/releases/tiny-0.1.0.refused/evidence/gates.json").read_text())
    assert not gates[gate]["ok"] and any(row["ok"] for row in gates.values())


def test_built_twice_is_the_same_bytes(built: Path, source, tmp_path: Path) -> None:
    second = builder.build(source, tmp_path)
    assert (second / ALL_SUMS).read_bytes() == (built / ALL_SUMS).read_bytes()
    assert (second / SUMS).read_bytes() == (built / SUMS).read_bytes()
    assert builder.build(source, tmp_path) == second and len(list((tmp_path / "releases").iterdir())) == 1


def test_the_folder_is_what_the_design_says(built: Path) -> None:
    paths = set(files_below(built))
    for path in (
        "model/model.safetensors", "model/README.md", "model/LICENSE", "model/SHA256SUMS", "model/chat_template.jinja",
        "model-base/config.json", "checkpoints/pretrain-step-0/state.json",
        "checkpoints/midtrain-step-2/optimizer.safetensors",
        "dataset/kept/prose/part-00000.parquet", "dataset/dispositions/prose/part-00000.parquet", "dataset/order/pretrain/part-00000.parquet",
        "dataset/evaluation/mid/items.parquet", "dataset/README.md", "code/release/assembly/build_release.py",
        "code/as-run/recipes/tiny.yaml",
        "dataset/croissant.json", "dataset/merkle.json", "dataset/evaluation/canary.json", "model/goldens.json",
        "evidence/attestations/gates.json", "evidence/attestations/evaluation-mid.json",
        "evidence/standards/bom.cdx.json", "evidence/standards/CITATION.cff", "dataset/NOTICE",
        "evidence/gates.json", "evidence/SHA256SUMS", "evidence/manifests/dedup.json", "evidence/environment.json",
        "site/index.html",
    ):  # fmt: skip
        assert path in paths, path
    assert not [
        p for p in paths if "sources/documents" in p or p.startswith("dataset/acquire")
    ]  # removed text stays removed
    gates = json.loads((built / "evidence/gates.json").read_text())
    assert len(gates) == 17 and not [name for name, gate in gates.items() if gate["ok"] is False]
    assert [name for name, gate in gates.items() if gate["ok"] is None] == ["runtimes"], "no program ran"
    stated = json.loads((built / "evidence/attestations/gates.json").read_text())["predicate"]
    assert stated["failedTests"] == [] and set(stated["passedTests"]) == gates.keys() - {"runtimes"}
    assert "16 of 17" in (page := (built / "site/index.html").read_text()) and "gates passed, 1 not judged" in page


@pytest.mark.parametrize("folder, target", [(".", "."), (".", "dataset"), ("dataset", ".")])
def test_a_question_in_the_folder_of_a_release_leaves_no_file_there(copy: Path, folder: str, target: str) -> None:
    """`atom trace .`, as a page of the documentation has it: without ATOM_HOME, and so with `runs` as the home folder."""
    before = sorted(copy.rglob("*"))
    command = [sys.executable, "-P", "-m", "pipeline.cli", "trace", target, "--text", "quick brown fox"]
    environment = {name: value for name, value in os.environ.items() if name != "ATOM_HOME"} | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command, cwd=copy / folder, env=environment, check=True)
    assert sorted(copy.rglob("*")) == before


def test_sha256sum_agrees(built: Path) -> None:
    for folder, name in (
        (built, ALL_SUMS),
        (built, SUMS),
        (built / "model", SUMS),
        (built / "checkpoints/pretrain-step-2", SUMS),
    ):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", name], cwd=folder, check=True)


def test_templates_hold_no_numbers() -> None:
    """Outside of code to copy, of the bound that the card explains, and of the temperature."""
    templates = sorted((Path(builder.__file__).parents[1] / "cards").glob("*.jinja"))
    assert len(templates) == 6
    for path in templates:
        text = re.sub(
            r"```.*?```|SHA256SUMS|FP8|1\.645 standard errors|temperature 1\b", "", path.read_text(), flags=re.DOTALL
        )
        assert not re.search(r"\d", text), path


def test_cards_are_valid_for_the_hub(built: Path) -> None:
    from huggingface_hub import DatasetCard, ModelCard

    card = ModelCard.load(built / "model/README.md")
    scores = json.loads((built / "model/evaluation/mid.json").read_text())
    assert (
        card.data.license == "apache-2.0"
        and card.data.base_model == "local/tiny-base"
        and card.data.datasets == ["local/tiny-data"]
    )
    measured = {r.dataset_config: r.metric_value for r in card.data.eval_results}
    assert (
        measured["add"] == scores["accuracy"]["add"]["value"]
        and measured["prose"] == scores["bits_per_byte"]["prose"]["value"]
    )
    data = DatasetCard.load(built / "dataset/README.md")
    assert data.data.license == "cc-by-4.0" and data.data.configs[0]["config_name"] == "prose"
    assert "exact_duplicate" in data.text and "PSF-2.0" in data.text


def test_a_wrong_number_on_a_card_is_found(built: Path, tmp_path: Path) -> None:
    """In a table as well as in the metadata."""
    from release.checks import cards

    copy = tmp_path / "model"
    shutil.copytree(built / "model", copy)
    checks: dict[str, Callable[[], Findings]] = {
        "0.750±": lambda: cards.model_card(copy, read_model_facts(copy)),
        "value: 0.75": lambda: cards.card_metadata(Release(copy, "model")),
    }
    text = (copy / "README.md").read_text()
    for number, check in checks.items():
        assert number in text and check().problems == []
        (copy / "README.md").write_text(text.replace(number, number.replace("0.7", "0.8"), 1))
        assert check().problems
        (copy / "README.md").write_text(text)


def test_results_for_the_hub_are_the_measured_ones(built: Path, tmp_path: Path) -> None:
    import yaml
    from huggingface_hub import parse_eval_result_entries

    from release.checks import cards
    from release.repositories import read_sums

    for folder, model in (("model", "mid"), ("model-base", "base")):
        path = built / folder / ".eval_results/tiny-data.yaml"
        entries = parse_eval_result_entries(yaml.safe_load(path.read_text()))
        scores = json.loads((built / f"{folder}/evaluation/{model}.json").read_text())
        measured = {f"exact_match_{name}": row["value"] for name, row in scores["accuracy"].items()}
        measured |= {f"bits_per_byte_{name}": row["value"] for name, row in scores["bits_per_byte"].items()}
        assert measured and {entry.task_id: entry.value for entry in entries} == measured
        assert len(entries) == len(measured) and {entry.dataset_id for entry in entries} == {"local/tiny-data"}
        [url] = {entry.source_url for entry in entries}
        assert url == f"https://huggingface.co/datasets/local/tiny-data/tree/v0.1.0/evaluation/{model}"
        assert (built / "dataset/evaluation" / model / "scores.json").exists()
        assert ".eval_results/tiny-data.yaml" in read_sums(built / folder / SUMS, SUMS)
        assert f"{folder}/.eval_results/tiny-data.yaml" in read_sums(built / ALL_SUMS, ALL_SUMS)
    about = read_release(built)
    copy = Path(shutil.copytree(built / "model", tmp_path / "model"))
    path = copy / ".eval_results/tiny-data.yaml"
    text = path.read_text()
    for old, new, alone in (
        ("value: 0.75", "value: 0.85", True),
        ("standard error 0.", "standard error 0.0", True),
        ("id: local/tiny-data", "id: cais/hle", True),
        ("  value: 0.75", "  verifyToken: x\n  value: 0.75", True),
        ("/v0.1.0/", "/v0.2.0/", False),  # the repository alone does not know its version
    ):
        assert old in text
        path.write_text(text.replace(old, new, 1))
        problems = [".eval_results/tiny-data.yaml is not what was measured"]
        assert cards.model_card(copy, read_model_facts(copy), about).problems == problems and cards.model_card(
            copy, read_model_facts(copy)
        ).problems == (problems if alone else [])
    for odd in ("only words", f"{text}- 1\n", "x: &a [1]\ny: *a\n"):
        path.write_text(odd)
        assert cards.model_card(copy, read_model_facts(copy)).problems == [
            ".eval_results/tiny-data.yaml is not what was measured"
        ]
    path.write_text(text)
    (copy / ".eval_results/hle.yaml").write_text(text)
    assert (
        cards.model_card(copy, read_model_facts(copy), about)
        .problems[0]
        .startswith(".eval_results holds .eval_results/hle.yaml, ")
    )
    shutil.rmtree(copy / ".eval_results")
    assert cards.model_card(copy, read_model_facts(copy), about).problems == [".eval_results/tiny-data.yaml is missing"]


def test_parity_over_tolerance_is_refused(source, tmp_path: Path) -> None:
    def worse(folder: Path) -> None:
        release_fixtures.write_json(folder / "parity.json", {"max_abs_logit_delta": 2e-4, "tolerance": 1e-4})

    require_refusal(
        replace_artifact(source, "export-base", tmp_path, worse),
        tmp_path,
        "export_parity",
        "export-base differs by 0.0002",
    )


def test_lost_tensor_is_refused(source, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    def lose(folder: Path) -> None:
        tensors = load_file(folder / "model/model.safetensors")
        del tensors["model.norm.weight"]
        save_file(tensors, folder / "model/model.safetensors", metadata={"format": "pt"})

    require_refusal(
        replace_artifact(source, "export-mid", tmp_path, lose),
        tmp_path,
        "reload_in_transformers",
        "missing keys model.norm.weight",
    )


@at_length("release", 11)
def test_generation_that_does_not_stop_is_refused(source, tmp_path: Path) -> None:
    def endless(folder: Path) -> None:
        release_fixtures.write_json(folder / "model/generation_config.json", {"eos_token_id": 3, "pad_token_id": 0})

    with pytest.raises(CheckFailed, match="does not stop"):
        builder.build(replace_artifact(source, "export-mid", tmp_path, endless), tmp_path / "home")


@at_length("release", 11)
def test_template_that_drops_words_is_refused(source, tmp_path: Path) -> None:
    def drop(folder: Path) -> None:
        (folder / "model/chat_template.jinja").write_text(
            "{% for m in messages %}<|im_start|>{{ m.role }}<|im_end|>{% endfor %}"
        )

    require_refusal(
        replace_artifact(source, "export-mid", tmp_path, drop),
        tmp_path,
        "chat_template_round_trip",
        "drops the user's words",
    )


def test_template_that_runtimes_render_otherwise_is_refused(source, tmp_path: Path) -> None:
    def date(folder: Path) -> None:
        path = folder / "model/chat_template.jinja"
        path.write_text("{{- strftime_now('%Y') -}}\n" + path.read_text())

    folder = replace_artifact(source, "export-mid", tmp_path, date)
    sentence = r"chat_template.jinja renders conversation 1 of goldens.json otherwise"
    require_refusal(folder, tmp_path, "chat_template_round_trip", sentence)


@at_length("release", 11)
def test_tokenizer_that_other_loaders_refuse_is_refused(source, tmp_path: Path) -> None:
    def list_tokens(folder: Path) -> None:
        path = folder / "model/tokenizer_config.json"
        config = json.loads(path.read_text()) | {"extra_special_tokens": ["<|im_start|>"]}
        path.write_text(json.dumps(config))

    folder = replace_artifact(source, "export-mid", tmp_path, list_tokens)
    sentence = "tokenizer_config.json lists extra_special_tokens, which transformers 4 refuses"
    require_refusal(folder, tmp_path, "chat_template_round_trip", sentence)


def test_artifact_without_statement_is_refused(source, tmp_path: Path) -> None:
    target = source.artifacts["midtrain"].digest
    statements = [p for p in source.statements if target != json.loads(p.read_text())["subject"][0]["digest"]["sha256"]]
    require_refusal(
        dataclasses.replace(source, statements=statements), tmp_path, "ledger_closed", "none is about midtrain"
    )


def test_unknown_license_and_unbalanced_counts_are_refused(source, tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def without_license(folder: Path) -> None:
        path = folder / "dispositions/prose/part-00000.parquet"
        table = pq.read_table(path)
        at = table.schema.get_field_index("license")
        pq.write_table(table.set_column(at, "license", pa.array(["unknown"] * len(table))), path)

    def lost_row(folder: Path) -> None:
        path = folder / "dispositions/prose/part-00000.parquet"
        pq.write_table(pq.read_table(path).slice(1), path)

    for n, (change, gate, match) in enumerate(
        [
            (without_license, "licenses_known", "source prose"),
            (lost_row, "counts_balance", "prose/000 is not kept in both"),
        ]
    ):
        (tmp_path / str(n)).mkdir()
        require_refusal(replace_artifact(source, "dedup", tmp_path / str(n), change), tmp_path / str(n), gate, match)


def test_an_installed_wheel_brings_its_license_text(tmp_path: Path, monkeypatch) -> None:
    import sys

    info = tmp_path / "site/atom_release-9.dist-info"
    (info / "licenses").mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.4\nName: atom-release\nVersion: 9\nLicense-File: LICENSE\n")
    (info / "licenses/LICENSE").write_text("The wheel's license.\n")
    monkeypatch.setattr(sys, "path", [str(info.parent), *sys.path])
    source = release_fixtures.build_input(tmp_path / "run")
    (source.code_root / "LICENSE").unlink()
    folder = builder.build(source, tmp_path / "home")
    for path in ("LICENSE", "code/LICENSE", "model/LICENSE"):
        assert (folder / path).read_text() == "The wheel's license.\n", path
    assert "spdx.org/licenses/CC-BY-4.0" in (folder / "dataset/LICENSE").read_text()


def test_secrets_and_machine_paths_are_found(tmp_path: Path, monkeypatch) -> None:
    from release.checks import source_code

    monkeypatch.setenv("HF_TOKEN", "correct-horse-battery")
    key = "-----BEGIN RSA PRIVATE KEY-----\n" + ("QUJD" * 16 + "\n") * 3
    planted = {
        "a.json": ("hf_" + "a1" * 17, "a Hugging Face token"),
        "b.md": ("AKIA" + "B2" * 8, "an AWS access key"),
        "c.txt": (key, "a private key"),
        "d.py": (f'"{tmp_path}/x"', f"the machine's path {tmp_path}"),
        "e.txt": ("=correct-horse-battery", "the value of HF_TOKEN"),
    }
    harmless = {
        "f.txt": "-----BEGIN PRIVATE KEY-----\n...\n", "g.txt": "AKIAIOSFODNN7EXAMPLE",
        "h.txt": f"https://example.org{tmp_path}/x", "i.txt": "hf_hub_download and hf_token",
    }  # fmt: skip
    for name, text in {**{n: t for n, (t, _) in planted.items()}, **harmless}.items():
        (tmp_path / name).write_text(text)
    release_fixtures.table(
        tmp_path / "t.parquet", [{"text": "hf_" + "a1" * 17, "origin": "x"}, {"text": f"{tmp_path}/x", "origin": "y"}]
    )
    release_fixtures.table(tmp_path / "u.parquet", [{"text": "", "origin": f"{tmp_path}/x"}])
    answers = "dataset/rl/rlvr/rollouts.parquet"  # what a model wrote; a value of this process is none of its own
    release_fixtures.table(tmp_path / answers, [{"text": "ghp_" + "x" * 36}, {"text": "=correct-horse-battery"}])
    halves = "-----BEGIN RSA PRIVATE KEY-----", ("QUJD" * 16 + "\n") * 3  # of two documents, which are no key
    release_fixtures.table(tmp_path / "v.parquet", [{"text": half} for half in halves])
    expected = [f"{name} holds {secret}" for name, (_, secret) in planted.items()]
    expected.append(f"{answers} holds the value of HF_TOKEN")
    expected += ["t.parquet holds a Hugging Face token", f"u.parquet holds the machine's path {tmp_path}"]
    scan = source_code.scan_files(tmp_path, files_below(tmp_path), [tmp_path])
    assert scan.secrets == sorted(expected)
    assert scan.invented == [f"{answers} holds a GitHub token"]


def test_a_secret_is_refused(source, tmp_path: Path) -> None:
    environment = source.environment | {"note": f"{tmp_path}/runs"}
    bad = dataclasses.replace(source, environment=environment, machine_paths=[tmp_path])
    require_refusal(bad, tmp_path, "no_secrets", "evidence/environment.json holds the machine's path")


def test_a_waived_gate_is_on_the_card_and_the_page_and_not_among_those_that_passed(
    source: builder.BuildInput, tmp_path: Path
) -> None:
    evaluation = {**source.recipe["evaluation"], "min_accuracy_gain": 0.58}
    bad = dataclasses.replace(source, recipe={**source.recipe, "evaluation": evaluation})
    require_refusal(bad, tmp_path, "midtraining_raises_accuracy", "a gain of more than 0.58 is demanded")

    evaluation["waived_gates"] = {"midtraining_raises_accuracy": "an example"}
    waived = dataclasses.replace(source, recipe={**source.recipe, "evaluation": evaluation})
    release = builder.build(waived, tmp_path / "other")
    assert verify(release).ok, verify(release).to_json()
    card = (release / "model/README.md").read_text()
    line = "The recipe waives gates that other releases must pass: `midtraining_raises_accuracy` (an example)."
    assert line in card.splitlines()
    gate = json.loads((release / GATES).read_text())["midtraining_raises_accuracy"]
    assert gate["ok"] is None and gate["detail"].startswith("waived by the recipe (an example); accuracy ")
    assert "midtraining_raises_accuracy" not in (release / GATES_STATED).read_text()
    page = (release / PAGE).read_text()
    gates = json.loads((release / GATES).read_text()).values()
    passed = sum(gate["ok"] is True for gate in gates)
    assert f"{passed} of {len(gates)}" in page and f"{len(gates) - passed} not judged" in page
    (release / "model/README.md").write_text(card.replace(line, ""))
    assert not verify(release).ok


def test_missing_artifact_is_the_callers_mistake(source, tmp_path: Path) -> None:
    less = {k: v for k, v in source.artifacts.items() if k != "evaluate-mid"}
    with pytest.raises(AtomError, match="needs the artifact of evaluate-mid"):
        builder.build(dataclasses.replace(source, artifacts=less), tmp_path)
    assert not os.path.exists(tmp_path / "releases")


def test_earlier_release_survives_a_refusal(built: Path, source, tmp_path: Path) -> None:
    good = builder.build(source, tmp_path)
    with pytest.raises(CheckFailed):
        builder.build(dataclasses.replace(source, statements=[]), tmp_path)
    assert (good / ALL_SUMS).read_bytes() == (built / ALL_SUMS).read_bytes()


def test_section_says_what_is_wrong() -> None:
    from pydantic import ValidationError

    with pytest.raises(ValidationError):
        ReleaseSection.model_validate({"license": {"weights": "", "data_compilation": "MIT", "code": "MIT"}})


def test_what_git_does_not_track_is_not_published_and_makes_the_checkout_dirty(tmp_path: Path) -> None:
    from pipeline.core.environment import git_commit
    from pipeline.core.source_code import sources

    (tmp_path / "pipeline").mkdir()
    (tmp_path / "pipeline" / "a.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.com"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "Begin"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    os.utime(tmp_path / "pipeline" / "a.py", (0, 0))  # git would note in its index that only the time differs
    index = (tmp_path / ".git" / "index").read_bytes()
    assert git_commit(tmp_path)[1] is False
    assert (tmp_path / ".git" / "index").read_bytes() == index, "a killed process would leave the lock of the index"
    (tmp_path / "pipeline" / "private.yaml").write_text("password: x")
    assert git_commit(tmp_path)[1] is True
    assert sources(tmp_path, "pipeline") == [tmp_path / "pipeline" / "a.py"]
