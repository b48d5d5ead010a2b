"""A release of format 2 stays verifiable, readable and replayable for ever, by this code and by later versions of it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import AtomError, CheckFailed
from pipeline.core.store import sha256_file
from pipeline.core.text import escaped
from release import schema, schema_v2
from release.audit import show, tracing
from release.audit.replay import carried_code, certificate, replay, text
from release.audit.replay.comparison import BITWISE, CLOSE
from release.audit.replay.source import Source
from release.audit.verify import Verdict
from release.repositories import model_folders
from tests.fixtures import old_release_fixtures
from tests.fixtures.audit_fixtures import verify
from tests.fixtures.old_release_fixtures import Tree
from tests.fixtures.release_fixtures import resum
from tests.fixtures.run_fixtures import at_length
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

PHASE, STEP = "pretrain", 30
MODELS = ["model", "model-base", "model-mid", "model-sft", "model-rlvr", "model-rlhf"]


@pytest.fixture(scope="module")
def old_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return old_release_fixtures.unpack(tmp_path_factory.mktemp("kept"))


def test_the_kept_release_is_small_and_the_one_that_was_built() -> None:
    assert old_release_fixtures.ARCHIVE.stat().st_size <= 3_000_000
    assert (
        sha256_file(old_release_fixtures.ARCHIVE) == "59d61d326f8a725b8f28daf931dd3c8e6193a9bf417281dc6add81587889752c"
    )


def by_name(verdict: Verdict) -> dict[str, Any]:
    return {check.name: check for check in verdict.checks}


def test_it_verifies_to_the_last_answer(old_release: Path) -> None:
    verdict = verify(old_release, deep=True)
    checks = by_name(verdict)
    assert verdict.ok, [(check.name, check.wrong) for check in verdict.checks if check.ok is False]
    absent = [name for name, check in checks.items() if check.ok is None]
    changed = ["attestations", "tool_files", "plots", "croissant", "standards", "standards_valid"]
    assert absent == ["signatures", *changed]
    assert checks["versions"].detail == "format 2, card schema 2"
    scored = checks["answers"]
    assert all(f"by {scorer}" in scored.detail for scorer in ("courtesy 1", "exact 1", "problems 1"))
    assert len(scored.skipped) == 1 and scored.skipped[0].startswith("skipped: scored by reward-model judge-")


def test_no_comparison_of_its_cards_is_lost_without_a_word(old_release: Path) -> None:
    """What of the cards is not compared any more is what the registered versions say."""
    from release.cards import card_tables, versions

    checks = by_name(verify(old_release))
    changed = {part for part, since in versions.PARTS.items() if since > schema_v2.CARDS}
    tables = (*card_tables.MODEL_TABLES, *card_tables.DATA_TABLES, *card_tables.RELEASE_TABLES)
    changed |= {table.name for table in tables if table.changed > schema_v2.CARDS}
    for name in ("cards", "data_card"):
        skipped = {line.split(": ")[1].removeprefix("table ").replace(" ", "_") for line in checks[name].skipped}
        assert skipped <= changed and checks[name].ok, checks[name]


def test_each_repository_alone_is_of_format_2(old_release: Path, tmp_path: Path) -> None:
    import shutil

    for folder in ("model", "dataset"):
        alone = Path(shutil.copytree(old_release / folder, tmp_path / folder))
        assert schema.stated(alone) == schema.Stated(2, 2)
        assert verify(alone).ok


def test_its_names_are_those_that_the_schema_lists(old_release: Path) -> None:
    """What stands in its files is known to schema_v2; so a rename in the code finds there what to translate."""
    about = json.loads((old_release / "evidence/release.json").read_text())
    assert about.keys() <= schema_v2.FIELDS["release.json"].keys()
    kinds = {*schema_v2.PHASES, *schema_v2.NODES, *schema_v2.OF_PHASE, *schema_v2.OF_MODEL, "acquire"}
    for node in about["nodes"]:
        assert any(node == kind or node.startswith((f"{kind}-", f"{kind}@")) for kind in kinds), node
    names = {node: schema_v2.node(node) for node in about["nodes"]}
    assert {old: new for old, new in names.items() if old != new and "-" not in old and "@" not in old} == {
        "curate": "dedup", "rlhf": "dpo", "online": "online-rlhf", "judge": "export-reward",
    }  # fmt: skip
    assert names["export-rlhf"] == "export-dpo" and "rlvr" in names.values()
    assert model_folders(old_release) == MODELS


def test_it_is_shown_and_traced(old_release: Path, tmp_path: Path) -> None:
    page = show.facts_of(old_release)
    assert (page["name"], page["version"], page["commit"][:7]) == ("atom-kept", "0.1.0", "f71c494")
    assert list(page["models"]) == [*MODELS[1:], "model"] and all(page["gates"].values())
    assert page["seen"][PHASE]["steps"] == STEP and "atom-kept" in show.text(page)

    step = tracing.trace_step(old_release, PHASE, 1)
    assert step.moved is True and len(step.segments) == 24
    document = tracing.trace_document(old_release, step.segments[0].id)
    assert document.fates[0].kept and 1 in [use.step for use in document.uses if use.phase == PHASE]
    assert document.models == ["base", "mid", "sft", "rlvr", "dpo", "online-rlhf"]
    assert f"{PHASE}-step-{STEP}" in document.checkpoints and "online-step-2" in document.checkpoints
    matches = tracing.trace_text(old_release, "Thank the ", tmp_path).matches
    assert matches and {match.source for match in matches} == {"courtesies"}


@NEEDS_BUBBLEWRAP
def test_a_segment_is_replayed_by_the_code_that_it_carries(old_release: Path, tmp_path: Path) -> None:
    progress: list[str] = []
    result = replay(old_release, PHASE, 0, STEP, progress.append)
    assert result.code.startswith("sha256:") and any("running the code that the release carries" in t for t in progress)
    assert result.tensors == 96 and not [name for name in result.environment if name.startswith("code of ")]
    # another processor or other packages add otherwise
    assert result.verdict == BITWISE or (result.verdict == CLOSE and result.environment)
    assert result.code in text(result)
    notes = certificate(result, old_release)["predicate"]["configuration"][0]["annotations"]
    assert notes["code"] == result.code


@pytest.mark.parametrize("phase", ["rlvr", "rlhf", "reward", "online"])
def test_post_training_is_not_replayed(old_release: Path, phase: str) -> None:
    sentence = f"{phase} of a release before format 3 cannot be replayed, .* can be replayed: pretrain, midtrain, sft$"
    with pytest.raises(AtomError, match=sentence):
        replay(old_release, phase)


def test_carried_code_that_is_not_the_code_that_trained_is_not_run(old_release: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(old_release, tmp_path / "copy"))
    assert carried_code.find(Source(copy), PHASE, STEP) is not None
    engine = copy / "code/stages/train/engine.py"
    engine.write_text(f"{engine.read_text()}\nraise SystemExit('I ran')\n")
    with pytest.raises(CheckFailed, match="engine.py is altered"):
        code = carried_code.find(Source(copy), PHASE, STEP)
        assert code is not None
        code.extract(tmp_path / "extracted")
    resum(copy)  # the checksums agree now, and the statement does not
    assert carried_code.find(Source(copy), PHASE, STEP) is None


def test_without_bubblewrap_the_carried_code_is_refused(
    old_release: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(AtomError, match="bwrap is not on PATH; apt-get install bubblewrap, or give --unconfined"):
        carried_code.confined(old_release, tmp_path, tmp_path, {})
    (tmp_path / "bwrap").write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2; exit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    with pytest.raises(
        AtomError, match="cannot start here: bwrap: setting up uid map: Permission denied; .* --unconfined"
    ):
        carried_code.confined(old_release, tmp_path, tmp_path, {})


@NEEDS_BUBBLEWRAP
def test_the_carried_code_sees_no_network_and_none_of_our_files(old_release: Path, tmp_path: Path) -> None:
    secret, code, work = tmp_path / "secret", tmp_path / "code", tmp_path / "work"
    secret.write_text("s3cret")
    for folder in (code, work):
        folder.mkdir()
    attack = f"""
import os, pathlib, socket
for what in (lambda: open({str(secret)!r}).read(), lambda: open({str(old_release / "README.md")!r}, "a"),
             lambda: open({str(code / "x")!r}, "w"), lambda: socket.create_connection(("1.1.1.1", 53), 2)):
    try:
        what()
    except OSError:
        continue
    raise SystemExit("it reached out")
assert "TOKEN" not in os.environ and os.getpid() < 20, os.getpid()
pathlib.Path("done").write_text("yes")
"""
    line = carried_code.confined(old_release, code, work, {"HOME": str(work)})
    process = subprocess.run(
        [*line, sys.executable, "-c", attack], capture_output=True, text=True, env={"TOKEN": "x", "PATH": "/usr/bin:/bin"},
        check=False,
    )  # fmt: skip
    assert process.returncode == 0 and (work / "done").read_text() == "yes", process.stderr


def test_what_a_model_wrote_is_escaped_on_cards_of_today(old_release: Path) -> None:
    from release.cards import chat_tables

    drawn = (old_release / "model-rlvr/README.md").read_bytes()
    assert b"\x12" in drawn and verify(old_release / "model-rlvr").ok, (
        "a model of bytes wrote it, and cards showed it so"
    )
    assert chat_tables._code_cell("Thank\x1b[2J you\u202e") == "`Thank\\x1b[2J you\\u202e`"
    assert escaped(escaped("\x12|é")) == "\\x12|é"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path / "later")


def change_a_table(tree: Tree) -> None:
    tree.replace("release/cards/model.md.jinja", "## How it was trained", "## Training")
    tree.replace("release/cards/tables.py", '"bytes scored"', '"bytes measured"')


def test_a_later_card_template_does_not_make_it_bad(old_release: Path, tree: Tree) -> None:
    change_a_table(tree)
    code, checks = tree.verify(old_release / "model")
    assert code == 1 and "bytes measured" in checks["cards"]["wrong"][0], "so a change without a new schema is found"

    schema_line = next(
        line for line in (tree.folder / "release/cards/versions.py").read_text().splitlines() if line[:9] == "SCHEMA = "
    )
    next_schema = int(schema_line.removeprefix("SCHEMA = ")) + 1
    tree.replace("release/cards/versions.py", schema_line, f"SCHEMA = {next_schema}")
    line = 'CardTable("samples", lambda model: tables.samples(model.scores), added=2),'
    novelty = f'CardTable("novelties", lambda model: ["a new line"], added={next_schema}),'
    changed = line.replace("added=2", f"added=2, changed={next_schema}")
    tree.replace("release/cards/card_tables.py", line, f"{novelty}\n    {changed}")
    code, checks = tree.verify(old_release / "model")
    assert code == 0, [check for check in checks.values() if check["ok"] is False]
    message = f"skipped: table samples: the card has schema 2, and this atom renders it as in schema {next_schema}"
    assert checks["cards"]["ok"] and message in checks["cards"]["skipped"]
    assert message in tree.atom("verify", str(old_release / "model")).stdout, "the text says it as well"


def test_a_later_scorer_does_not_make_it_bad(old_release: Path, tree: Tree) -> None:
    scorers = tree.folder / "stages/scorers"
    stricter = (scorers / "exact_v1.py").read_text().replace("float(right and finished)", "0.0")
    (scorers / "exact_v2.py").write_text(stricter)
    with open(scorers / "__init__.py", "a") as file:
        file.write("\nfrom stages.scorers import exact_v2\ndel SCORERS['exact', '1']\n")
        file.write("SCORERS['exact', '2'], LATEST['exact'] = exact_v2.score, '2'\n")
    code, checks = tree.verify(old_release / "dataset", "--deep")
    assert code == 0, [check for check in checks.values() if check["ok"] is False]
    skipped = next(line for line in checks["answers"]["skipped"] if "exact" in line)
    assert skipped.startswith("skipped: scored by exact 1: ") and skipped.endswith("this atom holds exact 2")


IDENTITY = '''"""Format 5: today's names."""
COLUMNS = {}
def same(name): return name
phase = model = node = same
def release(body): return dict(body)
def fields(file, value): return value
def column(table, today): return today
def scorer(row): return None
'''
V2 = "release/schema_v2.py"


def rename_everything(tree: Tree) -> None:
    """Nodes, phases, models, fields and a column get other names in the code, and the format becomes 5."""
    tree.replace("release/layout.py", '"dpo"', '"preference"')
    tree.replace("release/layout.py", '"online-rlhf"', '"onlinerl"')
    tree.replace("release/layout.py", "FORMAT = 4", "FORMAT = 5")
    tree.replace(V2, '"rlhf": "dpo"', '"rlhf": "preference"')
    tree.replace(V2, '"online": "online-rlhf"', '"online": "onlinerl"')
    tree.replace(V2, '"judge": "export-reward"', '"judge": "export-scorer"')
    tree.replace_all(r'"accuracy(_all)?"', r'"exact_match\1"', "release", "stages", without=[V2])
    tree.replace_all(r"\bkept_hash\b", "text_hash", "release", without=[V2])
    tree.replace_all(r'(body|facts)\["license"\]', r'\1["spdx"]', "release", without=[V2])
    tree.replace_all(r"\blicense(: |=)(?=PublishedLicenses)", r"spdx\1", "release")
    tree.replace_all(r"\brelease\.license\b", "release.spdx", "release")
    tree.replace("release/audit/show.py", '"license", "commit"', '"spdx", "commit"')
    tree.replace("release/schema.py", "4: schema_v3}", "4: schema_v3, 5: schema_v5}")
    tree.replace("release/schema.py", "import schema_v2, schema_v3", "import schema_v2, schema_v3, schema_v5")
    (tree.folder / "release/schema_v5.py").write_text(IDENTITY)
    with open(tree.folder / V2, "a") as file:
        file.write("FIELDS['scores.json'] |= {'accuracy': 'exact_match', 'accuracy_all': 'exact_match_all'}\n")
        file.write("FIELDS['release.json'] |= {'licence': 'spdx'}\n")
        file.write("COLUMNS['dispositions.parquet'] = {'kept_hash': 'text_hash'}\n")
    with open(tree.folder / "release/cards/versions.py", "a") as file:
        file.write("SCHEMA += 1\nPARTS |= dict.fromkeys(('eval_results', 'attestations', 'croissant'), SCHEMA)\n")
    # columns are called after the models, so that what changed before changes again
    tree.replace_all(r"changed=[45]\b", "changed=6", "release")


@at_length("release", 19)
def test_it_outlives_a_rename_of_everything(old_release: Path, tree: Tree) -> None:
    rename_everything(tree)
    code, checks = tree.verify(old_release)
    assert code == 0, [check for check in checks.values() if check["ok"] is False]
    assert {"scores", "cards", "data_card", "gates", "statements"} <= {n for n, check in checks.items() if check["ok"]}
    code, deep = tree.verify(old_release / "dataset", "--deep")
    assert code == 0, [check for check in deep.values() if check["ok"] is False]
    assert {"documents", "order", "answers"} <= {name for name, check in deep.items() if check["ok"]}
    assert checks["versions"]["detail"] == "format 2, card schema 2"

    page = json.loads(tree.atom("show", str(old_release), "--json").stdout)
    assert list(page["models"]) == [*MODELS[1:], "model"], "in the order of training, by folders as they are"
    assert page["spdx"]["weights"] == "Apache-2.0" and "preference" not in page["models"]
    step = json.loads(tree.atom("trace", str(old_release), "--phase", "rlvr", "--step", "1", "--json").stdout)
    document = json.loads(tree.atom("trace", str(old_release), "--doc", step["segments"][0]["id"], "--json").stdout)
    assert document["models"] == ["sft", "rlvr", "preference", "onlinerl"]
    assert document["fates"][0]["text_hash"], "a column under today's name"
