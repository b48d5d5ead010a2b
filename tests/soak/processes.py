"""Processes of the soak whose output is shown while they run, and the commit that they belong to."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from typing import Any

from tests.fixtures import ROOT


def result(command: list[str], environment: Mapping[str, str] | None = None) -> Any:
    """The last line that a command prints, which is JSON. Raises SystemExit if it fails."""
    lines: list[str] = []
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            lines.append(line)
            print(line, end="", flush=True)
    if process.returncode:
        raise SystemExit(f"soak: {' '.join(command)} failed; its last lines are above")
    return json.loads(lines[-1])


def commit() -> str:
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
