"""Whole runs through the command line: cached, shared, stopped, killed, and always the same bytes."""

from __future__ import annotations

import json
import os
import random
import signal
import struct
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from pipeline.core import environment, provenance
from pipeline.core.lease import holder
from pipeline.core.store import Store
from tests.fixtures import ROOT
from tests.fixtures.run_fixtures import DATA, SOAK, at_length, atom, copy_sealed, digests, start, wait_for


def processes_of(home: Path) -> list[int]:
    """The living processes of stages of that home."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has ended meanwhile
            variables = (path / "environ").read_bytes().split(b"\0")
            is_zombie = b"\nState:\tZ" in (path / "status").read_bytes()
            if f"ATOM_HOME={home}".encode() in variables and not is_zombie:
                pids.append(int(path.name))
    return pids


def statements(home: Path, outcome: str) -> dict[str, int]:
    """{key: number of statements with that outcome}."""
    counts: dict[str, int] = {}
    for folder in (home / "ledger").iterdir():
        counts[folder.name] = sum(
            provenance.outcome(body) == outcome for _, body in provenance.read(home / "ledger", folder.name)
        )
    return counts


def test_a_second_run_runs_nothing(smoke_home: Path) -> None:
    before = sorted(str(p) for p in smoke_home.rglob("*"))
    output = atom(smoke_home, "run", "atom-smoke").stdout
    assert "40 stages, all sealed already: nothing to run" in output
    assert sorted(str(p) for p in smoke_home.rglob("*")) == before


def test_every_artifact_has_one_statement_and_its_materials_are_sealed(smoke_home: Path) -> None:
    sealed = digests(smoke_home)
    store = Store(smoke_home)
    for key, digest in sealed.items():
        sealed_by = provenance.sealed(store.ledger, store.open(key))
        assert sealed_by, key
        body = sealed_by[1]
        assert body["_type"] == "https://in-toto.io/Statement/v1"
        assert body["predicateType"] == "https://slsa.dev/provenance/v1"
        assert body["subject"] == [{"name": key, "digest": {"sha256": digest}}]
        definition = body["predicate"]["buildDefinition"]
        for d in definition["resolvedDependencies"]:
            if d["uri"].startswith("atom:artifact/"):
                assert sealed[d["uri"].removeprefix("atom:artifact/")] == d["digest"]["sha256"]
        usage = provenance.usage(body)
        assert usage["energy_joules_estimate"] >= 0 and "not measured" in usage["energy_method"]
    assert statements(smoke_home, "sealed") == dict.fromkeys(sealed, 1)
    assert not any((smoke_home / "work").iterdir()), "finished stages leave no work folder"


def test_every_sequence_of_tokens_is_as_the_page_of_formats_states(smoke_home: Path) -> None:
    """Read without the code of this project: Megatron's index, and `tokenizers` on the kept texts."""
    (tokens,), (dedup,) = (list(smoke_home.glob(f"artifacts/{name}-*")) for name in ("tokenize", "dedup"))
    (file,) = smoke_home.glob("artifacts/tokenizer-*/tokenizer.json")
    tokenizer = Tokenizer.from_file(str(file))
    (statement,) = map(json.loads, map(Path.read_text, smoke_home.glob(f"ledger/{tokens.name}/*.json")))
    conversations = statement["predicate"]["buildDefinition"]["externalParameters"]["config"]["conversations"]
    assert conversations == ["chat_problems", "courtesies"]
    counted: Counter[bool] = Counter()
    for table in sorted(tokens.glob("documents/*/*.parquet")):
        source = table.parent.name
        texts = {row["id"]: row for row in pq.read_table(dedup / "kept" / source / table.name).to_pylist()}
        for row in pq.read_table(table).to_pylist():
            text, first = texts[row["id"]]["text"], texts[row["id"]]["prompt_chars"]
            ids = sequence(tokens / row["split"] / source / table.stem, row["ordinal"])
            prompt, answer = (tokenizer.encode(part).ids for part in (text[:first], text[first:]))
            assert len(ids) == row["tokens"] and row["loss_from"] == len(prompt)
            if source in conversations:
                assert ids == prompt + answer and ids[-1] == 3 and 1 not in ids and 2 in ids
            else:
                assert ids == [*prompt, *answer, 1] and min(ids[:-1]) > 5
            counted[source in conversations] += 1
    assert min(counted.values()) > 400


def sequence(shard: Path, number: int) -> list[int]:
    """A sequence of one of Megatron's indexed data sets."""
    index = shard.with_suffix(".idx").read_bytes()
    assert index[:9] == b"MMIDIDX\0\0" and index[17] == 8, "two bytes a token"
    (count,) = struct.unpack_from("<Q", index, 18)
    lengths = struct.unpack_from(f"<{count}i", index, 34)
    places = struct.unpack_from(f"<{count}q", index, 34 + 4 * count)
    data = shard.with_suffix(".bin").read_bytes()
    return list(struct.unpack_from(f"<{lengths[number]}H", data, places[number]))


def test_reinforcement_learning_moves_the_weights_on_any_processor(smoke_home: Path) -> None:
    """Some of what an almost untrained model writes has the form that it was asked for, however its numbers round."""
    (log,) = smoke_home.glob("artifacts/rlvr-*/training.jsonl")
    steps = [row for line in log.open() if "validation" not in (row := json.loads(line))]
    assert len(steps) == 4 and not any(row.get("idle") for row in steps), steps
    assert all(row["grad_norm"] > 0 for row in steps)


def test_a_statement_repeats_the_summary_of_its_product(smoke_home: Path) -> None:
    store, summaries = Store(smoke_home), {}
    for folder in sorted(store.artifacts.iterdir()):
        artifact = store.open(folder.name)
        stated = provenance.sealed(store.ledger, artifact)
        assert stated
        summary = provenance.summary(stated[1])
        rows = [row for row in artifact.rows if row.path == "summary.json"]
        assert bool(summary) == bool(rows)
        if summary:
            assert summary["digest"]["sha256"] == rows[0].sha256 and summary["annotations"] == artifact.json(
                "summary.json"
            )
            summaries[folder.name.rpartition("-")[0]] = summary["annotations"]
    assert set(summaries) == {"dedup", "pretrain", "midtrain", "sft", "rlvr"}
    assert summaries["pretrain"]["spikes"] == [] and summaries["midtrain"]["precision"] == "fp32"


def test_a_product_without_a_number_is_stated_all_the_same(tmp_path: Path) -> None:
    from pipeline.core.store import canonical, write_manifest

    (tmp_path / "summary.json").write_text('{"heldout_loss": NaN}')
    (summary,) = provenance.summaries(write_manifest(tmp_path, "pretrain-0"))
    assert summary["annotations"] == {"heldout_loss": "NaN"} and canonical(summary)


def test_a_statement_about_training_records_its_start(smoke_home: Path) -> None:
    commit, _ = environment.git_commit(ROOT)
    for phase in ("pretrain", "rlvr"):
        (folder,) = (smoke_home / "artifacts").glob(f"{phase}-????????????")
        ((_, body),) = provenance.read(smoke_home / "ledger", folder.name)
        (start_record,) = provenance.starts(body)
        assert start_record["commit"] == commit and isinstance(start_record["dirty"], bool)
        assert start_record["restored_step"] is None and start_record["device"]["type"] == "cpu"
        assert start_record["startedOn"] == body["predicate"]["runDetails"]["metadata"]["startedOn"]
        assert start_record["replayed"]["lines"] == 0 and start_record["prediction"] is None


@pytest.mark.parametrize("last, kills", [("rlvr", 6)] if SOAK else [("pretrain", 2)])
def test_stopped_and_killed_runs_end_in_the_same_bytes(smoke_home: Path, tmp_path: Path, last: str, kills: int) -> None:
    """Ctrl-C in training, then kill -9 of the whole process group at random moments; each leaves sealed or nothing."""
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, *DATA)
    command = ("run", "atom-smoke", "--until", last)
    first = start(home, *command)
    wait_for(home, "logs/*/pretrain/events.jsonl", '"done"')
    os.killpg(first.pid, signal.SIGINT)
    output = first.communicate(timeout=180)[0]
    assert first.returncode == 130 and "stopped; run the same command to go on from here" in output, output
    assert not processes_of(home)
    key = next(p.name for p in (home / "work").iterdir() if p.name.startswith("pretrain-"))
    present = holder(home / "work" / key)
    assert present and not present.alive, "the lease is given back"
    assert any("stopped on request" in provenance.outcome(body) for _, body in provenance.read(home / "ledger", key))
    assert any((home / "work" / key / "state").iterdir()), "training saved a work checkpoint before it stopped"

    rng = random.Random(20261125)
    for _ in range(kills):
        run = start(home, *command)
        time.sleep(rng.uniform(2, 10))
        os.killpg(run.pid, signal.SIGKILL)
        run.communicate()
        digests(home)
    atom(home, *command)
    sealed = digests(home)
    assert sealed.items() <= digests(smoke_home).items() and any(key.startswith(f"{last}-") for key in sealed)


@at_length("training", 25)
def test_two_processes_share_the_work(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, "acquire", "items", "tasks", "filter")
    both = [start(home, "run", "atom-smoke", "--until", "tokenize") for _ in range(2)]
    for run in both:
        output = run.communicate(timeout=300)[0]
        assert run.returncode == 0, output
    sealed = digests(home)
    assert len(sealed) == 14 and sealed.items() <= digests(smoke_home).items()
    assert statements(home, "sealed") == dict.fromkeys(sealed, 1), "no stage was done twice"


def test_a_worker_outlives_its_driver_and_the_next_run_waits_for_it(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, "acquire", "items", "filter")
    driver = start(home, "run", "atom-smoke", "--until", "dedup")
    wait_for(home, "logs/*/dedup/events.jsonl", '"start"')
    driver.kill()
    driver.communicate()
    (first,) = (p.parent.name for p in home.glob("logs/*/run.json"))
    atom(home, "run", "atom-smoke", "--until", "dedup")
    (key,) = (p.name for p in (home / "artifacts").glob("dedup-*"))
    ((_, body),) = provenance.read(home / "ledger", key)
    assert provenance.outcome(body) == "sealed" and provenance.invocation(body) == f"{first}/dedup", (
        "the orphan sealed it"
    )


def test_status_and_logs_read_the_files(smoke_home: Path) -> None:
    body = json.loads(atom(smoke_home, "status", "--json").stdout)
    assert [s["state"] for s in body["stages"]] == ["sealed"] * 40
    assert "40 of 40 stages sealed" in atom(smoke_home, "status").stdout
    assert "docstrings:" in atom(smoke_home, "logs", "dedup").stdout
    assert "60/60 steps  loss " in atom(smoke_home, "logs", "pretrain", "-f").stdout
    refused = atom(smoke_home, "logs", "pretran", code=2).stderr
    assert refused.startswith("atom: there is no log of stage pretran") and refused.count("\n") == 1


def test_plan_reports_state_and_cost_as_json(smoke_home: Path, tmp_path: Path) -> None:
    fresh = json.loads(atom(tmp_path, "plan", "atom-smoke", "--json").stdout)
    assert {s["state"] for s in fresh["stages"]} == {"to run"}
    assert {path.name for path in tmp_path.iterdir()} <= {"digests"}, "plan writes nothing but digests of sources"
    pretrain = next(s for s in fresh["stages"] if s["name"] == "pretrain")
    assert pretrain["tokens"] == 60 * 1536 and pretrain["parameters"]["active"] < pretrain["parameters"]["total"]
    assert {s["state"] for s in json.loads(atom(smoke_home, "plan", "atom-smoke", "--json").stdout)["stages"]} == {
        "sealed"
    }


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("run", "atom-smok"), "there is no recipe atom-smok, neither packaged nor a file; did you mean atom-smoke?"),
        (("run", "atom-smoke", "--until", "rlhf"), "recipe atom-smoke has no stage rlhf; it has acquire-docstrings"),
        (
            ("run", "atom-smoke", "--only", "dedup"),
            "stage dedup needs filter, which is not sealed; run that first",
        ),
        (("status",), "there is no run under"),
        (
            ("build", "atom-smoke"),
            "acquire-docstrings and 39 more stages are not sealed yet; run `atom run atom-smoke` first",
        ),
    ],
)
def test_mistakes_are_one_sentence_and_exit_2(tmp_path: Path, arguments: tuple[str, ...], sentence: str) -> None:
    stderr = atom(tmp_path / "home", *arguments, code=2).stderr
    assert stderr.startswith(f"atom: {sentence}") and stderr.count("\n") == 1 and "Traceback" not in stderr


def test_plan_and_help_import_nothing_heavy() -> None:
    heavy = "torch, mlflow, datatrove, transformers, pyarrow, submitit, numpy"
    code = (
        "import sys; from pipeline.cli import main as cli\n"
        f"heavy = {heavy.split(', ')}\n"
        "for argv in (['--help'], ['plan', 'atom-tiny']):\n"
        "    try: cli.app(argv, standalone_mode=False)\n"
        "    except SystemExit: pass\n"
        "    print('LOADED', sorted(set(heavy) & set(sys.modules)))\n"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.count("LOADED []") == 2, output
