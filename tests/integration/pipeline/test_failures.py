"""Failing stages: one sentence, exit code 2, a statement of the attempt, nothing half-written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from pipeline.core import provenance
from pipeline.core.lease import holder
from pipeline.graph.recipe import find
from tests.fixtures.recipe_fixtures import SMOKE
from tests.fixtures.run_fixtures import DATA, at_length, atom, copy_sealed, start, wait_for


def recipe_with_documents(folder: Path, lines: list[str]) -> str:
    """A copy of the smoke recipe whose docstrings come from a JSONL file."""
    (folder / "text.jsonl").write_text("\n".join(lines) + "\n")
    data = yaml.safe_load(find("smoke", "data_recipes", "data recipe").read_text())
    data["sources"][0]["reader"] = {"reader": "jsonl", "path": "text.jsonl"}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    body = yaml.safe_load(SMOKE.read_text())
    body["data"] = "data.yaml"
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body))
    return str(folder / "recipe.yaml")


def test_a_corrupt_source_fails_its_stage_and_what_is_mended_goes_on(tmp_path: Path) -> None:
    recipe = recipe_with_documents(tmp_path, [])
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Some words."}) + '\n{"text": "cut')
    home = tmp_path / "home"
    process = atom(home, "run", recipe, "--until", "acquire-docstrings", code=2)
    assert process.stderr.startswith("atom: stage acquire-docstrings failed: ") and process.stderr.count("\n") == 1
    assert "text.jsonl" in process.stderr and "line 2" in process.stderr
    assert not (home / "artifacts").exists() and "Traceback" not in process.stdout + process.stderr
    (attempt,) = [body for f in (home / "ledger").iterdir() for _, body in provenance.read(home / "ledger", f.name)]
    assert "line 2" in provenance.outcome(attempt) and attempt["subject"][0]["name"].endswith("events.jsonl")
    state = json.loads(atom(home, "status", "--json").stdout)["stages"][0]
    assert state["state"] == "failed" and "line 2" in state["message"]

    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Some words."}) + "\n")
    assert "all of 1 stage sealed" in atom(home, "retry").stdout
    with open(recipe, "a") as file:
        file.write("\n# changed\n")
    assert "recipe.yaml has changed since run" in atom(home, "retry", code=2).stderr


def test_a_source_without_license_is_refused_before_anything_runs(tmp_path: Path) -> None:
    recipe = recipe_with_documents(tmp_path, [json.dumps({"text": "Some words."})])
    data = yaml.safe_load((tmp_path / "data.yaml").read_text())
    del data["sources"][0]["license"]
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(data))
    stderr = atom(tmp_path / "home", "run", recipe, code=2).stderr
    assert "source docstrings has no license" in stderr and stderr.count("\n") == 1
    assert not (tmp_path / "home").exists()


def test_a_missing_or_cut_shard_is_named(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    shutil.rmtree(next((home / "artifacts").glob("pretrain-*")))
    tokens = next((home / "artifacts").glob("tokenize-*")) / "train" / "code/part-00000.bin"
    content = tokens.read_bytes()
    for damage, sentence in (
        (
            lambda: tokens.write_bytes(content[:-10]),
            f"train/code/part-00000.bin has {len(content) - 10} bytes instead of {len(content)}",
        ),
        (tokens.unlink, "train/code/part-00000.bin is missing"),
    ):
        damage()
        stderr = atom(home, "run", "atom-smoke", "--only", "pretrain", code=2).stderr
        assert sentence in stderr and stderr.count("\n") == 1, stderr
    assert not list((home / "artifacts").glob("pretrain-*"))


def test_a_second_digest_of_a_bitwise_stage_is_an_error(smoke_home: Path, tmp_path: Path) -> None:
    """The ledger remembers what a key gave; a changed product in the same environment is refused, not published."""
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    sealed = next((home / "artifacts").glob("items-*"))
    (statement,) = (home / "ledger" / sealed.name).iterdir()
    body = json.loads(statement.read_bytes())
    body["subject"][0]["digest"]["sha256"] = "0" * 64
    provenance.write(home / "ledger", sealed.name, body)
    statement.unlink()
    shutil.rmtree(sealed)
    stderr = atom(home, "run", "atom-smoke", "--only", "items", code=2).stderr
    assert "with the same code in the same environment, so it is not reproducible" in stderr
    assert not sealed.exists()


def test_a_remade_input_with_other_bytes_is_no_irreproducible_stage(smoke_home: Path, tmp_path: Path) -> None:
    """Only from equal inputs must equal code give equal bytes."""
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    sealed = next((home / "artifacts").glob("tokenizer-*"))
    (statement,) = (home / "ledger" / sealed.name).iterdir()
    body = json.loads(statement.read_bytes())
    body["subject"][0]["digest"]["sha256"] = "0" * 64
    for d in body["predicate"]["buildDefinition"]["resolvedDependencies"]:
        if d["uri"].startswith("atom:artifact/dedup-"):
            d["digest"]["sha256"] = "1" * 64
    provenance.write(home / "ledger", sealed.name, body)
    shutil.rmtree(sealed)
    atom(home, "run", "atom-smoke", "--only", "tokenizer")


def test_a_failed_attempt_leaves_no_place_of_the_machine_in_its_statement(tmp_path: Path) -> None:
    from pipeline.launch.diagnoses import strip_paths

    home = tmp_path / "home"
    text = (
        f"work checkpoint {home}/work/x/state cannot be written (see /opt/data/text.jsonl, line 2); https://a.org/b/c"
    )
    message = strip_paths(text, home)
    assert (
        message
        == "work checkpoint $ATOM_HOME/work/x/state cannot be written (see …/text.jsonl, line 2); https://a.org/b/c"
    )
    assert strip_paths(f"{home}-old/x is away, {home} is not.", home) == "…/x is away, $ATOM_HOME is not."
    recipe = recipe_with_documents(tmp_path, ['{"text": "cut'])
    atom(home, "run", recipe, "--until", "acquire-docstrings", code=2)
    bodies = [path.read_text() for folder in (home / "ledger").iterdir() for path in folder.iterdir()]
    assert len(bodies) == 1 and str(tmp_path) not in bodies[0] and "text.jsonl" in bodies[0]


@at_length("release", 25)
def test_the_environment_of_a_launcher_around_us_does_not_reach_the_stages(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    shutil.copytree(smoke_home, home)
    shutil.rmtree(next((home / "artifacts").glob("export-init-*")))
    atom(home, "run", "atom-smoke", "--only", "export-init", RANK="0", WORLD_SIZE="2")


def test_a_home_that_cannot_be_used_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for home in (tmp_path / "file", Path("/proc/nope")):
        stderr = atom(home, "run", "atom-smoke", "--until", "items", code=2).stderr
        assert "cannot be used" in stderr and stderr.count("\n") == 1 and "Traceback" not in stderr


def test_a_full_disk_is_one_sentence_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A run whose home is a file system of 100 kB, then the same run with room."""
    home = tmp_path / "home"
    home.mkdir()
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make a mount namespace, which the full disk is made with")
    script = (
        f"mount -t tmpfs -o size=100k none {home} && export ATOM_HOME={home} MLFLOW_TRACKING_URI=none && "
        f"{sys.executable} -m pipeline.cli run atom-smoke --until acquire-docstrings; echo code $?; "
        f"{sys.executable} -m pipeline.cli status 2>&1 | head -n 1; ls {home}/artifacts; mount -o remount,size=200m {home} && "
        f"{sys.executable} -m pipeline.cli run atom-smoke --until acquire-docstrings > /dev/null; echo then $?"
    )
    process = subprocess.run([*space, "sh", "-c", script], capture_output=True, text=True)
    assert "code 2" in process.stdout and "then 0" in process.stdout, process.stdout + process.stderr
    first = f"atom: the disk that holds {home} is full; free some space and run the same command to go on\n"
    assert first in process.stdout, "the first line of `atom status`"
    assert "is full" in process.stderr and "Traceback" not in process.stderr, process.stderr


@at_length("release", 25)
def test_cancel_stops_a_run_from_another_terminal(smoke_home: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    copy_sealed(smoke_home, home, *DATA)
    run = start(home, "run", "atom-smoke", "--until", "pretrain")
    wait_for(home, "logs/*/pretrain/events.jsonl", '"done"')
    assert "stopped pretrain" in atom(home, "cancel").stdout
    output = run.communicate(timeout=180)[0]
    assert run.returncode == 2 and "stopped on request" in output
    (folder,) = (home / "work").glob("pretrain-*")
    present = holder(folder)
    assert present and not present.alive
    assert "all of 15 stages sealed" in atom(home, "retry").stdout
