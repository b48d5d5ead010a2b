"""The `atom` command. Heavy imports are inside the commands, so that `atom --help` is fast."""

from __future__ import annotations

import importlib
import locale
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from pipeline.cli import home_commands, recipe_commands, run_commands
from pipeline.core import os_errors, process
from pipeline.core.errors import AtomError
from pipeline.core.json_files import DamagedFile
from pipeline.graph import registry
from pipeline.operations.command_options import CHECK, DATA, PLAN_AND_RUN, RELEASE, open_store

PANELS = (PLAN_AND_RUN, RELEASE, CHECK, DATA)


class CommandGroup(TyperGroup):
    """The commands, which `atom --help` lists by who needs them."""

    def panels(self) -> dict[str, dict[str, Any]]:
        """Returns the commands of each panel. A command without one is about planning and running."""
        panels: dict[str, dict[str, Any]] = {panel: {} for panel in PANELS}
        for name, command in self.commands.items():
            panels[getattr(command, "rich_help_panel", None) or PLAN_AND_RUN][name] = command
        return panels

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = formatter.width - 6 - max(map(len, self.commands))
        for panel, commands in self.panels().items():
            with formatter.section(panel):
                formatter.write_dl([(name, command.get_short_help_str(width)) for name, command in commands.items()])


app = typer.Typer(
    cls=CommandGroup,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="""Train an open LLM from raw text to a signed Hugging Face release that anyone can verify, trace and replay.

A RECIPE is a packaged name (atom-tiny, atom-smoke) or a path to a YAML file. Everything produced lies under one folder,
$ATOM_HOME (default: ./runs). Exit codes: 0 fine, 1 the checked thing is bad, 2 the caller's mistake.

Start with: atom plan atom-tiny, then atom run atom-tiny.""",
)


def _print_version(is_set: bool) -> None:
    if is_set:
        from importlib.metadata import version

        print(f"atom {version('atom-release')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None: ...


for module in (recipe_commands, run_commands, home_commands, *map(importlib.import_module, registry.COMMANDS)):
    app.add_typer(module.app)


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: Any = None,
    line: str | None = None,
) -> None:
    """Prints warnings of atom as plain sentences, and all others in Python's format."""
    if issubclass(category, DamagedFile):
        print(f"atom: {message}", file=sys.stderr)
    else:
        print(warnings.formatwarning(message, category, filename, lineno, line), end="", file=file or sys.stderr)


def main() -> None:
    """Runs the command line. An AtomError becomes one sentence and an exit code; a bug keeps its traceback."""
    if locale.getpreferredencoding(False).lower().replace("-", "") != "utf8":
        # All text files of atom are UTF-8, whatever the locale: restart in Python's UTF-8 mode.
        os.execv(sys.executable, [sys.executable, "-X", "utf8", "-m", "pipeline.cli", *sys.argv[1:]])
    process.collect_rarely()  # before a command imports anything large
    warnings.showwarning = _show_warning
    try:
        app()
    except AtomError as error:
        print(f"atom: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read the output has ended, as `head` does. Python would print a second error when it flushes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        # A fault of the disk, or of a path of the command line, is one sentence too; anything else is a bug of atom.
        values = (word.partition("=")[2] if word.startswith("--") else word for word in sys.argv[1:])
        fault = os_errors.find(error, open_store().home, filter(None, values))
        if fault is None or not fault.text:
            raise
        print(f"atom: {fault.text}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
