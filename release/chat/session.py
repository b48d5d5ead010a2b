"""A conversation with a model in the terminal: streamed answers, folded thinking, and commands."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipeline.core.errors import AtomError
from pipeline.core.text import escaped
from release.chat.source import Suggestion
from stages.generation.chat_models import ChatModel, ChatSampling, Reply

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
# {why an answer ended: what is said of it}
ENDINGS = {"limit": "cut at --max-tokens", "context": "cut: the model's context is full", "": "stopped"}


class Session:
    """A conversation of several turns.

    On a terminal, the last lines of the thinking are dim, and give way to one line when the answer begins. Elsewhere
    only the answers are printed.

    Attributes:
        messages: The turns so far. A turn without an answer is left out.
        last: The last answer.
    """

    def __init__(self, console: Console, model: ChatModel, sampling: ChatSampling) -> None:
        self.console, self.model, self.sampling = console, model, sampling
        self.messages: list[dict[str, str]] = []
        self.last = Reply()

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
        """Asks, shows the answer as it arrives, and returns it. Ctrl-C ends it early; `stopped` is then empty."""
        question = {"role": "user", "content": text}
        self.last, self._printed = Reply(self._show), 0
        self._live = Live(console=self.console, transient=True, auto_refresh=False)
        try:
            self.model.respond([*self.messages, question], self.sampling, self.last)
            # What could have been the beginning of a mark is shown now.
            self._show(self.last)
        except KeyboardInterrupt:
            pass  # what has arrived is the answer
        finally:
            self._fold()
            if self._printed:
                self.console.print()
        if self.last.stopped in ENDINGS:
            self._note(ENDINGS[self.last.stopped])
        if self.last.answer:
            self.messages += [question, {"role": "assistant", "content": self.last.answer}]
        else:
            self._note("the model gave no answer")
        return self.last

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
        if self.console.is_terminal:
            self.console.print(Text(text, style="dim"), soft_wrap=True)
        else:
            print(f"atom: {text}", file=sys.stderr)


def visible(text: str) -> str:
    """Returns a text of a model in which no character moves the cursor or changes the terminal."""
    return "\n".join(map(escaped, text.expandtabs(4).split("\n")))
