"""The commands about a release: build, sign, publish, verify, show, trace, replay."""

import typer

from release.commands import auditing, publishing

app = typer.Typer()
app.add_typer(publishing.app)
app.add_typer(auditing.app)
