"""The command that shows the whole pipeline."""

from __future__ import annotations

from typing import Annotated

import typer

from pipeline.operations.command_options import QuietOption

app = typer.Typer()


@app.command()
def demo(
    recipe: Annotated[str, typer.Argument(help="name of a packaged recipe, or path to its YAML file")] = "atom-tiny",
    quiet: QuietOption = False,
) -> None:
    """Take a tiny model from raw text to a verified release.

    Runs, builds, signs, publishes to a local Hub, pulls back and verifies, and says what each step proves. It needs no
    account and no network. A second run uses what is sealed.

    Example: atom demo atom-smoke
    """
    from release import demo as whole

    whole.demo(recipe, quiet)
