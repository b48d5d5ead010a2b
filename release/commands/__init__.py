"""The commands about a release: build, sign, publish, verify, show, trace, replay, chat, predict, ladder, demo."""

import typer

from release.commands import auditing, chatting, predicting, publishing

app = typer.Typer()
app.add_typer(publishing.app)
app.add_typer(auditing.app)
app.add_typer(chatting.app)
app.add_typer(predicting.app)
