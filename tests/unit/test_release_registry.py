"""Checks and card tables are registered: each by one line, none forgotten, each with the names that were published."""

from __future__ import annotations

import importlib
import inspect
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from release.assembly.data_facts import DataFacts, read_data_facts
from release.assembly.published_tables import read_json, stream_rows
from release.audit.verify import verify
from release.cards import card_tables, render, versions
from release.cards.card_tables import CardTable
from release.checks import gates, registry
from release.checks.check import BuildCheck, BuildContext, Check, Reads, Subject
from release.checks.findings import Findings
from tests.fixtures import ROOT

ENGINE = {
    "__init__", "check", "check_runner", "confine", "findings", "formats", "gates", "listing", "load_report",
    "registry", "table_sizes", "verdict",
}  # fmt: skip
"""Modules of release/checks that run checks, and hold none."""
GATES = {
    "card_numbers", "chat_template_round_trip", "checkpoints_and_order", "contamination_report", "counts_balance",
    "croissant", "dpo_is_preferred", "export_parity", "fresh_set", "ledger_closed", "licenses_known",
    "longcontext_finds_passkeys", "longcontext_keeps_bits_per_byte", "midtraining_keeps_bits_per_byte",
    "midtraining_raises_accuracy", "no_secrets", "online-rlhf_is_preferred", "pretraining_lowers_bits_per_byte",
    "reload_in_transformers", "rlhf_keeps_skills", "rlvr_raises_pass_at_1",
}  # fmt: skip
VERIFIERS = {
    "answers", "attestations", "cards", "chat_templates", "code", "croissant", "data_card", "dispositions_balance",
    "documents", "fresh_set", "gates", "licenses", "manifests", "merkle_roots", "order", "origins",
    "reload_in_transformers", "scores", "statements", "versions", "weights",
}  # fmt: skip
CARDS = {
    "model.md.jinja": (*card_tables.MODEL_TABLES, *card_tables.RELEASE_TABLES),
    "data.md.jinja": card_tables.DATA_TABLES,
}
NOT_REGISTERED = {"tables.table", "tables.checkpoints", "chat_tables.ordered"}
"""What builds a table from cells, the one table of the card of checkpoints, which no check compares, and names."""


def functions_of(module: str) -> dict[str, Callable[..., Any]]:
    """The public functions of a module of release/checks that are checks by their types."""
    imported = importlib.import_module(f"release.checks.{module}")
    functions = inspect.getmembers(imported, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == imported.__name__
        and not name.startswith("_")
        and {"Subject", "BuildContext"} & set(function.__annotations__.values())
    }


def registered_functions() -> set[Callable[..., Any]]:
    functions = (check.function for check in registry.CHECKS)
    return {function.func if isinstance(function, partial) else function for function in functions}


def test_every_file_of_checks_is_registered() -> None:
    modules = {path.stem for path in (ROOT / "release/checks").glob("*.py")} - ENGINE
    registered = {function.__module__.rpartition(".")[2] for function in registered_functions()}
    forgotten = sorted(modules - registered)
    assert not forgotten, (
        f"release/checks/{forgotten[0]}.py has no line in CHECKS of release/checks/registry.py; add it"
    )
    for module in sorted(modules):
        for name, function in functions_of(module).items():
            assert function in registered_functions(), (
                f"{name} of release/checks/{module}.py has no line in CHECKS of release/checks/registry.py; add it"
            )


def test_each_function_is_one_check() -> None:
    whole = [check.function for check in registry.CHECKS if not isinstance(check.function, partial)]
    assert len(whole) == len(set(whole))


def test_names_are_those_that_were_published() -> None:
    """They stand in evidence/gates.json and in verdicts, which others read: none is renamed, a new one is added here."""
    names = [check.name for check in registry.CHECKS if isinstance(check, Check)]
    assert set(gates.names()) == GATES
    assert set(names) == VERIFIERS and len(names) == len(VERIFIERS)


def test_a_card_shows_every_registered_table_and_no_other() -> None:
    for template, registered in CARDS.items():
        shown = set(re.findall(r"\bt\.(\w+)", (render.TEMPLATES / template).read_text()))
        names = [table.name for table in registered]
        assert len(names) == len(set(names)), f"two tables of {template} have one name"
        for name in sorted(set(names) - shown):
            raise AssertionError(f"release/cards/{template} shows no table {name}; write {{{{ t.{name} }}}} into it")
        for name in sorted(shown - set(names)):
            raise AssertionError(
                f"{template} shows t.{name}, which has no line in release/cards/card_tables.py; add it"
            )


def test_every_function_of_a_table_is_registered() -> None:
    text = (ROOT / "release/cards/card_tables.py").read_text()
    for path in sorted((ROOT / "release/cards").glob("*tables.py")):
        module = importlib.import_module(f"release.cards.{path.stem}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            full_name = f"{path.stem}.{name}"
            is_table = function.__module__ == module.__name__ and function.__annotations__["return"] == "list[str]"
            if is_table and not name.startswith("_") and full_name not in NOT_REGISTERED:
                assert full_name in text, f"{full_name} has no line in release/cards/card_tables.py; add it"


def test_no_table_is_newer_than_the_card_schema() -> None:
    for table in (table for registered in CARDS.values() for table in registered):
        newest = max(table.added, table.changed)
        assert newest <= versions.SCHEMA, (
            f"table {table.name} is of card schema {newest}, and SCHEMA in release/cards/versions.py is "
            f"{versions.SCHEMA}; raise it and say there what is new"
        )


def short_documents(subject: Subject) -> Findings:
    """No document that was kept is empty."""
    rows = list(stream_rows(subject.folder / "dispositions.parquet", ["id", "disposition", "bytes"]))
    empty = [row["id"] for row in rows if row["disposition"] == "kept" and not row["bytes"]]
    problems = [f"dispositions.parquet: document {name} is empty" for name in empty]
    return Findings(problems, summary=f"{len(rows)} documents, none of the kept ones empty")


SHORT_DOCUMENTS = Check(
    "short_documents", short_documents, registry.DATASET, Reads(("dispositions",)), gate="no_short_documents",
    remedy="add a rule to the data recipe",
)  # fmt: skip


def test_a_new_check_is_a_gate_and_a_verifier(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "CHECKS", (*registry.CHECKS, SHORT_DOCUMENTS))
    result = gates.run_gate("no_short_documents", BuildContext(built, {}, {}, DataFacts()))
    assert result == gates.GateResult("no_short_documents", True, "24 documents, none of the kept ones empty")
    for folder in (built, built / "dataset"):
        assert [check.ok for check in verify(folder).checks if check.name == "short_documents"] == [True]
    assert [check.name for check in verify(built / "model").checks if check.name == "short_documents"] == []


def test_a_gate_names_the_first_problem_and_the_remedy(built: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = BuildCheck("always_bad", lambda build: Findings(["model/README.md is short", "another"]), "write more")
    monkeypatch.setattr(registry, "CHECKS", (bad,))
    assert gates.run_all(BuildContext(built, {}, {}, DataFacts())) == [
        gates.GateResult("always_bad", False, "model/README.md is short; write more")
    ]


def kept_share(data: DataFacts) -> list[str]:
    return [f"- {name}: {row.kept} of {row.documents_in} documents kept." for name, row in data.sources.items()]


def test_a_new_table_is_on_the_card_and_is_compared(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    templates = Path(shutil.copytree(render.TEMPLATES, tmp_path / "templates"))
    text = (templates / "data.md.jinja").read_text()
    (templates / "data.md.jinja").write_text(text.replace("{{ t.sources }}", "{{ t.sources }}\n\n{{ t.kept_share }}"))
    monkeypatch.setattr(render, "TEMPLATES", templates)
    next_schema = versions.SCHEMA + 1
    for added, problems in ((next_schema, []), (versions.SCHEMA, ["README.md lacks the line '- prose: 10 of 12 "])):
        new = CardTable("kept_share", kept_share, added=added)
        monkeypatch.setattr(card_tables, "DATA_TABLES", (new,))
        card = render.data_card(read_json(built / "evidence/release.json"), read_data_facts(built / "dataset"))
        assert "- prose: 10 of 12 documents kept." in card
        check = next(check for check in verify(built / "dataset").checks if check.name == "data_card")
        assert len(check.wrong) == 2 * len(problems), "a published card of an older schema has no such table"
        assert all(line.startswith(start) for line, start in zip(check.wrong[:1], problems, strict=True))
