"""A release with long-context phases: its final model, its gates, and what its cards say about training."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.core.errors import AtomError
from release import layout
from release.assembly import build_release as builder
from release.assembly.assemble import require_nodes
from release.cards import card_tables, plots, render
from release.checks import cards, registry
from release.checks.check import BuildContext, GateResult
from release.checks.evidence import statements
from release.facts.data_facts import DataFacts, SourceInOrder, read_data_facts
from release.facts.model_facts import read_model_facts
from release.facts.published_tables import read_json
from release.facts.run_facts import read_checkpoints
from release.opened_release import Release
from release.repositories import files_below
from release.schema import read_release
from stages.evaluation.gates import SURE
from stages.recipe import ReleaseRecipe
from tests.fixtures import release_fixtures
from tests.fixtures.audit_fixtures import verify

LIMITS = {"min_accuracy_gain": 0.0, "bits_per_byte_tolerance": 0.05}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return release_fixtures.build_input(tmp_path_factory.mktemp("run"), release_fixtures.inputs_with_long_context())


@pytest.fixture(scope="module")
def release(source: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return builder.build(source, tmp_path_factory.mktemp("home"))


@pytest.fixture
def model(release: Path, tmp_path: Path) -> Path:
    """A copy of the final model's repository alone."""
    return Path(shutil.copytree(release / "model", tmp_path / "model"))


def context(release: Path, data: DataFacts) -> BuildContext:
    return BuildContext(release_fixtures.opened(release, data=data), LIMITS)


def gates_by_name(release: Path, data: DataFacts) -> dict[str, GateResult]:
    """Of long contexts."""
    names = ("longcontext_keeps_bits_per_byte", "longcontext_finds_passkeys")
    results = [registry.run_gate(name, context(release, data)) for name in names]
    return {result.name: result for result in results if result is not None}


def gate(name: str, build: BuildContext) -> GateResult:
    result = registry.run_gate(name, build)
    assert result is not None
    return result


def tables_of(model: Path) -> dict[str, list[str]]:
    return card_tables.lines_by_table(card_tables.MODEL_TABLES, read_model_facts(model))


def log_of(model: Path, phase: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (model / f"training/{phase}.jsonl").read_text().splitlines()]


def write_log(model: Path, phase: str, lines: list[dict[str, Any]]) -> None:
    (model / f"training/{phase}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_names_follow_each_other_as_in_the_graph() -> None:
    later = dict.fromkeys(("sft", "rlvr", "dpo", "online_rlhf"))
    phase = SimpleNamespace(merge=None)
    recipe = SimpleNamespace(pretrain=None, midtrain=None, long_context=(phase,) * 11, **later)
    recipe.text_phases = ReleaseRecipe.text_phases.fget(recipe)
    phases = [phase.node for phase in recipe.text_phases]
    models = list(ReleaseRecipe.exported.fget(recipe))
    nodes = [*phases, *(f"order-{phase}" for phase in phases), "pretrain@30", "longcontext-1@2"]
    nodes += [f"{kind}-{model}" for kind in ("export", "evaluate") for model in models]
    assert layout.phases_of(sorted(nodes)) == phases
    assert layout.models_of(sorted(nodes)) == models
    assert sorted(["later", *reversed(models)], key=layout.when) == [*models, "later"]


def test_the_last_long_model_is_the_final_one(release: Path) -> None:
    paths = set(files_below(release))
    for number in (1, 2):
        for path in (
            f"checkpoints/longcontext-{number}-step-2/optimizer.safetensors", f"evidence/parity/long-{number}.json",
            f"dataset/order/longcontext-{number}/part-00000.parquet", f"dataset/evaluation/long-{number}/items.parquet",
            f"evidence/training/longcontext-{number}/training.jsonl", f"evidence/manifests/longcontext-{number}.json",
        ):  # fmt: skip
            assert path in paths, path
    facts = read_model_facts(release / "model")
    assert list(facts.scores) == ["init", "base", "mid", "long-1", "long-2"]
    assert list(facts.training) == ["pretrain", "midtrain", "longcontext-1", "longcontext-2"]
    assert facts.config["max_position_embeddings"] == 4 * release_fixtures.CONTEXT
    base = read_model_facts(release / "model-base")
    assert (list(base.scores), list(base.training)) == (["init", "base"], ["pretrain"])
    assert base.config["max_position_embeddings"] == release_fixtures.CONTEXT
    assert json.loads((release / layout.GATES).read_text())["longcontext_keeps_bits_per_byte"]["ok"]
    rows = read_checkpoints(release / "checkpoints")
    phases = ["pretrain", "midtrain", "longcontext-1", "longcontext-2"]
    assert [(row.phase, row.step) for row in rows] == [(phase, step) for phase in phases for step in (0, 2)]


def test_the_cards_say_so(release: Path) -> None:
    card = (release / "model/README.md").read_text()
    for words in (
        "the final model, after pre-training, mid-training, long-context training 1 and long-context training 2, of",
        "with a context of 256 tokens",
        "| measure | random weights | pre-training | mid-training | long context 1 | long context 2 |",
    ):  # fmt: skip
        assert words in card, words
    assert "the model after pre-training and mid-training, on the way" in (release / "model-mid/README.md").read_text()
    card = (release / "model-base/README.md").read_text()
    assert "with a context of 64 tokens" in card
    assert "long" not in card.split("## Results")[0]


def test_it_is_verified_whole_and_each_model_alone(release: Path, model: Path) -> None:
    for folder in (release, model, release / "model-base"):
        assert verify(folder).ok, verify(folder).to_json()
    card = (model / "README.md").read_text()
    (model / "README.md").write_text(card.replace("with a context of 256 tokens", "with a context of 512 tokens"))
    (problem,) = cards.cards(Release(model, "model")).problems
    assert problem.startswith("README.md lacks the line 'A mixture-of-experts language model of ")


def test_experts_of_every_layer_with_an_alarm(release: Path) -> None:
    card = (release / "model/README.md").read_text()
    for words in (
        "**Alarm: 1 of 8 experts is dead.** At step 2 of long-context training 2, the last one measured, hardly any token "
        "was sent to layer 1, expert 0; the busiest expert of a layer got 1.60 times a fair share of its tokens.",
        "](training.png)",
        "](progress.png)",
    ):
        assert words in card, words
    card = (release / "model-base/README.md").read_text()
    assert "none of the 8 experts was dead" in card and "Alarm" not in card


def test_a_number_in_the_artifact_moves_the_card(release: Path, model: Path) -> None:
    assert cards.cards(Release(model, "model")).problems == []
    lines = log_of(model, "longcontext-2")
    lines[-1]["experts"]["share"][1] = [0.3, 0.2, 0.3, 0.2]
    lines[-1]["experts"]["dead"] = []
    write_log(model, "longcontext-2", lines)
    wrong = cards.cards(Release(model, "model")).problems
    assert "training.png was not drawn from the logs in training/" in wrong
    verdict = (
        "At step 2 of long-context training 2, the last one measured, none of the 8 experts was dead, and the busiest "
        "expert of a layer got 1.20 times a fair share of its tokens."
    )
    assert f"README.md lacks the line '{verdict}'" in wrong
    data = read_data_facts(release / "dataset")
    facts = card_tables.ReleaseFacts(read_model_facts(model), data, [], {})
    card = render.model_card("model", read_release(release), facts)
    assert "Alarm" not in card and verdict in card


def test_a_changed_card_or_plot_does_not_pass_the_gate(release: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    build = BuildContext(Release(copy), LIMITS)
    assert gate("card_numbers", build).ok
    png = (copy / "model/training.png").read_bytes()
    (copy / "model/training.png").write_bytes((copy / "model-base/training.png").read_bytes())
    assert "model/training.png" in gate("card_numbers", build).detail
    (copy / "model/training.png").write_bytes(png)
    card = (copy / "model/README.md").read_text()
    (copy / "model/README.md").write_text(card.replace("layer 1, expert 0", "layer 1, expert 2"))
    assert not gate("card_numbers", build).ok


def test_every_spike_has_its_line(release: Path, model: Path) -> None:
    card = (model / "README.md").read_text()
    assert (
        "- long-context training 2, step 1: the loss is 9.1, above 6.2 (median 5 of 64 steps); action skip: step 1 moved no "
        "weight; the batch that spiked held 2 documents." in card
    )
    assert "- long-context training 2: step 3 moved no weight, because the recipe says so." in card
    (others,) = [line for line in card.splitlines() if line.startswith("- No step was skipped in: ")]
    assert others.endswith(", long-context training 1 (1 to 2).") and "training 2" not in others
    lines = log_of(model, "longcontext-2")
    spike = next(line["spike"] for line in lines if "spike" in line)
    spike |= {"action": "rewind", "excluded": [1, 2, 4], "documents": ["prose/001"]}
    write_log(model, "longcontext-2", lines)
    spike_lines = tables_of(model)["spikes"]
    assert any(
        "action rewind: steps 1 to 2, 4 moved no weight; the batch that spiked held 1 document." in x
        for x in spike_lines
    )


def test_a_phase_without_a_measurement_is_reported_as_such(model: Path) -> None:
    for phase in ("pretrain", "midtrain", "longcontext-1", "longcontext-2"):
        write_log(model, phase, [line for line in log_of(model, phase) if "experts" not in line])
    assert tables_of(model)["experts_verdict"] == ["Where the routers sent the tokens was not measured."]


def test_the_plot_is_the_same_bytes_and_names_its_logs(release: Path, monkeypatch) -> None:
    import matplotlib

    model = release / "model"
    before = (model / "training.png").read_bytes()
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    plots.draw_losses.cache_clear()
    assert plots.draw_losses(model, plots.source(model)) == before
    entries = plots.entries(before)
    assert entries is not None and entries.keys() == {plots.SOURCE, plots.SOFTWARE}, "and no time"
    source = entries[plots.SOURCE]
    assert source == plots.source(release / "model") and source.count("\n") == 3 and "training/midtrain.jsonl" in source
    assert entries[plots.SOFTWARE] == plots.version()
    assert plots.entries(b"no picture") is None and plots.entries(before + b"x") is None
    for at in range(0, len(before), len(before) // 50):
        assert plots.entries(before[:at]) is None, f"cut at {at}"
        flipped = before[:at] + bytes([before[at] ^ 255]) + before[at + 1 :]
        assert plots.entries(flipped) is None, f"another byte at {at}"


def test_without_matplotlib_nothing_is_built(source: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(AtomError, match=r"not installed; run pip install '\.\[report\]'") as error:
        builder.build(source, tmp_path)
    assert error.value.exit_code == 2 and not list(tmp_path.iterdir())


def test_long_context_must_not_cost_short_texts(release: Path) -> None:
    def passes(model: str, name: str, value: float) -> bool:
        data = read_data_facts(release / "dataset")
        data.evaluation[model]["bits_per_byte"][name]["value"] = value
        verdicts = gates_by_name(release, data)
        assert list(verdicts) == ["longcontext_keeps_bits_per_byte"], "no passkeys were measured"
        return verdicts["longcontext_keeps_bits_per_byte"].ok

    scores = read_data_facts(release / "dataset").evaluation
    sums = [scores[name]["bits_per_byte"]["sums"] for name in ("mid", "long-2")]
    before, chance = sums[0]["value"], SURE * math.hypot(*(row["se"] for row in sums))
    assert passes("long-2", "sums", before + 0.049 + chance)
    assert not passes("long-2", "sums", before + 0.051 + chance)
    assert not passes("long-1", "prose", before + 1)
    assert not passes("long-1", "prose", float("nan"))
    data = read_data_facts(release / "dataset")
    del data.evaluation["long-1"], data.evaluation["long-2"]
    assert gates_by_name(release, data) == {}


def test_long_context_is_not_refused_for_what_it_leaves_out(release: Path, tmp_path: Path) -> None:
    """Sources that the phase does not read are stated, also where they are the long documents of the evaluation."""
    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    data = read_data_facts(copy / "dataset")
    before = data.evaluation["mid"]["bits_per_byte"]["sums"]["value"]
    data.evaluation["long-2"]["bits_per_byte"]["sums"]["value"] = before + 1
    for model, bits in (("mid", 10.0), ("long-1", 10.0), ("long-2", 20.0)):
        rows = [{"source": "sums", "first": 0, "last": 63, "tokens": 5, "nll_bits": bits},
                {"source": "prose", "first": 0, "last": 63, "tokens": 5, "nll_bits": 10.0}]  # fmt: skip
        release_fixtures.table(copy / f"dataset/evaluation/{model}/positions.parquet", rows)

    def result() -> GateResult:
        return gates_by_name(copy, data)["longcontext_keeps_bits_per_byte"]

    assert not result().ok and "0-63 2.0000 → 3.0000" in result().detail
    del data.order["longcontext-2"].parts[0].by_source["sums"]
    assert result().ok, result().detail
    stated = f"not judged, because longcontext-2 does not read them: sums {before:.4f} → {before + 1:.4f}"
    assert stated in result().detail and "0-63 2.0000 → 2.0000" in result().detail
    data.evaluation["long-1"]["bits_per_byte"]["sums"]["value"] = before + 1
    assert not result().ok, "longcontext-1 reads it"


def keys(**rates: float) -> dict[str, Any]:
    return {length[1:]: {"value": value, "se": 0.1, "n": 10} for length, value in rates.items()}


def test_longer_texts_must_give_more_keys(release: Path) -> None:
    def passkey_gate(mid: dict[str, Any] | None, last: dict[str, Any] | None) -> tuple[bool, str]:
        data = read_data_facts(release / "dataset")
        for model, passkey in (("mid", mid), ("long-2", last)):
            data.evaluation[model] |= {"passkey": passkey} if passkey is not None else {}
        result = gates_by_name(release, data)["longcontext_finds_passkeys"]
        return result.ok, result.detail

    assert passkey_gate(keys(_64=1.0, _128=0.1, _256=0.1), keys(_64=0.9, _128=0.6, _256=0.2)) == (
        True,
        "keys found in more than 64 tokens (128, 256 tokens) 0.100 ± 0.067 → 0.400 ± 0.110, a gain of more than 0 is "
        "demanded",
    )
    assert passkey_gate(keys(_128=1.0), keys(_128=1.0))[0], "no more can be found than all"
    assert not passkey_gate(keys(_64=0.1, _128=0.4), keys(_64=0.9, _128=0.4))[0], (
        "not more beyond what was there before"
    )
    assert "asked for beyond the 64 tokens" in passkey_gate(keys(_64=0.1), keys(_64=0.9))[1]
    assert "passkeys of 128 tokens were asked of one model only" in passkey_gate(None, keys(_128=0.9))[1]
    assert not passkey_gate(keys(_128=0.1), None)[0]


def test_passkeys_are_shown_when_measured(release: Path) -> None:
    data, facts = read_data_facts(release / "dataset"), read_model_facts(release / "model")
    for scores in (facts.scores, data.evaluation):
        for model, value in (("mid", 0.25), ("long-2", 0.75)):
            scores[model] |= {"passkey": keys(_64=1.0, _1024=value)}
    card = render.model_card("model", read_release(release), card_tables.ReleaseFacts(facts, data, [], {}))
    for words in (
        "| tokens of the text | mid-training | long context 2 |", "| 1,024 | 0.250±0.100 | 0.750±0.100 |",
    ):  # fmt: skip
        assert words in card, words
    assert "asskeys" not in (release / "model/README.md").read_text()


def test_every_phase_needs_its_checkpoints_order_and_models(release: Path, source: Any, tmp_path: Path) -> None:
    data = read_data_facts(release / "dataset")
    assert gate("checkpoints_and_order", context(release, data)).ok
    del data.order["longcontext-1"]
    assert "no order index of longcontext-1" in gate("checkpoints_and_order", context(release, data)).detail
    copy = tmp_path / "copy"
    shutil.copytree(release / "checkpoints", copy / "checkpoints")
    shutil.rmtree(copy / "checkpoints/longcontext-2-step-2")
    build = BuildContext(release_fixtures.opened(copy, info=read_release(release), data=Release(release).data), LIMITS)
    assert "last checkpoint of longcontext-2 is step 0" in gate("checkpoints_and_order", build).detail
    shutil.copytree(release / "evidence/parity", copy / "evidence/parity")
    (copy / "evidence/parity/long-1.json").unlink()
    assert "parity is not known for long-1" in gate("export_parity", build).detail
    for node in ("evaluate-long-2", "order-longcontext-1", "export-long-1"):
        with pytest.raises(AtomError, match=f"needs the artifact of {node}"):
            require_nodes({name: artifact for name, artifact in source.artifacts.items() if name != node})


def test_packed_rows_are_counted_once(release: Path) -> None:
    data = read_data_facts(release / "dataset")
    (part,) = data.order["longcontext-1"].parts
    assert part.by_source["prose"] == SourceInOrder(rows=4, tokens=40, documents=2)
    assert part.by_source["sums"] == SourceInOrder(rows=4, tokens=44, documents=2)
    assert list(data.order) == ["pretrain", "midtrain", "longcontext-1", "longcontext-2"]


def test_a_statement_with_another_summary_is_found(release: Path, tmp_path: Path) -> None:
    from pipeline.core import provenance

    copy = Path(shutil.copytree(release, tmp_path / "copy"))
    key = read_release(copy).nodes["longcontext-2"].key
    bodies = {path: read_json(path) for path in (copy / "evidence/statements").glob("*.json")}
    path, body = next((p, b) for p, b in bodies.items() if b["subject"][0]["name"] == key)
    summary = read_json(copy / "evidence/training/longcontext-2/summary.json")
    summary_statement = provenance.summary(body)
    assert (
        summary_statement
        and summary_statement["annotations"] == summary
        and summary["spikes"][0]["documents"] == ["prose/001", "sums/001"]
    )
    assert statements(Release(copy)).problems == []
    summary_statement["annotations"]["spikes"] = []
    path.unlink()
    path = provenance.write(tmp_path, "evidence", body)
    shutil.copyfile(path, copy / "evidence/statements" / path.name)
    assert statements(Release(copy)).problems == [
        f"evidence/statements/{path.name}: what it says is in summary.json of {key} is not what is there"
    ]
