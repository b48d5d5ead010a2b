"""Verifiers: right, wrong and half-right answers, hostile ones, and failures that must never become a reward of 0."""

from __future__ import annotations

import faulthandler
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import AtomError
from stages.data import problems
from stages.rl import gym_server, judge, judge_worker
from stages.rl.contracts import Parts, Response, Row, Verifier, VerifierFailed, question
from stages.rl.instructions import CHECKS
from stages.rl.verifiers import VERIFIERS, reasoning_gym_rows, to_row, verifier


def said(text: str, finished: bool = True) -> Response:
    return Response.of(text, finished)


def one(found: Verifier, row: Row, text: str, finished: bool = True) -> Parts:
    return found.score([(row, said(text, finished))])[0]


@pytest.fixture(scope="module")
def maths() -> Iterator[Verifier]:
    found = verifier("math-verify", seconds=1)
    yield found
    found.close()


@pytest.fixture(scope="module")
def gym() -> Iterator[Verifier]:
    found = verifier("reasoning-gym", seconds=1)
    yield found
    found.close()


def sum_row(expected: str = "4") -> dict[str, Any]:
    return to_row("m1", "2+2?", "math-verify", "arithmetic", 0, question="2+2?", expected_answer=expected)


def gym_row(dataset: str = "gcd") -> dict[str, Any]:
    entry = {"question": "Find the GCD of 12 and 18.", "answer": "6", "metadata": {"source_dataset": dataset}}
    return to_row("g1", entry["question"], "reasoning-gym", dataset, 0, **entry)


def form_row(*instructions: tuple[str, dict[str, Any]]) -> dict[str, Any]:
    names, kwargs = [name for name, _ in instructions], [given for _, given in instructions]
    return to_row("i1", "Write.", "instructions", "form", 0, prompt="Write.", instruction_id_list=names, kwargs=kwargs)


# --- a real server of NeMo Gym's protocol -----------------------------------------------------------------------------

REPLY_KEYS = {"id", "created_at", "model", "object", "output", "parallel_tool_calls", "tool_choice", "tools"}


class Server(ThreadingHTTPServer):
    """Answers POST /verify with (status, body) as `reply(n, request)` says, n counting requests; None hangs up."""

    daemon_threads = True

    def __init__(self, reply: Callable[[int, dict[str, Any]], tuple[int, bytes] | None]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.reply, self.seen, self.lock = reply, [], threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.seen.append(request)
            number = len(self.server.seen)
        reply = self.server.reply(number, request) if self.path == "/verify" else (404, b"no such path")
        if reply is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        self.send_response(reply[0])
        self.send_header("Content-Length", str(len(reply[1])))
        self.end_headers()
        self.wfile.write(reply[1])

    def log_message(self, *_: Any) -> None: ...


def judged(_: int, request: dict[str, Any]) -> tuple[int, bytes]:
    """As NeMo Gym's servers: 422 for what the schema lacks, else an echo with a reward."""
    response = request.get("response", {})
    if REPLY_KEYS - set(response) or not request["responses_create_params"].get("input"):
        return 422, b'{"detail":"Field required"}'
    (message,) = response["output"]
    if not {"id", "content", "type", "role"} <= set(message) or "annotations" not in message["content"][0]:
        return 422, b'{"detail":"Field required"}'
    right = message["content"][0]["text"].strip() == request["expected_answer"]
    return 200, json.dumps({**request, "reward": float(right), "library_reward": 0.5, "extracted": "x"}).encode()


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    monkeypatch.setattr(gym_server, "BACK_OFF", 0.01)
    servers: list[Server] = []

    def start(reply: Callable[[int, dict[str, Any]], tuple[int, bytes] | None]) -> Server:
        servers.append(Server(reply))
        return servers[-1]

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def client(server: Server, timeout: float = 20.0) -> Verifier:
    return verifier("nemo-gym", url=server.url, serves="a test", timeout=timeout)


# --- answers of every kind --------------------------------------------------------------------------------------------

HOSTILE = {
    "empty": "",
    "blank": " \n\t ",
    "tower": "9**9**9",
    "tower in LaTeX": "$9^{9^{9^{9}}}$",
    "factorial": "$10^{10^{10}}!$",
    "many digits": "4" * 100_000,
    "parentheses": "(" * 50_000 + "4" + ")" * 50_000,
    "braces": "$" + "{" * 3000 + "4" + "}" * 3000 + "$",
    "fractions": "\\boxed{" + "\\frac{1}{" * 2000,
    "brackets": "[" * 100_000,
    "chevrons": "<" * 300_000 + "\n" + "<<" * 100_000 + ">",
    "asterisks": "*a" * 100_000 + "*" * 100_000,
    "spaces": " " * 300_000 + "x",
    "python": "__import__('os').system('touch {trace}')",
    "python in LaTeX": "$\\operatorname{{__import__('os').system('touch {trace}')}}$ \\boxed{{exec(\"open('{trace}','w')\")}}",
    "python list": "[__import__('pathlib').Path('{trace}').touch()]",
    "sympy": "sympify(\"open('{trace}', 'w')\")",
    "file": "\\input{/etc/passwd} \\write18{touch {trace}}",
    "lone surrogates": "\ud800\udfff 5 \udcff",
    "bytes": bytes(range(256)).decode("latin-1") * 20,
    "nul": "\x00" * 1000,
    "unicode digits": "٤ 四 ④ 𝟜",
    "right to left": "\u202e4\u202c" * 100,
    "json": '{"a":' * 20_000,
    "big json": '{"reward": 1e999, "x": NaN}',
    "unclosed thought": "<think> 4",
    "many stops": "a. " * 50_000,
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_answer_has_a_reward_and_does_nothing(
    kind: str, maths: Verifier, gym: Verifier, serve: Callable[..., Server], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    text = (
        HOSTILE[kind].replace("{trace}", str(trace)).replace("{{", "{") if "trace" in HOSTILE[kind] else HOSTILE[kind]
    )
    forms = form_row(*((name, ARGUMENTS[name]) for name in CHECKS))
    cases = [
        (verifier("exact"), sum_row()),
        (maths, sum_row()),
        (gym, gym_row()),
        (verifier("instructions"), forms),
        (client(serve(judged)), sum_row()),
    ]
    for found, row in cases:
        start = time.process_time()
        parts = one(found, row, text)
        # reasoning_gym gives the share of an answer that the right one makes up, however it got there.
        most = 0.1 if found is gym else 0
        assert 0 <= parts["reward"] <= most and parts["finished"] == 1, f"{found.name}: {parts}"
        assert time.process_time() - start < 60, f"{found.name} takes its time in this process"
    assert not trace.exists()


def test_every_verifier_stands_for_what_it_is() -> None:
    for name, kind in VERIFIERS.items():
        if name == "python-tests":  # which needs a sandbox, and has tests of its own
            assert kind.runs_code is True
            continue
        found = kind(url="http://127.0.0.1:1", serves="x 1") if name == "nemo-gym" else kind()
        assert found.name == name and found.version and found.runs_code is False
        assert found.score([]) == []
        found.close()
    assert "math-verify 0.9" in verifier("math-verify").version and "0.1.25" in verifier("reasoning-gym").version


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        (
            "math",
            {},
            "no verifier 'math'; there are exact, instructions, math-verify, nemo-gym, python-tests, reasoning-gym",
        ),
        ("exact", {"strict": True}, "verifier exact with the settings {'strict': True}"),
        ("nemo-gym", {}, "missing"),
    ],
)
def test_what_is_asked_wrongly_is_refused(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(AtomError, match=words.replace("{", r"\{")):
        verifier(name, **settings)


def test_a_row_is_nemo_gyms() -> None:
    row = to_row("a-1", "2+2?", "exact", "add", 3, expected_answer="4")
    assert row["responses_create_params"] == {"input": [{"role": "user", "content": "2+2?"}]}
    assert (row["id"], row["verifier"], row["kind"], row["level"], question(row)) == ("a-1", "exact", "add", 3, "2+2?")
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "2+2?"}]
    assert to_row("a-2", chat, "exact", "add", 3)["responses_create_params"]["input"] == chat


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("task", problems.TASKS)
def test_the_projects_own_tasks(task: str) -> None:
    rng, exact = random.Random(1), verifier("exact")
    for _ in range(50):
        p = problems.TASKS[task](rng)
        row = to_row("p", p.question, "exact", task, 0, question=p.question, expected_answer=p.answer)
        for right in (
            p.answer,
            f" {p.answer}\n",
            f"{p.steps}:{p.answer}",
            f"<think>{p.steps}</think>\n{p.answer}",
            f"It is: {p.answer}",
        ):
            assert one(exact, row, right) == {"reward": 1, "finished": 1}
        assert one(exact, row, p.answer, finished=False) == {"reward": 0, "finished": 0}
        for wrong in (
            p.answer + "0",
            "0" + p.answer,
            f"{p.answer}:{p.steps}",
            p.answer[1:],
            f"{p.answer}.",
            f"<think>{p.answer}",
        ):
            assert one(exact, row, wrong)["reward"] == 0


def test_an_expected_answer_may_hold_a_colon() -> None:
    row = to_row("t", "When?", "exact", "time", 0, expected_answer="10:30")
    exact = verifier("exact")
    assert [one(exact, row, text)["reward"] for text in ("10:30", "at: 10:30", "11:30", "30")] == [1, 1, 0, 0]
    with pytest.raises(VerifierFailed, match="row t: no expected_answer"):
        one(exact, {**row, "expected_answer": " "}, "")


# --- math-verify ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("expected", "answer", "reward"),
    [
        ("4", "4", 1),
        ("4", "So 2+2 is \\boxed{4}.", 1),
        ("4", "5, or rather $4$", 1),
        ("4", "The answer is $5$", 0),
        ("\\frac{1}{2}", "0.5", 1),
        ("0.5", "\\frac{2}{4}", 1),
        ("(x+1)^2", "$x^2+2x+1$", 1),
        ("(x+1)^2", "$x^2+2x-1$", 0),
        ("\\{1, 2\\}", "$\\{2,1\\}$", 1),
        ("[0, 1)", "$[0,1)$", 1),
        ("$x=3$", "x is $3$", 1),
        ("1,000", "1000", 1),
        ("4", "<think>4</think> 5", 0),
        (7, "\\boxed{7}", 1),
    ],
)
def test_mathematical_equality(maths: Verifier, expected: Any, answer: str, reward: int) -> None:
    assert one(maths, sum_row(expected), answer) == {"reward": reward, "finished": 1, "unreadable": 0}


def test_an_unfinished_answer_earns_nothing_from_any(
    maths: Verifier, gym: Verifier, serve: Callable[..., Server]
) -> None:
    form = form_row(("punctuation:no_comma", {}))
    server = serve(judged)
    for found, row, text in (
        (verifier("exact"), sum_row(), "4"),
        (maths, sum_row(), "4"),
        (gym, gym_row(), "6"),
        (verifier("instructions"), form, "ok"),
        (client(server), sum_row(), "4"),
    ):
        assert one(found, row, text)["reward"] == 1
        parts = one(found, row, text, finished=False)
        assert parts["reward"] == 0 and parts["finished"] == 0
    assert len(server.seen) == 1


def test_who_is_to_blame_for_running_out_of_time(maths: Verifier, gym: Verifier) -> None:
    """The answer, as the row's own is judged right after; and its fellows keep their rewards."""
    answers = [(sum_row(), said(text)) for text in ("4", "$9^{9^{9}}$", "5", "4")]
    assert [(p["reward"], p["unreadable"]) for p in maths.score(answers)] == [(1, 0), (0, 1), (0, 0), (1, 0)]
    # One of reasoning_gym's scorers raises on what is no number.
    row = next(reasoning_gym_rows("prime_factorization", 1, 1))
    assert one(gym, row, "no number") == {"reward": 0, "finished": 1, "unreadable": 1}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (sum_row(""), "row m1: no expected_answer to judge by"),
        ({k: v for k, v in sum_row().items() if k != "expected_answer"}, "row m1: no expected_answer"),
    ],
)
def test_a_row_that_cannot_be_judged_is_no_reward(maths: Verifier, row: Row, words: str) -> None:
    with pytest.raises(VerifierFailed, match=words):
        one(maths, row, "4")


def kill_workers(found: Verifier) -> int:
    """Kills every worker that runs, from outside. Returns how many."""
    processes = [w.process for w in found._judges.workers if w.process]
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    return len(processes)


def test_killed_workers_are_replaced_and_their_answers_judged_again() -> None:
    found = verifier("math-verify", seconds=1)
    answers = [(sum_row(), said("4")), (sum_row(), said("5"))] * 4
    right = [1, 0] * 4
    try:
        assert [p["reward"] for p in found.score(answers)] == right
        assert kill_workers(found)  # between steps
        assert [p["reward"] for p in found.score(answers)] == right
        with ThreadPoolExecutor(1) as pool:  # in the middle of one
            step = pool.submit(found.score, answers * 8)
            time.sleep(0.1)
            assert kill_workers(found)
            assert [p["reward"] for p in step.result()] == right * 8
    finally:
        found.close()


def test_a_worker_that_is_always_killed_is_no_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    found = verifier("math-verify", seconds=1)
    start = judge.Worker._start

    def doomed(worker: judge.Worker) -> None:
        start(worker)
        os.killpg(worker.process.pid, signal.SIGKILL)

    monkeypatch.setattr(judge.Worker, "_start", doomed)
    try:
        with pytest.raises(VerifierFailed, match="verifier math-verify, row m1: the judge failed 3 times"):
            one(found, sum_row(), "4")
    finally:
        found.close()


def test_an_answer_is_not_blamed_for_what_befell_its_judge(monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, crash = {"score": 1.0}, {"score": 0.0}, {"signal": signal.SIGSEGV, "error": "SIGSEGV"}

    def outcome(*replies: dict[str, Any]) -> Parts:
        told = iter(replies)
        monkeypatch.setattr(judge.Worker, "ask", lambda *_: next(told))
        return one(verifier("math-verify"), sum_row(), "4")

    # Probe, garbage, answer; and after a crash again probe, garbage.
    assert outcome(right, wrong, crash, right, wrong) == {"reward": 0, "finished": 1, "unreadable": 1}
    with pytest.raises(VerifierFailed, match="its own expected answer got SIGSEGV"):
        outcome(right, wrong, crash, crash)
    killed = {"signal": signal.SIGKILL, "error": "SIGKILL"}
    assert outcome(right, wrong, killed, right) == {"reward": 1, "finished": 1, "unreadable": 0}
    with pytest.raises(VerifierFailed, match=r"failed 3 times \(it was killed from outside, as the kernel does"):
        outcome(right, wrong, killed, killed, killed)


def test_a_worker_that_cannot_start_is_no_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "math_verify.py").write_text("raise ImportError('a broken installation')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = verifier("math-verify")
    try:
        with pytest.raises(
            VerifierFailed, match=r"row m1: the judge failed 3 times \(ImportError: a broken installation\)"
        ):
            one(found, sum_row(), "4")
    finally:
        found.close()


def test_a_package_that_answers_nought_to_all_is_no_reward(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As the packages do where their own code raises."""
    (tmp_path / "math_verify.py").write_text("def parse(*a, **k): return []\ndef verify(*a, **k): return False\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = verifier("math-verify")
    try:
        with pytest.raises(VerifierFailed, match="its own expected answer got a score of 0.0"):
            one(found, sum_row(), "5")
    finally:
        found.close()


# In the worker's fork: what each does, and what comes of it.
FORKS: dict[str, tuple[Callable[[str], float], dict[str, Any]]] = {
    "killed": (lambda _: os.kill(os.getpid(), 9) or 0.0, {"error": "PermissionError: a judge must not call os.kill"}),
    "crashed": (lambda _: (faulthandler.disable(), os.abort())[1], {"signal": signal.SIGABRT, "error": "SIGABRT"}),
    "greedy": (lambda _: float(len(bytearray(2 << 30))), {"error": "MemoryError: "}),
    "slow": (lambda _: float(len(str(9 ** (9**8)))), {"signal": signal.SIGXCPU, "error": "SIGXCPU"}),
    "raised": (lambda _: 1 / 0, {"error": "ZeroDivisionError: division by zero"}),
    "writes": (
        lambda _: Path("/tmp/atom-trace").write_text("x"),
        {"error": "PermissionError: a judge must not call open"},
    ),
    "calls": (lambda _: os.system("true"), {"error": "PermissionError: a judge must not call os.system"}),
    "connects": (lambda _: socket.socket() and 1.0, {"error": "PermissionError: a judge must not call socket.__new__"}),
    "gone": (lambda _: os._exit(0), {"error": "nothing"}),
    "beyond": (lambda _: 1.5, {"error": "a score of 1.5"}),
    "NaN": (lambda _: float("nan"), {"error": "a score of nan"}),
    "right": (lambda _: 1.0, {"score": 1.0}),
}


@pytest.mark.parametrize("what", FORKS)
def test_a_fork_is_limited(what: str) -> None:
    score, reply = FORKS[what]
    assert judge_worker.limited(score, "", 1) == reply


# --- reasoning-gym ----------------------------------------------------------------------------------------------------


def test_reasoning_gyms_scores(gym: Verifier) -> None:
    rows = list(reasoning_gym_rows("spell_backward", 3, 2, level=1, min_word_len=4, max_word_len=6))
    assert [row["id"] for row in rows] == ["spell_backward-3-0", "spell_backward-3-1"]
    assert all(row["kind"] == "spell_backward" and row["level"] == 1 for row in rows)
    assert rows == list(reasoning_gym_rows("spell_backward", 3, 2, level=1, min_word_len=4, max_word_len=6))
    right = rows[0]["answer"]
    half = right[:-1] + ("a" if right[-1] != "a" else "b")
    assert one(gym, rows[0], f"<think>hm</think>{right}") == {"reward": 1, "finished": 1, "unreadable": 0}
    assert 0 < one(gym, rows[0], half)["reward"] < 1
    assert one(gym, rows[0], "1234")["reward"] == 0


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        ("no_such", "no_such' not registered"),
        ("countdown", "its own expected answer got a score of 0.01"),  # gives the answer to eval, by way of sympy
        ("bitwise_arithmetic", "its own expected answer got a score of 0.0"),
        ("rush_hour", "no answer to judge by"),
        ("rearc", "its own expected answer got a score of 0.05"),  # JSON makes lists of its tuples
        ("game_of_life_halting", "the answer '\\?' got a score of 1.0"),
    ],
)
def test_datasets_that_cannot_be_judged_are_refused(dataset: str, words: str) -> None:
    with pytest.raises(AtomError, match=words):
        # Whether a board of this one lives on decides if garbage counts as right.
        reasoning_gym_rows(dataset, 1, 6 if dataset == "game_of_life_halting" else 1)


def test_settings_that_a_dataset_refuses_are_told() -> None:
    with pytest.raises(AtomError, match="reasoning_gym dataset gcd with {'min_value': 0}"):
        reasoning_gym_rows("gcd", 1, 1, min_value=0)


def test_an_unknown_dataset_in_a_row_is_no_reward(gym: Verifier) -> None:
    with pytest.raises(VerifierFailed, match="row g1: ValueError: reasoning_gym has no dataset of_mine"):
        one(gym, gym_row("of_mine"), "6")
    with pytest.raises(VerifierFailed, match=r"row g1: the answer '\?' got a score of 1.0, so no answer to it can be"):
        one(gym, {**gym_row(), "answer": "?"}, "6")
    with pytest.raises(VerifierFailed, match="row g1: no metadata to judge by"):
        one(gym, {k: v for k, v in gym_row().items() if k != "metadata"}, "6")


# --- instructions -----------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, dict[str, Any]] = {
    "keywords:existence": {"keywords": ["tea", "milk"]},
    "keywords:frequency": {"keyword": "tea", "frequency": 2, "relation": "at least"},
    "keywords:forbidden_words": {"forbidden_words": ["tea"]},
    "keywords:letter_frequency": {"letter": "z", "let_frequency": 2, "let_relation": "less than"},
    "length_constraints:number_words": {"num_words": 4, "relation": "at least"},
    "length_constraints:number_sentences": {"num_sentences": 3, "relation": "less than"},
    "length_constraints:number_paragraphs": {"num_paragraphs": 2},
    "length_constraints:nth_paragraph_first_word": {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "then"},
    "detectable_content:number_placeholders": {"num_placeholders": 2},
    "detectable_content:postscript": {"postscript_marker": "P.S."},
    "detectable_format:number_bullet_lists": {"num_bullets": 2},
    "detectable_format:constrained_response": {},
    "detectable_format:number_highlighted_sections": {"num_highlights": 2},
    "detectable_format:multiple_sections": {"section_spliter": "SECTION", "num_sections": 2},
    "detectable_format:json_format": {},
    "detectable_format:title": {},
    "combination:two_responses": {},
    "combination:repeat_prompt": {"prompt_to_repeat": "Say this."},
    "startend:start_checker": {"start_phrase": "Dear"},
    "startend:end_checker": {"end_phrase": "Bye."},
    "startend:quotation": {},
    "change_case:capital_word_frequency": {"capital_frequency": 2, "capital_relation": "at least"},
    "change_case:english_capital": {},
    "change_case:english_lowercase": {},
    "punctuation:no_comma": {},
}
FOLLOWED: dict[str, tuple[list[str], list[str]]] = {
    "keywords:existence": (["Tea with milk"], ["tea", "milk"]),
    "keywords:frequency": (["tea and more Tea"], ["tea"]),
    "keywords:forbidden_words": (["steam"], ["Have tea.", "tea"]),
    "keywords:letter_frequency": (["zoo", "none"], ["Zz"]),
    "length_constraints:number_words": (["one two three four"], ["one two, three"]),
    "length_constraints:number_sentences": (["One. Two!", "3.14 is pi."], ["One. Two! Three? Four."]),
    "length_constraints:number_paragraphs": (
        ["one\n***\ntwo", "***\none\n***\ntwo\n***"],
        ["one", "one\n***\n***\ntwo"],
    ),
    "length_constraints:nth_paragraph_first_word": (['First.\n\n"Then" more.'], ["Then.\n\nFirst.", "Then."]),
    "detectable_content:number_placeholders": (["[name] of [place]"], ["[name]", "[[["]),
    "detectable_content:postscript": (["Bye.\np.s. more"], ["Bye."]),
    "detectable_format:number_bullet_lists": (
        ["* a\n* b", "Say:\n- a\n  - b"],
        ["* a", "* a\n* b\n* c", "**a**\n**b**"],
    ),
    "detectable_format:constrained_response": (["My answer is yes."], ["Yes."]),
    "detectable_format:number_highlighted_sections": (["*a* and **b**"], ["*a*", "* * * *"]),
    "detectable_format:multiple_sections": (["SECTION 1\na\nSECTION 2\nb"], ["SECTION 1", "SECTION A SECTION B"]),
    "detectable_format:json_format": (['{"a": [1]}', '```json\n{"a": 1}\n```'], ["{a: 1}", 'Here: {"a": 1}']),
    "detectable_format:title": (["<<A tale>>\nonce"], ["<<>>", "<< >>", "A tale", ">>a<<"]),
    "combination:two_responses": (["one\n******\ntwo"], ["one", "one ****** one", "one ****** two ****** three"]),
    "combination:repeat_prompt": (["Say this. I did."], ["I say this."]),
    "startend:start_checker": (["dear you"], ["Oh dear"]),
    "startend:end_checker": (["Well. Bye.", '"Bye."'], ["Bye. Well."]),
    "startend:quotation": (['"all of it"'], ['"half', '"', "none"]),
    "change_case:capital_word_frequency": (["SO MUCH noise"], ["SO much noise"]),
    "change_case:english_capital": (["ALL OF 1T"], ["All"]),
    "change_case:english_lowercase": (["all of 1t"], ["All"]),
    "punctuation:no_comma": (["none here"], ["one, two"]),
}


@pytest.mark.parametrize("name", CHECKS)
def test_each_instruction(name: str) -> None:
    found, row = verifier("instructions"), form_row((name, ARGUMENTS[name]))
    followed, not_followed = FOLLOWED[name]
    for text in followed:
        assert one(found, row, text) == {"reward": 1, "fraction": 1, "finished": 1}, text
    for text in (*not_followed, "", " "):
        assert one(found, row, text) == {"reward": 0, "fraction": 0, "finished": 1}, text


def test_all_instructions_must_be_followed_and_none_are_left_unread() -> None:
    found = verifier("instructions")
    words = "length_constraints:number_words"
    row = form_row(
        (words, {"num_words": 3, "relation": "at least", "keywords": None}),
        (words, {"num_words": 5, "relation": "less than"}),
        ("punctuation:no_comma", {}),
    )
    assert one(found, row, "one two three") == {"reward": 1, "fraction": 1, "finished": 1}
    assert one(found, row, "one, two") == {"reward": 0, "fraction": pytest.approx(1 / 3), "finished": 1}


@pytest.mark.parametrize(
    ("instruction", "words"),
    [
        (("language:response_language", {"language": "en"}), "unknown instruction 'language:response_language'"),
        (("punctuation:no_comma", {"num_words": 3}), "unexpected keyword argument 'num_words'"),
        (("length_constraints:number_words", {"num_words": 3}), "missing 1 required positional argument: 'relation'"),
        (("length_constraints:number_words", {"num_words": 3, "relation": "about"}), "relation 'about' is neither"),
        (("keywords:existence", {"keywords": [3]}), "has no attribute 'lower'"),
    ],
)
def test_an_instruction_that_cannot_be_checked_is_no_reward(
    instruction: tuple[str, dict[str, Any]], words: str
) -> None:
    with pytest.raises(VerifierFailed, match=f"verifier instructions, row i1: .*{words}"):
        one(verifier("instructions"), form_row(instruction), "text")


def test_a_row_without_instructions_is_no_reward() -> None:
    with pytest.raises(VerifierFailed, match="row i1: no field 'kwargs'"):
        one(verifier("instructions"), {k: v for k, v in form_row().items() if k != "kwargs"}, "text")
    with pytest.raises(VerifierFailed, match="0 instructions with 0 sets"):
        one(verifier("instructions"), form_row(), "text")


# --- nemo-gym ---------------------------------------------------------------------------------------------------------


def test_a_server_scores_in_the_order_of_the_answers(serve: Callable[..., Server]) -> None:
    server = serve(judged)
    rewards = [p["reward"] for p in client(server).score([(sum_row(), said(t)) for t in ("4", "5") * 20])]
    assert rewards == [1, 0] * 20 and len(server.seen) == 40
    assert one(client(server), sum_row(), "4") == {"reward": 1, "library_reward": 0.5, "finished": 1}
    assert server.seen[-1]["expected_answer"] == "4" and server.seen[-1]["id"] == "m1"


def test_what_passes_is_tried_again(serve: Callable[..., Server]) -> None:
    for trouble in ((500, b"oops"), (503, b"busy"), (429, b"slow down"), None):
        server = serve(lambda n, request, trouble=trouble: judged(n, request) if n > 2 else trouble)
        assert one(client(server), sum_row(), "4")["reward"] == 1 and len(server.seen) == 3


@pytest.mark.parametrize(
    ("reply", "words", "requests"),
    [
        ((422, b'{"detail":"Field required"}'), 'answered 422: {"detail":"Field required"}', 1),
        ((404, b"not here"), "answered 404: not here", 1),
        ((500, b"oops"), "answered 500: oops, 5 times", 5),
        (None, r"did not answer \(.*\), 5 times", 5),
        ((200, b"<html>"), "answered what is no JSON object: '<html>'", 1),
        ((200, b"[1]"), "answered what is no JSON object", 1),
        ((200, b"\xff\xfe"), "answered what is no JSON object", 1),
        ((200, b'{"reward": NaN}'), r"answered without a finite reward \(nan\)", 1),
        ((200, b'{"reward": 1e999}'), r"answered without a finite reward \(inf\)", 1),
        ((200, b'{"reward": null}'), r"answered without a finite reward \(None\)", 1),
        ((200, b'{"reward": true}'), r"answered without a finite reward \(True\)", 1),
        ((200, b'{"reward": "1"}'), r"answered without a finite reward \('1'\)", 1),
        ((200, b"{}"), "answered without a finite reward", 1),
    ],
)
def test_a_server_that_cannot_judge_is_no_reward(
    serve: Callable[..., Server], reply: tuple[int, bytes] | None, words: str, requests: int
) -> None:
    server = serve(lambda *_: reply)
    with pytest.raises(
        VerifierFailed, match=f"verifier nemo-gym, row m1: {server.url}/verify {words.replace('{', '[{]')}"
    ) as failed:
        one(client(server), sum_row(), "4")
    assert "see to that server" in str(failed.value) and len(server.seen) == requests


def test_a_server_that_dies_in_mid_step_is_no_reward(serve: Callable[..., Server]) -> None:
    def reply(n: int, request: dict[str, Any]) -> tuple[int, bytes] | None:
        if n > 10:
            server.socket.close()
            return None
        return judged(n, request)

    server = serve(reply)
    with pytest.raises(VerifierFailed, match="did not answer .*, 5 times; see to that server"):
        client(server).score([(sum_row(), said("4"))] * 100)


def test_a_server_that_is_too_slow_is_no_reward(serve: Callable[..., Server]) -> None:
    def reply(*_: Any) -> None:
        time.sleep(0.5)

    with pytest.raises(VerifierFailed, match=r"did not answer \(.*timed out.*\), 5 times"):
        one(client(serve(reply), timeout=0.05), sum_row(), "4")


def test_a_server_that_was_never_there_is_no_reward(serve: Callable[..., Server]) -> None:
    with pytest.raises(VerifierFailed, match="Connection refused"):
        one(verifier("nemo-gym", url="http://127.0.0.1:9", serves="nothing"), sum_row(), "4")
