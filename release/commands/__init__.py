"""The commands about data and a release: pin, build, sign, publish, verify, show, trace, replay, chat, predict."""

import typer

from release.commands import auditing, chatting, pinning, predicting, publishing

app = typer.Typer()
app.add_typer(publishing.app)
app.add_typer(auditing.app)
app.add_typer(chatting.app)
app.add_typer(predicting.app)
app.add_typer(pinning.app)
