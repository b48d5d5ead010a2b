"""The commands about a release: from building it to what a stranger asks of it."""

import typer

from release.commands import auditing, publishing

app = typer.Typer()
app.add_typer(publishing.app)
app.add_typer(auditing.app)
