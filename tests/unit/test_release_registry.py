"""Checks and card tables are registered: each by one line, none forgotten, each with the names that were published."""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from release.cards import card_tables, render
from release.checks import registry
from release.checks.check import BuildCheck, BuildContext, Check, Findings, GateResult
from release.facts.data_facts import DataFacts
from tests.fixtures import ROOT, release_fixtures

ENGINE = {"__init__", "check", "check_runner", "formats", "listing", "registry", "verdict"}
"""Modules of release/checks that run checks, and hold none."""
GATES = {
    "card_numbers", "chat_template_round_trip", "checkpoints_and_order", "contamination_report", "counts_balance",
    "croissant", "dpo_is_preferred", "export_parity", "fresh_set", "ledger_closed", "licenses_known",
    "longcontext_finds_passkeys", "longcontext_keeps_bits_per_byte", "midtraining_keeps_bits_per_byte",
    "midtraining_raises_accuracy", "no_secrets", "online-rlhf_is_preferred", "pretraining_lowers_bits_per_byte",
    "reload_in_transformers", "rlhf_keeps_skills", "rlvr_raises_pass_at_1", "standards",
}  # fmt: skip
VERIFIERS = {
    "answers", "attestations", "cards", "chat_templates", "code", "croissant", "data_card", "dispositions_balance",
    "documents", "fresh_set", "gates", "licenses", "manifests", "merkle_roots", "order", "origins",
    "reload_in_transformers", "scores", "standards", "standards_valid", "statements", "versions", "weights",
}  # fmt: skip
CARDS = {
    "model.md.jinja": (*card_tables.MODEL_TABLES, *card_tables.RELEASE_TABLES),
    "data.md.jinja": card_tables.DATA_TABLES,
}
NOT_REGISTERED = {
    "tables.table", "tables.explained_table", "tables.checkpoints",
}  # fmt: skip
"""What builds a table from cells, and the table of the card of checkpoints, which no check compares."""


def functions_of(module: str) -> dict[str, Callable[..., Any]]:
    """The public functions of a module of release/checks that are checks by their types."""
    imported = importlib.import_module(f"release.checks.{module}")
    functions = inspect.getmembers(imported, inspect.isfunction)
    return {
        name: function
        for name, function in functions
        if function.__module__ == imported.__name__
        and not name.startswith("_")
        and {"Release", "BuildContext"} & set(function.__annotations__.values())
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
    """They stand in evidence/gates.json and in verdicts, which others read: none is renamed or taken away."""
    names = [check.name for check in registry.CHECKS if isinstance(check, Check)]
    assert set(registry.gate_names()) >= GATES
    assert set(names) >= VERIFIERS and len(names) == len(set(names))


def test_a_card_shows_every_registered_table_and_no_other() -> None:
    for template, registered in CARDS.items():
        shown = set(re.findall(r"\bt\.(\w+)", (render.TEMPLATES / template).read_text()))
        names = [table.name for table in registered if not table.heading]
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


def test_a_gate_names_the_first_problem_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = BuildCheck("always_bad", lambda build: Findings(["model/README.md is short", "another"]), "write more")
    monkeypatch.setattr(registry, "CHECKS", (bad,))
    assert registry.run_gates(
        BuildContext(release_fixtures.opened(tmp_path, info=release_fixtures.release_info(), data=DataFacts()), {})
    ) == [GateResult("always_bad", False, "model/README.md is short; write more")]
