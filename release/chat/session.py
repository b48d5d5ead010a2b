"""A conversation with a model in the terminal: streamed answers, folded thinking, and commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from release.chat.source import Suggestion
from stages.formats.chat import Message
from stages.generation.chat_models import ChatModel, ChatSampling, Reply
from stages.generation.protocols import ToolCall
from stages.rl.rollout.generation import MOST_CALLS, Request, Toolbox

# Lines of thinking that are on the screen while it arrives.
THINKING_LINES = 8
# Characters of a suggestion on the screen.
SUGGESTION_WIDTH = 70
HELP = """\
/1 /2 …   ask a suggested problem, in a new conversation
/think    show the thinking of the last answer
/reset    begin a new conversation
/quit     leave, as Ctrl-D does
Ctrl-C stops an answer."""
# What a conversation is to the tools, which are offered by tasks.
TASK = {"id": "chat", "kind": "chat"}
# {why an answer ended: what is said of it}
ENDINGS = {"limit": "cut at --max-tokens", "context": "cut: the model's context is full", "": "stopped"}


class Session:
    """A conversation of several turns.

    On a terminal, the last lines of the thinking are dim, and give way to one line when the answer begins. Elsewhere
    only the answers are printed.

    Attributes:
        messages: The turns so far. A turn without an answer is left out.
        last: The last answer; its tokens are those of all its turns.
        calls: The calls of tools in the last answer, with their results.
    """

    def __init__(
        self, console: Console, model: ChatModel, sampling: ChatSampling, toolbox: Toolbox | None = None
    ) -> None:
        self.console, self.model, self.toolbox = console, model, toolbox
        self.sampling = replace(sampling, tools=toolbox.tools.schemas(TASK)) if toolbox else sampling
        self.messages: list[Message] = []
        self.last = Reply()
        self.calls: list[ToolCall] = []

    def run(self, suggestions: Sequence[Suggestion], read: Callable[[str], str] = input) -> None:
        """Reads lines until the user leaves."""
        for number, suggestion in enumerate(suggestions, 1):
            self._print(f"  /{number}  {escaped(suggestion.prompt, SUGGESTION_WIDTH)}")
        problems = "/1, /2 … ask a problem of its evaluation; " if suggestions else ""
        self._print(f"{problems}/think unfolds the thinking; /help lists all commands")
        while True:
            try:
                self._print("")
                line = read("> ").strip()
            except KeyboardInterrupt:
                self._print("\nCtrl-D or /quit leaves")
                continue
            except EOFError:
                line = "/quit"
            if line == "/quit":
                return
            try:
                if re.fullmatch(r"/\w*", line):
                    self._command(line[1:], suggestions)
                elif line:
                    self.turn(line)
            except AtomError as error:
                self._print(str(error))

    def _command(self, name: str, suggestions: Sequence[Suggestion]) -> None:
        if name in map(str, range(1, len(suggestions) + 1)):
            prompt, expected = suggestions[int(name) - 1]
            self._print(visible(prompt))
            # Alone, as in the evaluation: a model may have learned from conversations of one question only.
            self.messages.clear()
            self.turn(prompt)
            if expected is not None:
                self._note(f"the evaluation expects: {visible(str(expected))}")
        elif name == "think":
            self._note(visible(self.last.thinking) or "the last answer has no thinking")
        elif name == "reset":
            self.messages.clear()
            self._print("a new conversation")
        else:
            self._print(HELP if name == "help" else f"there is no command /{name}; /help lists them")

    def turn(self, text: str) -> Reply:
        """Asks, shows the answer as it arrives, and returns it. Ctrl-C ends it early; `stopped` is then empty.

        A turn that calls tools is followed by their results and by the next turn.
        """
        turns: list[Message] = [{"role": "user", "content": text}]
        most, tokens = self.toolbox.tools.max_turns if self.toolbox else 1, 0
        self.calls = []
        for number in range(1, most + 1):
            self._draw(turns)
            tokens += self.last.tokens
            if self.last.stopped != "end" or not (calls := self.last.calls[:MOST_CALLS] if self.toolbox else []):
                break
            if number == most:
                self._note(f"it calls a tool again in turn {most}, which is not answered")
                break
            if not (answered := self._call_tools(calls)):
                break
            self.calls += answered
            turns += self.last.turns([call["result"] for call in answered])
        self.last.tokens = tokens
        if self.last.stopped in ENDINGS:
            self._note(ENDINGS[self.last.stopped])
        if self.last.answer:
            self.messages += [*turns, {"role": "assistant", "content": self.last.answer}]
        else:
            self._note("the model gave no answer")
        return self.last

    def _draw(self, turns: Sequence[Message]) -> None:
        self.last, self._printed = Reply(self._show, with_tools=self.toolbox is not None), 0
        self._live = Live(console=self.console, transient=True, auto_refresh=False)
        try:
            self.model.respond([*self.messages, *turns], self.sampling, self.last)
            # What could have been the beginning of a mark is shown now.
            self._show(self.last)
        except KeyboardInterrupt:
            pass  # what has arrived is the answer
        finally:
            self._fold()
            if self._printed:
                self.console.print()

    def _call_tools(self, requests: Sequence[str]) -> list[ToolCall]:
        """Shows and answers calls of tools. Ctrl-C gives them up; a program then ends at its limit of time."""
        assert self.toolbox is not None
        answered: list[ToolCall] = []
        try:
            for request in requests:
                self._note(f"calls {visible(request)}")
                answered += self.toolbox.answer([Request(TASK, [request])])
                self._note(visible(answered[-1]["result"]).rstrip())
        except KeyboardInterrupt:
            self.last.stopped = ""
            return []
        return answered

    def _show(self, reply: Reply) -> None:
        if answer := reply.answer[self._printed :]:
            self._fold()
            self.console.out(visible(answer) if self.console.is_terminal else answer, end="", highlight=False)
            self._printed += len(answer)
        elif self.console.is_terminal and reply.thinking and not self._printed:
            self._live.start()
            end = reply.thinking[-THINKING_LINES * self.console.width :]
            lines = Text(visible(end), style="dim").wrap(self.console, self.console.width)
            self._live.update(Text("\n").join(lines[-THINKING_LINES:]), refresh=True)

    def _fold(self) -> None:
        """Replaces the thinking on the screen by one line."""
        if self._live.is_started:
            self._live.stop()
            self._note(f"thought for {self.last.tokens} tokens")

    def _print(self, text: str) -> None:
        self.console.print(Text(text), soft_wrap=True)

    def _note(self, text: str) -> None:
        """Prints a line that is not the model's: dim on a terminal, and else on standard error."""
        if self.console.is_terminal and not self.console.quiet:
            self.console.print(Text(text, style="dim"), soft_wrap=True)
        else:
            print(f"atom: {text}", file=sys.stderr)


def visible(text: str) -> str:
    """Returns a text of a model in which no character moves the cursor or changes the terminal."""
    return "\n".join(map(escaped, text.expandtabs(4).split("\n")))
