"""`atom chat`: answers in the process and of a server, on a terminal and in a pipe, and what it refuses."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner, Result

from bench import record
from pipeline.cli.main import app
from pipeline.core.errors import AtomError, CheckFailed
from release.chat.session import TASK, Session
from release.chat.source import SUGGESTIONS, Suggestion, suggest
from stages.generation.chat_models import ChatSampling, InProcessChat, Reply, ServedChat
from stages.rl.rollout.generation import Toolbox
from stages.rl.tools.settings import Tools
from tests.fixtures import taught_fixtures
from tests.fixtures.hub_fixtures import Hub
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP
from tests.fixtures.taught_fixtures import LESSONS

TOOLS = Tools.model_validate({"offered": [{"tool": "python", "workers": 1}]})
WHY, WHAT = "Why is 3+3 = 6?", "What is 2+2?"
THOUGHT = "<think>\nthree twice\n</think>\n\nIt is 6."
CARD = (
    "---\nlicense: apache-2.0\ndatasets:\n- local/notes\natom_release_format: 1\natom_card_schema: 1\n---\n# taught\n"
)


def item(id: str, kind: str, prompt: str, expected: str | None = None, **request: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": prompt}]
    return {
        "id": id,
        "kind": kind,
        "expected_answer": expected,
        "responses_create_params": {"input": messages, **request},
    }


ITEMS = [item("a/0", "add", WHAT, "4, surely."), item("w/0", "why", WHY)]


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A release folder as far as this command reads it, whose model has learned two answers."""
    root = tmp_path_factory.mktemp("release")
    taught_fixtures.save(root / "model", lessons=("plain", "reasoning"))
    (root / "model/README.md").write_text(CARD)
    files = sorted(path for path in (root / "model").iterdir())
    sums = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files]
    (root / "model/SHA256SUMS").write_text("".join(sums))
    for path, text in (("evidence/release.json", "{}"), ("dataset/evaluation/chat.jsonl", jsonl(ITEMS))):
        (root / path).parent.mkdir(parents=True)
        (root / path).write_text(text)
    return root


def jsonl(rows: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture(scope="module")
def taught(release: Path) -> InProcessChat:
    return InProcessChat(release / "model")


def ask(model: Any, text: str, **sampling: Any) -> Reply:
    reply = Reply()
    model.respond([{"role": "user", "content": text}], ChatSampling(**sampling), reply)
    return reply


def atom_chat(*arguments: str, text: str = "") -> Result:
    return CliRunner().invoke(app, ["chat", *arguments], input=text)


# An answer in the process.


@pytest.mark.parametrize("lesson", ["plain", "reasoning"])
def test_an_answer_is_the_greedy_one_of_transformers(release: Path, taught: InProcessChat, lesson: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    messages = LESSONS[lesson].request["messages"]
    tokenizer = AutoTokenizer.from_pretrained(release / "model")
    model = AutoModelForCausalLM.from_pretrained(release / "model")
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    length = prompt["input_ids"].shape[1]
    output = model.generate(**prompt, do_sample=False, max_new_tokens=64)[0, length:]
    expected = tokenizer.parse_response(output, prefix=prompt["input_ids"][0])

    reply = ask(taught, messages[0]["content"])

    assert (reply.answer, reply.thinking) == (expected["content"], expected.get("thinking", ""))
    assert (reply.tokens, reply.stopped) == (len(output), "end")
    assert reply.answer in LESSONS[lesson].answer


def test_an_answer_ends_at_its_limit_and_at_the_context(taught: InProcessChat, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (ask(taught, WHAT, max_tokens=2).stopped, ask(taught, WHAT, max_tokens=2).tokens) == ("limit", 2)
    prompt = taught.tokenizer.apply_chat_template(
        [{"role": "user", "content": WHAT}], add_generation_prompt=True, return_dict=True
    )
    length = len(prompt["input_ids"])
    monkeypatch.setattr(taught, "context", length + 3)
    assert (ask(taught, WHAT).stopped, ask(taught, WHAT).tokens) == ("context", 3)
    monkeypatch.setattr(taught, "context", length)
    with pytest.raises(
        AtomError, match=f"^the conversation has {length} tokens, and the model's context is {length}; begin a new one$"
    ):
        ask(taught, WHAT)


def test_a_seed_decides_what_is_drawn(taught: InProcessChat) -> None:
    drawn = [ask(taught, WHAT, temperature=5.0, max_tokens=20, seed=seed).text for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("size", [1, 3, 100])
def test_thinking_is_apart_however_the_text_arrives(size: int) -> None:
    shown: list[tuple[str, str]] = []
    reply = Reply(lambda reply: shown.append((reply.thinking, reply.answer)))
    for start in range(0, len(THOUGHT), size):
        reply.add(THOUGHT[start : start + size])
    assert (reply.thinking, reply.answer) == ("three twice", "It is 6.")
    assert all("It is 6.".startswith(answer) for _, answer in shown)


def test_an_answer_may_speak_of_marks() -> None:
    reply = Reply()
    reply.add("<")
    assert reply.answer == ""
    reply.stopped = "end"
    assert reply.answer == "<"
    assert Reply(text="Write <think> first.").answer == "Write <think> first."


# The command in a pipe.


def test_a_prompt_has_one_answer(release: Path) -> None:
    assert atom_chat(str(release), "--prompt", WHY).stdout == "It is 6.\n"
    assert atom_chat(str(release / "model"), text=f"{WHAT}\n").stdout == "4, surely.\n"
    result = json.loads(atom_chat(str(release), "--prompt", WHY, "--json").stdout)
    assert result == {
        "prompt": WHY, "thinking": "three twice", "answer": "It is 6.", "tokens": result["tokens"], "stopped": "end",
    }  # fmt: skip
    cut = atom_chat(str(release), "--prompt", WHY, "--max-tokens", "2")
    assert (cut.exit_code, cut.stdout) == (0, "")
    assert cut.stderr == "atom: cut at --max-tokens\natom: the model gave no answer\n"


def test_a_model_of_the_hub(release: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub.commit({"evaluation/chat.jsonl": jsonl(ITEMS).encode()})
    hub.repo = hub.store.create("model", "local/taught", False, "local")
    hub.commit({path.name: path.read_bytes() for path in (release / "model").iterdir()})
    assert atom_chat("local/taught", "--prompt", WHAT).stdout == "4, surely.\n"
    folder = next(tmp_path.glob("cache/models--local--taught/snapshots/*"))
    assert suggest("local/taught", folder) == [Suggestion(WHAT, "4, surely."), Suggestion(WHY, None)]
    with pytest.raises(AtomError, match=r"^pulling local/nothing: http://127\.0\.0\.1:\d+ has no such repository"):
        raise_of("local/nothing")


def raise_of(*arguments: str) -> None:
    result = atom_chat(*arguments, "--prompt", "x")
    assert result.exception is not None and not isinstance(result.exception, SystemExit), result.output
    raise result.exception


def test_bad_input_is_one_sentence(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release / "model", copy)
    (copy / "SHA256SUMS").unlink()
    (copy / "chat_template.jinja").unlink()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/config.json").write_text("{}")
    for arguments, sentence in (
        ((str(tmp_path),), f"there is no model in {tmp_path}, which has no config.json; give a release"),
        (
            ("no/such/folder",),
            "there is no folder no/such/folder; a repository of the Hub is NAMESPACE/NAME[@REVISION]",
        ),
        ((str(release), "--model", "model-x"), f"{release} has no model model-x; it has model"),
        ((str(copy),), f"{copy} has no chat template: its model continues texts, and does not converse"),
        ((str(tmp_path / "broken"),), f"transformers does not load the model in {tmp_path / 'broken'}: "),
        (("http://127.0.0.1:1/v1",), "no server answers at http://127.0.0.1:1/v1: "),
    ):
        with pytest.raises(AtomError) as raised:
            raise_of(*arguments)
        assert str(raised.value).startswith(sentence) and "\n" not in str(raised.value)
        assert raised.value.exit_code == 2
    nothing = atom_chat(str(release), text="  \n").exception
    assert str(nothing) == "there is nothing to answer: give --prompt TEXT, or a text on stdin"


def test_an_altered_model_is_refused(release: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(release / "model", copy)
    (copy / "chat_template.jinja").write_text("{{ messages }}")
    with pytest.raises(
        CheckFailed, match=r"^chat_template\.jinja in \S+ is not what SHA256SUMS there lists; see atom "
    ):
        raise_of(str(copy))


# The conversation on a terminal.


class Scripted:
    """A model that answers with given pieces, and records what it is asked. An exception among them is raised."""

    description = "scripted"

    def __init__(self, *answers: list[Any]) -> None:
        self.answers, self.asked = list(answers), []

    def respond(self, messages: Any, sampling: ChatSampling, reply: Reply) -> None:
        self.asked.append([message["content"] for message in messages])
        for piece in self.answers.pop(0):
            if isinstance(piece, BaseException):
                raise piece
            reply.add(piece)
        reply.stopped = "end"


def screen(model: Any, *lines: Any, suggestions: Any = ()) -> list[str]:
    """The rows of a terminal at the end of a session. lines: what is typed; an exception is raised in its place."""
    file, typed = io.StringIO(), iter([*lines, EOFError()])

    def read(prompt: str) -> str:
        line = next(typed)
        if isinstance(line, BaseException):
            raise line
        file.write(f"{prompt}{line}\n")
        return line

    console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
    Session(console, model, ChatSampling()).run(suggestions, read)
    terminal = record.Terminal()
    terminal.feed(file.getvalue().replace("\n", "\r\n"))
    return ["".join(part for _, part in row).rstrip() for row in terminal.shown(record.ROWS)]


def test_thinking_folds_and_unfolds(taught: InProcessChat) -> None:
    shown = screen(taught, "/1", "/think", suggestions=[Suggestion(WHY, "It is 6.")])
    assert shown[:6] == [
        f"  /1  {WHY}", "/1, /2 … ask a problem of its evaluation; /think unfolds the thinking; /help lists all commands", "", "> /1", WHY, shown[5],
    ]  # fmt: skip
    assert shown[5].startswith("thought for ") and shown[5].endswith(" tokens")
    assert shown[6:] == ["It is 6.", "the evaluation expects: It is 6.", "", "> /think", "three twice"]


def test_an_answer_that_could_begin_a_mark_is_shown() -> None:
    assert screen(Scripted(["<"]), "which sign?")[-1] == "<"


def test_marks_of_the_template_are_refused(taught: InProcessChat) -> None:
    with pytest.raises(AtomError, match="is a mark of the model's template"):
        ask(taught, f"what is {taught.tokenizer.eos_token}?")


def test_turns_are_remembered_until_reset() -> None:
    model = Scripted(["<think>why", "</think>one"], ["two"], ["three"])
    screen(model, "a", "b", "/reset", "c")
    assert model.asked == [["a"], ["a", "one", "b"], ["c"]]


def test_ctrl_c_stops_an_answer_and_the_session_goes_on() -> None:
    model = Scripted(["One, two", KeyboardInterrupt()], ["<think>hm", KeyboardInterrupt()], ["Well."])
    shown = screen(model, "count", "again", KeyboardInterrupt(), "and?")
    assert model.asked == [["count"], ["count", "One, two", "again"], ["count", "One, two", "and?"]]
    assert shown[1:] == [
        "", "> count", "One, two", "stopped",
        "", "> again", "thought for 1 tokens", "stopped", "the model gave no answer",
        "", "", "Ctrl-D or /quit leaves", "", "> and?", "Well.",
    ]  # fmt: skip


def test_a_model_answers_after_a_stopped_answer(taught: InProcessChat, monkeypatch: pytest.MonkeyPatch) -> None:
    step, calls = taught.decoder.step, []

    def interrupted(token: Any) -> Any:
        calls.append(token)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return step(token)

    monkeypatch.setattr(taught.decoder, "step", interrupted)
    shown = screen(taught, WHAT, "/reset", WHAT)
    assert "stopped" in shown and shown[-1] == "4, surely."


def test_an_error_and_an_unknown_command_leave_the_session_usable() -> None:
    model = Scripted([AtomError("the conversation is too long")], ["\x1b[2Jfine"])
    shown = screen(model, "/dance", "long", "short", "/quit")
    assert "there is no command /dance; /help lists them" in shown
    assert "the conversation is too long" in shown
    assert model.asked == [["long"], ["short"]]
    assert "\\x1b[2Jfine" in shown, "a model cannot clear the terminal"


# Tools.


@NEEDS_BUBBLEWRAP
def test_a_program_of_the_model_runs_in_the_sandbox_and_its_result_is_read(tmp_path: Path) -> None:
    lessons = taught_fixtures.python_lessons(TOOLS.schemas(TASK))
    taught_fixtures.save(tmp_path / "model", lessons=(), more=lessons)
    question = lessons[0].request["messages"][0]["content"]
    command = ["chat", str(tmp_path / "model"), "--prompt", question]
    assert CliRunner().invoke(app, command).stdout == "About 1000.\n", "no tool is offered unasked"
    request = '{"name": "python", "arguments": {"code": "print(2**10)"}}'
    run = CliRunner().invoke(app, [*command, "--python"])
    assert run.stdout == "I compute it.\n\nIt is 1024.\n"
    assert f"calls {request}\natom: 1024\n" in run.stderr
    document = json.loads(CliRunner().invoke(app, [*command, "--python", "--json"]).stdout)
    assert document["answer"] == "It is 1024." and document["tokens"] > 20
    assert document["calls"] == [{"request": request, "tool": "python", "status": "ok", "result": "1024\n"}]


@NEEDS_BUBBLEWRAP
def test_a_call_that_nothing_can_answer_has_its_error_as_the_result() -> None:
    calls = "<tool_call>2**10</tool_call>", '<tool_call>{"name": "shell", "arguments": {}}</tool_call>'
    model = Scripted([f"Let me see. {calls[0]}"], ["<tool", calls[1].removeprefix("<tool")], ["1024, I think."])
    with contextlib.closing(Toolbox(TOOLS)) as toolbox:
        session = Session(Console(file=io.StringIO()), model, ChatSampling(), toolbox)
        assert session.turn("How much?").answer == "1024, I think."
    *_, last = model.asked
    assert last == [
        "How much?", f"Let me see. {calls[0]}", last[2], calls[1], "error: there is no such tool; there are python",
    ]  # fmt: skip
    assert last[2].startswith("error: the call is not JSON")


@NEEDS_BUBBLEWRAP
def test_ctrl_c_gives_up_a_program_and_the_last_turn_calls_none(monkeypatch: pytest.MonkeyPatch) -> None:
    call = '<tool_call>{"name": "python", "arguments": {"code": "print(1)"}}</tool_call>'
    model = Scripted(["Look. " + call], *[[call]] * TOOLS.max_turns)
    with contextlib.closing(Toolbox(TOOLS)) as toolbox:
        file = io.StringIO()
        console = Console(file=file, force_terminal=True, width=80, _environ={"TERM": "xterm"})
        session = Session(console, model, ChatSampling(), toolbox)
        with monkeypatch.context() as patch:
            patch.setattr(toolbox, "answer", lambda requests: (_ for _ in ()).throw(KeyboardInterrupt))
            reply = session.turn("one")
        assert (reply.answer, reply.stopped, session.calls) == ("Look. ", "", [])
        assert not session.turn("two").answer and len(session.calls) == TOOLS.max_turns - 1
    assert f"it calls a tool again in turn {TOOLS.max_turns}, which is not answered" in file.getvalue()


def test_a_result_has_no_marks_and_a_template_may_refuse_results(taught: InProcessChat) -> None:
    end = taught.tokenizer.eos_token
    turns = [{"role": "user", "content": "go"}, {"role": "assistant", "content": "x"}, {"role": "tool", "content": end}]
    reply = Reply()
    taught.respond(turns, ChatSampling(max_tokens=1), reply)
    assert reply.tokens == 1
    template = taught.tokenizer.chat_template
    taught.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    try:
        with pytest.raises(AtomError, match="template refuses this conversation: roles must alternate"):
            taught.respond(turns, ChatSampling(), Reply())
    finally:
        taught.tokenizer.chat_template = template


@NEEDS_BUBBLEWRAP
def test_a_server_that_parses_calls_gets_them_back_with_results(server: tuple[str, type[Handler]]) -> None:
    url, kind = server

    def piece(arguments: str, **first: Any) -> str:
        return event(tool_calls=[{"index": 0, "function": {"arguments": arguments, **first.pop("named", {})}, **first}])

    kind.events = (
        piece('{"code": ', id="c7", named={"name": "python"}), piece('"print(6*7)"}'), event("tool_calls"), "[DONE]",
    )  # fmt: skip
    run = CliRunner().invoke(app, ["chat", url, "--python", "--prompt", "How much?"])
    assert len(kind.bodies) == TOOLS.max_turns and "the model gave no answer" in run.stderr
    assert kind.bodies[0]["tools"][0]["function"]["name"] == "python"
    question, call, result = kind.bodies[1]["messages"]
    function = {"name": "python", "arguments": '{"code": "print(6*7)"}'}
    assert call["tool_calls"] == [{"id": "c7", "type": "function", "function": function}]
    assert result == {"role": "tool", "tool_call_id": "c7", "content": "42\n"} and question["role"] == "user"


# Suggestions.


def test_suggestions_are_of_all_kinds_and_always_the_same(tmp_path: Path) -> None:
    rows = [item(f"a/{n}", "add", f"{n}+1", str(n + 1)) for n in range(50)]
    rows += [item(f"s/{n}", "sort", f"sort {n}") for n in range(50)]
    rows += [item("t/0", "tools", "call it", tools=[{"name": "clock"}])]
    items = tmp_path / "dataset/evaluation/chat.jsonl"
    items.parent.mkdir(parents=True)
    items.write_text(jsonl(rows))
    first = suggest(str(tmp_path / "model"), tmp_path / "model")
    items.write_text(jsonl(rows[::-1]))
    assert suggest(str(tmp_path / "model"), tmp_path / "model") == first
    assert len(set(first)) == SUGGESTIONS
    assert [row.prompt.startswith("sort") for row in first] == [False, True, False, True]
    assert all(row.expected is None or str(eval(row.prompt)) == row.expected for row in first)


# A server.


class Handler(BaseHTTPRequestHandler):
    """A server of OpenAI's API, with chunked answers. events: those of its stream; bodies: what it was asked."""

    protocol_version = "HTTP/1.1"
    models = ("taught",)
    events: tuple[str, ...] = ()
    bodies: list[dict[str, Any]]
    redirect = ""
    keys: list[str | None]

    def do_GET(self) -> None:
        self.keys.append(self.headers["Authorization"])
        if self.redirect:
            self.send_response(302)
            self.send_header("Location", self.redirect)
            self.send_header("Content-Length", "0")
            return self.end_headers()
        self._send(200, json.dumps({"data": [{"id": name} for name in self.models]}).encode())

    def do_POST(self) -> None:
        self.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if "long" in self.bodies[-1]["messages"][-1]["content"]:
            return self._send(400, b'{"error": {"message": "the context has 512 tokens"}}')
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for event in self.events:
            data = f"data: {event}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
            self.wfile.flush()
        self.wfile.write(b"0\r\n\r\n")

    def _send(self, status: int, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None: ...


@pytest.fixture
def server() -> Iterator[tuple[str, type[Handler]]]:
    """(URL, its handler, whose attributes may be set)."""
    kind = type("Own", (Handler,), {"bodies": [], "keys": []})
    running = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield f"http://127.0.0.1:{running.server_port}/v1", kind
    running.shutdown()
    running.server_close()
    thread.join()


def event(finish: str | None = None, **delta: Any) -> str:
    return json.dumps({"choices": [{"delta": delta, "finish_reason": finish}]})


USAGE = json.dumps({"choices": [], "usage": {"completion_tokens": 9}})


@pytest.mark.parametrize("parsed", [False, True])
def test_a_server_streams(server: tuple[str, type[Handler]], parsed: bool) -> None:
    url, kind = server
    if parsed:
        kind.events = (
            event(role="assistant", content=""),
            event(reasoning="three "),
            event(reasoning="twice"),
            event(content="It is"),
        )
    else:
        kind.events = (event(content="<thi"), event(content="nk>\nthree twice\n</think>"), event(content="\n\nIt is"))
    kind.events += (event("stop", content=" 6."), USAGE, "[DONE]")
    pieces: list[str] = []
    reply = Reply(lambda reply: pieces.append(reply.answer))
    ServedChat(url, None).respond([{"role": "user", "content": WHY}], ChatSampling(seed=3), reply)
    assert (reply.thinking, reply.answer, reply.tokens, reply.stopped) == ("three twice", "It is 6.", 9, "end")
    assert pieces[-2:] == ["It is", "It is 6."], "it is shown as it arrives"
    (body,) = kind.bodies
    assert (body["model"], body["temperature"], body["seed"], body["stream"]) == ("taught", 0.0, 3, True)
    assert "max_tokens" not in body


def test_a_key_does_not_follow_a_redirect(server: tuple[str, type[Handler]], monkeypatch: pytest.MonkeyPatch) -> None:
    url, kind = server
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    kind.redirect = url.replace("127.0.0.1", "localhost") + "/models"
    with pytest.raises(AtomError):  # it redirects for ever
        ServedChat(url, None)
    assert kind.keys[0] == "Bearer secret" and set(kind.keys[1:]) == {None}


@pytest.mark.parametrize(
    "line",
    [
        json.dumps({"choices": [], "usage": {"completion_tokens": "\x1b]0;x"}}),
        "x" * (1 << 21),
    ],
)
def test_what_a_server_sends_is_checked(server: tuple[str, type[Handler]], line: str) -> None:
    url, kind = server
    kind.events = (event(content="It"), line, event("stop"))
    with pytest.raises(AtomError):
        ask(ServedChat(url, None), WHAT)


def test_a_server_that_refuses_is_one_sentence(server: tuple[str, type[Handler]]) -> None:
    url, kind = server
    with pytest.raises(AtomError, match="refuses with status 400: the context has 512 tokens$"):
        ask(ServedChat(url, None), "long")
    kind.events = (event(content="It"),)
    with pytest.raises(AtomError, match="ended its stream in the middle of an answer$"):
        ask(ServedChat(url, None), WHAT)
    kind.events = ('{"error": {"message": "out of memory"}}',)
    with pytest.raises(AtomError, match="streams no answer, but out of memory$"):
        ask(ServedChat(url, None), WHAT)
    kind.models = ("a", "b")
    for model in (None, "c"):
        with pytest.raises(AtomError, match=f"^give --model, one of those of {url}: a, b$"):
            ServedChat(url, model)
    assert ServedChat(url, "b").description == "b"
