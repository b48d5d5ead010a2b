"""The command that talks to a model: chat."""

from __future__ import annotations

import contextlib
import json
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import AtomError, installing
from pipeline.core.progress import StatusLine
from pipeline.operations.command_options import RELEASE, JsonOption

if TYPE_CHECKING:
    from stages.generation.chat_models import ChatModel
    from stages.rl.rollout.generation import Toolbox

app = typer.Typer()


@app.command(rich_help_panel=RELEASE)
def chat(
    target: Annotated[
        str, typer.Argument(metavar="RELEASE|REPO|URL", help="folder, Hub id namespace/name[@revision], or server")
    ],
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="such as model-sft of a release; or a server's")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="print the answer to this, and exit")] = None,
    temperature: Annotated[float, typer.Option(min=0, max=10, help="0: the likeliest token")] = 0,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="of an answer with its thinking; default: all")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**32 - 1, help="of an answer with a temperature above 0")] = 0,
    python: Annotated[bool, typer.Option("--python", help="let it run Python programs, in the sandbox")] = False,
    as_json: JsonOption = False,
) -> None:
    """Talk to a released model in the terminal.

    The model runs in this process on the CPU, or on a server of OpenAI's API. A conversation begins with problems of
    the model's evaluation to choose from; /help lists its commands.

    With --prompt, or a text on stdin, the answer alone is printed; with --json also thinking, number of tokens, and why
    it stopped: end, limit (--max-tokens) or context. HF_ENDPOINT and HF_TOKEN are respected, and OPENAI_API_KEY is sent
    to a server.

    With --python the model is offered the tool that RL has: its programs run in the sandbox, for two seconds of
    processor time each. They and their results are shown, and so is each turn of an answer; --json has all calls.

    `atom chat local/atom-tiny@v0.1.0` talks to a model of the Hub, `atom chat http://127.0.0.1:8000/v1` to one on a
    server, and `atom chat runs/releases/atom-tiny-0.1.0 --model model-sft --prompt "216+840"` asks an earlier model.

    Example: atom chat runs/releases/atom-tiny-0.1.0
    """
    if prompt is None and not sys.stdin.isatty():
        prompt = sys.stdin.read().strip()
    if prompt == "" or (prompt is None and as_json):
        raise AtomError("there is nothing to answer: give --prompt TEXT, or a text on stdin")

    from rich.console import Console

    from release.chat.session import Session
    from release.chat.source import find, introduce, suggest
    from stages.generation.chat_models import ChatSampling, InProcessChat, ServedChat

    lines, suggestions = [], []
    with StatusLine(quiet=not sys.stderr.isatty()) as progress:
        progress(f"loading {target}")
        if target.startswith(("http://", "https://")):
            chat_model: ChatModel = ServedChat(target, model)
        else:
            folder = find(target, model)
            lines = introduce(target, folder)
            try:
                suggestions = suggest(target, folder) if prompt is None else []
            except AtomError as error:
                lines.append(f"no problems to suggest: {error}")
            try:
                chat_model = InProcessChat(folder)
            except ImportError as error:
                raise AtomError(f"{error}; {installing('train')}") from None

    sampling = ChatSampling(temperature, max_tokens, seed)
    with contextlib.ExitStack() as stack:
        toolbox = stack.enter_context(contextlib.closing(_python())) if python else None
        session = Session(Console(quiet=as_json), chat_model, sampling, toolbox)
        if prompt is None:
            import readline  # noqa: F401 - with it, arrow keys edit and recall lines

            print("\n".join([f"{target}: {chat_model.description}", *lines]))
            return session.run(suggestions)
        reply = session.turn(prompt)
    if as_json:
        fields = {name: getattr(reply, name) for name in ("thinking", "answer", "tokens", "stopped")}
        calls = {"calls": session.calls} if python else {}
        print(json.dumps({"prompt": prompt, **fields, **calls}, ensure_ascii=False, indent=1))
    if not reply.stopped:
        raise typer.Exit(130)


def _python() -> Toolbox:
    """Starts the tool `python`. Raises AtomError where no sandbox runs."""
    from stages.rl.rollout.generation import Toolbox
    from stages.rl.tools.settings import Tools

    tools = Tools.model_validate({"offered": [{"tool": "python", "workers": 1, "cpu_seconds": 2}]})
    for tool in tools.offered:
        if reason := tool.missing():
            raise AtomError(reason)
    return Toolbox(tools)
