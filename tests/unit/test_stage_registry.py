"""Every module that defines a stage has a line in the graph's registry, and the registry names no other."""

from __future__ import annotations

import re

from stages.graph import STAGES
from tests.fixtures import ROOT


def test_modules_and_registry_name_each_other() -> None:
    files = [path for path in (ROOT / "stages").rglob("*.py") if re.search(r"^STAGE\b.* = ", path.read_text(), re.M)]
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path.relative_to(ROOT) for path in files}
    named = {place.partition(":")[0] for place in STAGES.values()}
    for module, path in sorted(modules.items()):
        assert module in named, f"{path} defines STAGE and has no line in STAGES of stages/graph.py; add it"
    assert named - set(modules) == set(), "STAGES of stages/graph.py names a module without STAGE"
