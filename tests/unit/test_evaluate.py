"""The evaluation stage on a tiny random model: its numbers against slow and obvious ways to get them."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.core.errors import AtomError
from pipeline.core.source_code import code_digests
from pipeline.core.stage import Needs, identity
from pipeline.core.store import Artifact, write_manifest
from pipeline.graph import registry
from release import independent_verifier
from stages import confidence
from stages.evaluation import bits_per_byte, model_evaluation
from stages.mcore import gpu_environment
from tests.fixtures import ROOT, release_fixtures
from tests.fixtures.run_fixtures import evaluate_in_shards

pytestmark = pytest.mark.numeric

CONFIG = {"heldout_documents": 2, "max_new_tokens": 8}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    root = tmp_path_factory.mktemp("inputs")
    artifacts = {}
    for role, node in {"model": "export-mid", "dedup": "dedup", "items": "items"}.items():
        release_fixtures.make_node(node, root / role)
        artifacts[role] = write_manifest(root / role, node)
    return artifacts


def tables(artifact: Artifact, name: str) -> list[dict]:
    import pyarrow.parquet as pq

    return pq.read_table(artifact / name).to_pylist()


def test_same_bytes_twice_and_after_a_cut(run_stage, inputs, tmp_path: Path) -> None:
    first, second = (run_stage(model_evaluation.STAGE, CONFIG, inputs, tmp_path / name) for name in ("a", "b"))
    assert first.digest == second.digest
    (tmp_path / "b" / "items-00000.json").unlink()
    assert run_stage(model_evaluation.STAGE, CONFIG, inputs, tmp_path / "b").digest == first.digest
    scores = first.json("scores.json")
    assert set(scores["bits_per_byte"]) == set(release_fixtures.SOURCES) and scores["accuracy"]["add"]["n"] == 20
    assert model_evaluation.summary(tables(first, "documents.parquet"), tables(first, "items.parquet")) == scores


def test_any_number_of_shards_gives_the_same_bytes(run_stage, inputs, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(model_evaluation, "ROWS_PER_BATCH", 6)
    whole = run_stage(model_evaluation.STAGE, CONFIG, inputs)
    for shards in (2, 3):
        work = tmp_path / str(shards)
        config = evaluate_in_shards(model_evaluation.STAGE, CONFIG, inputs, work, shards)
        with monkeypatch.context() as patch:
            patch.setattr(model_evaluation, "open_model", None)  # nothing is left to do
            assert run_stage(model_evaluation.STAGE, config, inputs, work).digest == whole.digest


def test_bits_are_the_models_own_loss(run_stage, inputs) -> None:
    """Each token scored alone in its whole context gives the same bits; a random model pays about log2(V)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    row = tables(run_stage(model_evaluation.STAGE, CONFIG, inputs), "documents.parquet")[0]
    folder = inputs["model"] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    text = {r["id"]: r["text"] for rows in release_fixtures.corpus().values() for r in rows}[row["id"]]
    ids, bits = tokenizer(text)["input_ids"][: release_fixtures.CONTEXT], 0.0
    for n, token in enumerate(ids):
        with torch.inference_mode():
            logits = model(torch.tensor([ids[:n] or [1]])).logits[0, -1]
        bits -= float(torch.log_softmax(logits.double(), -1)[token]) / math.log(2)
    assert row["nll_bits"] == pytest.approx(bits, rel=1e-5)
    assert row["bytes"] == row["tokens"] == len(ids)
    assert row["nll_bits"] / row["tokens"] == pytest.approx(math.log2(release_fixtures.VOCAB), abs=0.5)


def test_a_question_is_context_and_not_scored(inputs) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.generation.transformers_model import TransformersModel

    folder = inputs["model"] / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    oracle = TransformersModel(model, tokenizer)

    def bits(text: str, prompt_chars: int) -> dict:
        row = {"id": "a", "source": "s", "origin": "x/json#1", "text": text, "prompt_chars": prompt_chars}
        return bits_per_byte.score_documents(oracle, tokenizer, [row], (), {"s": r"/(\w+)#"})[0]

    answer = bits("12+30=42", 6)
    assert (answer["bytes"], answer["tokens"]) == (2, 2)
    assert answer["nll_bits"] == pytest.approx(
        bits("12+30=42", 0)["nll_bits"] - bits("12+30=", 0)["nll_bits"], rel=1e-5
    )
    assert bits("x" * 200, 100) == {
        "source": "s", "id": "a", "work": "json", "bytes": 0, "tokens": 0, "nll_bits": 0.0
    }  # fmt: skip
    assert torch.exp2(-oracle.first_token_bits).sum() == pytest.approx(1)


def test_the_engine_changes_a_key_by_its_kind_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where and on how many GPUs a server runs is no part of what is measured; a default engine is in no key."""
    monkeypatch.setenv("ATOM_VLLM_PYTHON", "/p")
    config = model_evaluation.EvaluateConfig.model_validate
    plain, served = config(CONFIG), config({**CONFIG, "engine": {"kind": "vllm"}})
    assert identity(config({**CONFIG, "engine": {"kind": "in-process"}})) == identity(plain) == CONFIG
    wide = config({**CONFIG, "engine": {"kind": "vllm", "gpus": 8, "options": ["--enforce-eager"]}})
    assert identity(wide) == identity(served) == {**CONFIG, "engine": {"kind": "vllm"}}
    stage = model_evaluation.STAGE
    needs = [Needs(environment=gpu_environment.variables()), Needs(gpus=8)]
    assert [(stage.promise(c), stage.needs(c)) for c in (plain, wide)] == list(
        zip(["bitwise", "numeric"], needs, strict=True)
    )
    assert stage.lack(plain) is None
    assert stage.lack(wide) is not None and "evaluation.engine.kind = vllm: /p is no" in str(stage.lack(wide))
    with pytest.raises(ValidationError, match="gpus has no effect with kind = in-process"):
        config({**CONFIG, "engine": {"gpus": 2}})


def test_padding_and_batching_do_not_change_an_output(inputs) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from stages.generation.transformers_model import TransformersModel

    folder = inputs["model"] / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = TransformersModel(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval(), tokenizer)
    rows = [{"id": str(n), "task": "add", "prompt": "1" * n + ":", "answer": "2"} for n in (1, 9, 20)]
    together = model_evaluation.answer_batch(model, tokenizer, rows, 8)
    alone = [model_evaluation.answer_batch(model, tokenizer, [row], 8)[0] for row in rows]
    assert [row["output"] for row in together] == [row["output"] for row in alone]
    assert len(together[0]["code_digest"]) == 64


def test_bytes_of_a_cut_character_and_of_a_special_name(inputs) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(inputs["model"] / "model")
    text = "é<|endoftext|>日"
    ids = bits_per_byte.token_ids(tokenizer, text)
    assert 1 not in ids and bits_per_byte.token_bytes(tokenizer, ids) == len(text.encode())
    assert bits_per_byte.token_bytes(tokenizer, ids[:1]) == 1


def test_standard_errors() -> None:
    equal = confidence.ratio([(20.0, 10), (40.0, 20)])
    assert equal == {"value": 2.0, "se": 0.0, "documents": 2, "bytes": 30}
    assert confidence.ratio([(10.0, 10), (30.0, 10)])["se"] == pytest.approx(1.0)  # sqrt(2/1 * (10²+10²)) / 20
    assert confidence.half_width({"value": 0.0, "se": 1.0}) == pytest.approx(1.96, abs=1e-3)
    over: confidence.Ratio = {"value": 0.0, "se": 2.0, "documents": 5000, "works": 5}
    assert confidence.half_width(confidence.binomial([1])) == 0
    assert confidence.half_width(over) == pytest.approx(2 * 2.776, abs=1e-3)  # a table of Student's distribution
    assert confidence.binomial([1, 0, 0, 0])["se"] == pytest.approx(math.sqrt(0.25 * 0.75 / 4))


def scored(source: str, id: str, work: str, bits: float) -> dict:
    return {"source": source, "id": f"{source}/{id}", "work": work, "bytes": 10, "tokens": 5, "nll_bits": bits}


def test_documents_of_one_work_count_as_one() -> None:
    alone = confidence.ratio([(10.0, 10), (30.0, 10)], works=["a", "b"])
    copied = confidence.ratio([(10.0, 10), (30.0, 10), (10.0, 10), (30.0, 10)], works=["a", "b", "a", "b"])

    assert alone == {"value": 2.0, "se": pytest.approx(1.0), "documents": 2, "bytes": 20, "works": 2}
    assert copied == {"value": 2.0, "se": pytest.approx(1.0), "documents": 4, "bytes": 40, "works": 2}


def test_a_work_of_several_sources_is_no_independent_evidence(tmp_path: Path) -> None:
    """The second verifier, which was written from the documentation alone, computes the same figures."""
    bits = {"ast": 10.0, "json": 30.0, "re": 17.0}
    rows = [scored(source, work, work, bits[work]) for source in ("code", "prose") for work in bits]
    items = [{"task": "add", "score": score} for score in (0, 1)]
    release_fixtures.table(tmp_path / "dataset/evaluation/base/documents.parquet", rows)
    release_fixtures.table(tmp_path / "dataset/evaluation/base/items.parquet", items)

    figures = model_evaluation.summary(rows, items)

    (tmp_path / "dataset/evaluation/base/scores.json").write_text(json.dumps(figures))
    assert list(independent_verifier.scores(tmp_path)) == []
    assert figures["bits_per_byte_all"]["se"] == pytest.approx(figures["bits_per_byte"]["code"]["se"])
    apart = [{**row, "work": row["id"]} for row in rows]
    assert model_evaluation.summary(apart, items)["bits_per_byte_all"]["se"] == pytest.approx(
        figures["bits_per_byte_all"]["se"] / math.sqrt(2)
    )


def test_documents_of_a_single_work_are_refused() -> None:
    rows = [scored("code", id, "json", 1.0) for id in "ab"]
    assert bits_per_byte.scored_documents([*rows, scored("code", "c", "re", 1.0)])
    for few in (rows, rows[:1]):
        with pytest.raises(
            AtomError, match="source code has fewer than two documents to score, where those of one work"
        ):
            bits_per_byte.scored_documents(few)


def test_nothing_held_out_is_one_sentence(inputs, run_stage, tmp_path: Path) -> None:
    rows = [{"id": "a", "text": "x", "source": "s", "content_hash": "0", "prompt_chars": 0, "split": "train"}]
    release_fixtures.table(tmp_path / "dedup" / "kept" / "s" / "part-00000.parquet", rows)
    bad = write_manifest(tmp_path / "dedup", "dedup")
    with pytest.raises(AtomError, match="has no held-out document"):
        run_stage(model_evaluation.STAGE, CONFIG, {**inputs, "dedup": bad})


def test_thresholds_that_judge_results_are_in_no_stages_code() -> None:
    """Another threshold makes no evaluation stale."""
    stages = registry.stages()
    assert "stages.evaluation.model_evaluation" in code_digests(stages["evaluate"])
    for name in ("evaluate", "solve", "fresh", "prefer", "contamination", "baselines", "items"):
        assert "stages.evaluation.settings" not in code_digests(stages[name]), name


def test_templates_and_tables_beside_a_module_are_its_code() -> None:
    """A changed chat template makes the tokenizer stale, as a changed function does."""
    names = code_digests(registry.stages()["tokenizer"])
    assert {"stages/formats/training_chat_template.jinja", "stages/formats/response_template.yaml"} <= set(names)


def test_modules_that_plan_and_cli_import_are_light() -> None:
    import subprocess
    import sys

    heavy = ("torch", "numpy", "pyarrow", "transformers", "huggingface_hub", "jinja2")
    ours = "stages.evaluation.model_evaluation, stages.evaluation.pass_at_k, stages.evaluation.generated_eval, stages.evaluation.win_rate, stages.evaluation.contamination, release.commands.publishing, release.commands.auditing, release.commands.predicting, release.hub.local.server"
    code = f"import sys, json, {ours}; print(json.dumps([m for m in {heavy} if m in sys.modules]))"
    root = ROOT
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert json.loads(process.stdout) == []
