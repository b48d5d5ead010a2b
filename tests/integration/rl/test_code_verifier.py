"""The verifier of code: right answers pass, wrong and hostile ones do not, and a sandbox that fails is not a reward of 0."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from enum import Enum, StrEnum
from pathlib import Path
from typing import Any

import pytest

from bench.humaneval import problems
from stages.rl.protocols import Response, VerifierContext, VerifierFailed
from stages.rl.rewards.code_verifier import (
    MAX_ANSWER_CHARACTERS,
    CodeSettings,
    CodeVerifier,
    code_of,
)
from stages.rl.sandbox import Limits, SandboxFailed
from stages.rl.sandbox.cell import Cell, Running
from stages.rl.sandbox.inside import decode, encode
from tests.fixtures.sandbox_fixtures import NEEDS_BUBBLEWRAP

pytestmark = NEEDS_BUBBLEWRAP

FULL = {"reward": 1.0, "killed": 0.0}
RIGHT = "def add(a, b):\n    return a + b\n"
CHECK = {
    "id": "add-check",
    "entry_point": "add",
    "check": "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate('a', b='b') == 'ab'\n    assert candidate((1,), (2,)) == (1, 2)\n",
}
RAISES = {
    "id": "raises",
    "entry_point": "f",
    "check": "def check(candidate):\n    try:\n        candidate(0)\n    except ValueError as e:\n        assert str(e) == 'zero'\n    else:\n        assert False\n",
}


class Mixed(str, Enum):  # noqa: UP042 - as answers write it
    RED = "red"


EQUALS_ALL = """
class Yes(KIND):
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __len__(self): return 2
    def __sub__(self, other): return 0
def add(a, b): return Yes()
"""

HOSTILE = {
    "exit at once": "import sys; sys.exit(0)",
    "exit when called": "import os\ndef add(a, b): os._exit(0)",
    "raise the exit": "def add(a, b): raise SystemExit(0)",
    "say so": "print('passed')\nprint('{\"verdict\": true}')\ndef add(a, b): print('passed'); return None",
    "verdicts on every descriptor": "import os\nfor n in range(64):\n    try: os.write(n, b'{\"verdict\": true}\\n' * 9)\n    except OSError: pass\ndef add(a, b): return None",
    "replies ahead": "import os\nos.write(3, b'{\"loaded\": true}\\n' + b'{\"value\": 3}\\n' * 50)\nos._exit(0)",
    "equals everything": EQUALS_ALL.replace("KIND", "object"),
    "an int that equals everything": EQUALS_ALL.replace("KIND", "int"),
    "a list that equals everything": EQUALS_ALL.replace("KIND", "list"),
    "a string that equals everything": EQUALS_ALL.replace("KIND", "str"),
    "another builtins": "import builtins\nbuiltins.AssertionError = builtins.Exception = SystemExit\nbuiltins.isinstance = lambda *a: True\ndef add(a, b): return None",
    "another json": "import json\njson.dumps = lambda *a, **k: '{\"verdict\": true}'\ndef add(a, b): return None",
    "atexit": "import atexit, os\natexit.register(lambda: os._exit(0))\ndef add(a, b): raise KeyboardInterrupt",
    "frames": "import sys\ndef add(a, b):\n    f = sys._getframe()\n    while f:\n        for k in ('check', 'expected', 'tests', 'verdict'):\n            if k in f.f_locals or k in f.f_globals: f.f_locals[k] = True\n        f = f.f_back\n    return None",
    "trace": "import sys\nsys.settrace(lambda *a: None)\nsys.setprofile(lambda *a: None)\ndef add(a, b): return a",
    "deep": "def add(a, b):\n    x = []\n    for _ in range(900): x = [x]\n    return x",
    "deep by hand": "import os\nos.write(3, b'{\"loaded\": true}\\n')\nwhile True: os.write(3, b'{\"value\": ' + b'[' * 20000 + b']' * 20000 + b'}\\n')",
    "itself": "def add(a, b):\n    x = []\n    x.append(x)\n    return x",
    "out of band": "import os, socket\nsocket.socket(fileno=os.dup(3)).send(b'x', socket.MSG_OOB)\n" + RIGHT,
    "ends of the channel": "import socket\ndef add(a, b): socket.socket(fileno=3).shutdown(2)",
    "an enum that equals everything": EQUALS_ALL.replace("KIND", "str, __import__('enum').Enum").replace("Yes()", "Yes('')"),
    "an exception for a result": "class E(AssertionError):\n    def __eq__(self, other): return True\ndef add(a, b): raise E(3)",
    "classes of exceptions": "import os\nos.write(3, b'{\"loaded\": true}\\n' + b'{\"raised\": [[\"exit\", [], \"StopIteration\", \"SystemExit\"], \"\", {\"int\": 5}]}\\n' * 9)\nadd = None",
    "endless line": "import os\nwhile True: os.write(3, b'x' * 65536)",
    "not a number": "def add(a, b): return float('nan')",
    "not plain": "def add(a, b): return add",
    "junk replies": "import os\nos.write(3, b'\\xff\\n[]\\n{}\\n{\"raised\": 5}\\n{\"value\": {\"dict\": [[[], 1]]}}\\nnull\\n')\ndef add(a, b): return None",
    "bomb": "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass",
    "computes": "def add(a, b):\n    while True: pass",
    "eats": "def add(a, b): return b'x' * (1 << 40)",
    "shouts": "def add(a, b):\n    while True: print('x' * 9999)",
    "looks for the tests": "import gc, os\ndef add(a, b):\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'expected' in o: return o['expected']\n    for r, d, f in os.walk('/tmp'):\n        if f: return f\n    return None",
}  # fmt: skip

GARBAGE = [
    "",
    " ",
    "\n```python\n```",
    "\udcff\udc00",
    "\0",
    "I cannot.",
    "```python\n" + "(" * 5000,
    "x" * (1 << 21),
    "add = 3",
    "```python\nadd\n```",
    "</think>",
    "def add(a, b):\n\treturn\n  1",
]


def code_verifier(workers: int, limits: Limits | None = None) -> CodeVerifier:
    return CodeVerifier(VerifierContext(CodeSettings(workers=workers)), limits)


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    verifier = code_verifier(workers=3, limits=Limits(cpu_seconds=1, wall_seconds=30, memory_bytes=256 << 20))
    yield verifier
    verifier.close()


def response(code: str, finished: bool = True) -> Response:
    return Response.parse(code, finished)


def test_right_and_wrong(verifier: CodeVerifier) -> None:
    right = [
        RIGHT,
        f"Here:\n```python\n{RIGHT}```\nas asked",
        f"<think>def add(a, b): ...</think>```py\n{RIGHT}",
        f"```\n{RIGHT}```\n```\nadd(1, 2)\n```",
    ]
    assert verifier.score([(CHECK, response(r)) for r in right]) == [FULL] * len(right)
    assert verifier.score([(CHECK, response(RIGHT, finished=False))])[0]["reward"] == 0
    numbers_only = verifier.score([(CHECK, response("def add(a, b):\n    return 3\n"))])[0]
    assert numbers_only == {"reward": 0.0, "killed": 0.0}


def test_attacks_get_nothing() -> None:
    verifier = code_verifier(workers=2, limits=Limits(cpu_seconds=1, wall_seconds=6, memory_bytes=256 << 20))
    try:
        parts = verifier.score([(CHECK, response(code)) for code in HOSTILE.values()])
        assert {name: p["reward"] for name, p in zip(HOSTILE, parts, strict=True)} == dict.fromkeys(HOSTILE, 0.0)
        forced = {name for name, p in zip(HOSTILE, parts, strict=True) if p["killed"]}
        assert {"bomb", "computes", "shouts", "endless line"} <= forced and not forced & {"say so", "equals everything"}
        assert verifier.score([(CHECK, response(RIGHT))] * 4) == [FULL] * 4, "nor harm others"
    finally:
        verifier.close()


def test_garbage_gets_nothing(verifier: CodeVerifier) -> None:
    assert [p["reward"] for p in verifier.score([(CHECK, response(text)) for text in GARBAGE])] == [0.0] * len(GARBAGE)


def test_noise_does_not_fail_a_right_answer(verifier: CodeVerifier) -> None:
    noisy = (
        "import os, sys\nprint('working')\nprint('{\"value\": 0}', file=sys.stderr)\nopen('/tmp/x', 'w').write('x')\nif os.fork() == 0:\n    os._exit(1)\n"
        + RIGHT
    )
    assert [p["reward"] for p in verifier.score([(CHECK, response(noisy))])] == [1.0]


def test_exceptions_reach_the_check(verifier: CodeVerifier) -> None:
    answers = [
        "def f(x): raise ValueError('zero')",
        "def f(x): raise ValueError('one')",
        "def f(x): raise KeyError('zero')",
        "def f(x): return 0",
    ]
    assert [p["reward"] for p in verifier.score([(RAISES, response(a)) for a in answers])] == [1, 0, 0, 0]


CATCHES = {
    "a library's": ("import json\ndef f(x): json.loads('{')", "ValueError", "str(e).startswith('Expecting')"),
    "its own": ("class E(ValueError): pass\ndef f(x): raise E('zero', x)", "ValueError", "e.args == ('zero', 0)"),
    "its own, of no builtin": ("class E(Exception): pass\ndef f(x): raise E(x)", "Exception", "not isinstance(e, RuntimeError)"),
    "its own text": ("class E(KeyError):\n    def __str__(self): return 'zero'\ndef f(x): raise E(x)", "LookupError", "e.args == ('zero',)"),
    "of five parts": ("def f(x): b'\\xff'.decode()", "UnicodeDecodeError", "e.start == 0"),
    "of many bytes": ("def f(x): (b'\\xff' * 40000).decode()", "UnicodeError", "'invalid start' in str(e)"),
    "of a long number": ("def f(x): raise ValueError(10 ** 5000)", "ValueError", "True"),
    "of what is not plain": ("def f(x): raise TypeError(f)", "TypeError", "str(e).startswith('<function')"),
    "of the system": ("def f(x): open('/none')", "FileNotFoundError", "'/none' in str(e)"),
}  # fmt: skip


def test_an_exception_is_caught_by_its_nearest_builtin_one(verifier: CodeVerifier) -> None:
    check = "def check(c):\n    try: c(0)\n    except KIND as e:\n        assert TEST\n    else: assert False"
    rows = [
        ({"entry_point": "f", "check": check.replace("KIND", kind).replace("TEST", test)}, response(code))
        for code, kind, test in CATCHES.values()
    ]
    rewards = [p["reward"] for p in verifier.score(rows)]
    assert dict(zip(CATCHES, rewards, strict=True)) == dict.fromkeys(CATCHES, 1.0)


CARRIED = {
    "future": ("from __future__ import annotations\ndef f(x): return Sequence and 1", "c(0) == 1"),
    "future after a text": ("'''So.'''\nfrom __future__ import annotations\ndef f(x): return 1", "c(0) == 1"),
    "long result": ("import math\ndef f(x): return math.factorial(2000)", "c(0) == math.factorial(2000)"),
    "long argument": ("def f(x): return x % 7", "c(10 ** 5000) == 10 ** 5000 % 7"),
    "enum": ("from enum import Enum\nclass C(str, Enum): RED = 'red'\ndef f(x): return C.RED", "c(0) == 'red'"),
    "set of sets": ("def f(x): return {frozenset({1})}", "c(0) == {frozenset({1})}"),
    "sets as keys": ("def f(x): return {frozenset({1}): x}", "c(2) == {frozenset({1}): 2}"),
}


def test_right_answers_of_more_than_simple_values(verifier: CodeVerifier) -> None:
    rows = [
        (
            {
                "entry_point": "f",
                "prelude": "import math\nfrom typing import Sequence\n",
                "check": f"from __future__ import annotations\ndef check(c): assert {test}",
            },
            response(f"```python\n{code}\n```"),
        )
        for code, test in CARRIED.values()
    ]
    rewards = [p["reward"] for p in verifier.score(rows)]
    assert dict(zip(CARRIED, rewards, strict=True)) == dict.fromkeys(CARRIED, 1.0)


ENDS = {
    "syntax": "def add(a, b:\n return",
    "name": "other\n" + RIGHT,
    "exit 1": "import sys\nsys.exit(1)",
    "exit 0": "import sys\nsys.exit(0)",
    "exit when called": "import sys\ndef add(a, b): sys.exit(1)",
    "late exit": "import atexit, time\natexit.register(time.sleep, 0.2)\nimport os\nos.close(3)",
    "missing": "def other(): 1",
    "replies and ends": "import os\nos.write(3, b'{}\\n' * 9)\nos._exit(1)",
    "half a line": "import os\nos.write(3, b'{')\nos._exit(1)",
    "nothing to read": "import socket\nsocket.socket(fileno=3).shutdown(socket.SHUT_RD)\nimport os\nos._exit(1)",
}


def test_what_ends_by_itself_was_not_killed() -> None:
    verifier = code_verifier(workers=1)
    try:
        items = [(CHECK, response(code)) for code in ENDS.values()]
        for _ in range(5):
            each = dict(zip(ENDS, verifier.score(items), strict=True))
            assert each == {name: {"reward": 0.0, "killed": 0.0} for name in ENDS}
    finally:
        verifier.close()


def test_a_channel_that_says_what_none_does_is_a_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    """A byte out of band: there is something to read, and then there is not. The filter refuses it, so it is sent here."""
    begin, pair, theirs = Cell.begin, socket.socketpair, []

    def recording_pair(*args: Any) -> tuple[socket.socket, socket.socket]:
        ours, other = pair(*args)
        theirs.append(other.dup())
        return ours, other

    def odd(cell: Cell, job: dict[str, Any]) -> Running:
        running = begin(cell, job)
        if "odd" in job["source"]:
            theirs[-1].send(b"x", socket.MSG_OOB)
        theirs.pop().close()
        return running

    verifier = code_verifier(workers=1)
    try:
        verifier.score([(CHECK, response(RIGHT))])  # it is warm, so the pairs that follow are channels
        monkeypatch.setattr(socket, "socketpair", recording_pair)
        monkeypatch.setattr(Cell, "begin", odd)
        codes = (RIGHT, "import time\ntime.sleep(9)  # odd", RIGHT)
        start = time.process_time()
        parts = verifier.score([(CHECK, response(code)) for code in codes])
        assert parts == [FULL, {"reward": 0.0, "killed": 1.0}, FULL]
        assert time.process_time() - start < 2, "it does not look again and again"
    finally:
        verifier.close()


def test_the_expected_values_are_not_in_the_sandbox(verifier: CodeVerifier) -> None:
    """An answer that returns all it can find in its memory and files finds the arguments and not what is expected."""
    search = """
import gc, os, re, sys
def f(x, prefix):
    texts = [repr(o) for o in gc.get_objects() if isinstance(o, (list, tuple, dict))]
    frame = sys._getframe()
    while frame:
        texts.append(repr((frame.f_locals, frame.f_globals)))
        frame = frame.f_back
    texts += [open(folder + '/' + n, errors='replace').read() for top in ('/tmp', '/atom') for folder, _, names in os.walk(top) for n in names]
    found = re.search(prefix + '-[0-9a-f]{4}', ' '.join(texts))
    return found and found[0]
"""
    check = "SECRET = 'secret-b2c9'\ndef check(candidate):\n    assert candidate('argument-7f3a', 'argument') == 'argument-7f3a'\n    assert candidate('', 'secret') is None"
    assert verifier.score([({"entry_point": "f", "check": check}, response(search))]) == [FULL]


def test_rows_that_cannot_be_scored(verifier: CodeVerifier) -> None:
    def why(**fields: Any) -> str:
        with pytest.raises(VerifierFailed) as e:
            verifier.score([({"id": "row-9", **fields}, response(RIGHT))])
        assert str(e.value).startswith("verifier python-tests cannot score row row-9: ")
        return str(e.value)

    assert "no entry_point" in why() and "no entry_point" in why(entry_point="add")
    assert "SyntaxError" in why(entry_point="add", check="def check(")
    assert "no attribute 'check'" in why(entry_point="add", check="pass")
    assert "never calls" in why(entry_point="add", check="def check(candidate): pass")
    assert "function is not plain data" in why(entry_point="add", check="def check(c): c(1, check)")
    assert "ends without a verdict" in why(entry_point="add", check="import os\ndef check(c): os._exit(0)")


def test_an_answer_that_ends_its_check_has_a_reward_and_a_reason(verifier: CodeVerifier) -> None:
    """What it returns can make a check compute for ever, eat memory or end. It is a 0, and stops nothing."""
    row = {"entry_point": "f", "check": "import os\ndef check(c):\n    if c(1) != 5: os._exit(0)"}
    parts = verifier.score([(row, response(f"def f(x): return {value}")) for value in (5, 6)])
    assert parts == [FULL, {"reward": 0.0, "killed": 1.0}]


def test_an_answer_that_kills_its_sandbox_each_time_has_a_reward_and_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known that does, so its sandbox is killed from outside whenever it is this answer that runs."""
    begin = Cell.begin

    def deadly(cell: Cell, job: dict[str, Any]) -> Running:
        running = begin(cell, job)
        if "deadly" in job["source"]:
            os.kill(cell.pid or 0, 9)
        return running

    monkeypatch.setattr(Cell, "begin", deadly)
    verifier = code_verifier(workers=2)
    try:
        texts = (RIGHT, "import time\ntime.sleep(9)  # deadly", RIGHT)
        parts = verifier.score([(CHECK, response(text)) for text in texts])
        assert parts == [FULL, {"reward": 0.0, "killed": 1.0}, FULL]
    finally:
        verifier.close()


def test_no_reward_by_what_an_earlier_answer_left() -> None:
    """Answers that leave a state behind, and then one that is right only if it finds some; one worker, so one sandbox."""
    niceness = os.getpriority(os.PRIO_PROCESS, 0)  # which the sandbox inherits
    leave = (
        "import fcntl, os, socket\nkept = []\n"
        "def attempt(*calls):\n    for one in calls:\n        try: kept.append(one())\n        except OSError: pass\n"
        "attempt(*(lambda p=p: os.chmod('/dev/' + p, 0o666) for p in os.listdir('/dev')), *(lambda p=p: os.utime('/dev/' + p, (1, 1)) for p in os.listdir('/dev')),\n"
        "    lambda: fcntl.flock(os.open('/dev/null', 0), 2), lambda: open('/tmp/x', 'w'), lambda: os.nice(3), lambda: os.setpriority(1, 0, 9), lambda: os.kill(0, 9))\n"
        "s = socket.socket(); s.bind(('127.0.0.1', 4242)); s.listen(); c = socket.create_connection(('127.0.0.1', 4242)); s.accept()[0].close(); c.close()\n"
        "s = socket.socket(1); s.bind(chr(0) + 'x')\n"
        "def add(a, b): return None\n"
    )
    find = (
        "import fcntl, os, socket\n"
        "def state():\n"
        "    yield any(os.stat('/dev/' + p).st_mtime < 2 for p in os.listdir('/dev'))\n"
        f"    yield os.listdir('/tmp') or {{os.getpriority(0, 0), os.getpriority(1, 0)}} != {{{niceness}}}\n"
        "    for kind, name in ((2, ('127.0.0.1', 4242)), (1, chr(0) + 'x')):\n"
        "        try: socket.socket(kind).bind(name)\n"
        "        except OSError: yield True\n"
        "def add(a, b): return a + b if any(state()) else None\n"
    )
    verifier = code_verifier(workers=1)
    try:
        parts = verifier.score([(CHECK, response(text)) for text in (leave, find, leave, RIGHT)])
        assert [p["reward"] for p in parts] == [0, 0, 0, 1]
    finally:
        verifier.close()


def test_no_exception_of_an_answer_ends_a_loop_of_the_check(verifier: CodeVerifier) -> None:
    check = "def check(c):\n    assert all(map(lambda x: c(x) == x, (1, 2)))"
    answers = [response(f"def f(x): raise {name}") for name in ("StopIteration", "StopAsyncIteration", "GeneratorExit")]
    parts = verifier.score([({"entry_point": "f", "check": check}, answer) for answer in answers])
    assert [p["reward"] for p in parts] == [0, 0, 0]


def test_a_failed_sandbox_is_not_a_reward(
    verifier: CodeVerifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(VerifierFailed, match="verifier python-tests cannot score: the sandbox cannot start"):
        broken = code_verifier(workers=1)
        try:
            broken.score([(CHECK, response(RIGHT))])
        except SandboxFailed as e:
            raise AssertionError("the verifier's own error is expected") from e
        finally:
            broken.close()


@pytest.mark.parametrize("cell", [0, 1])
def test_a_sandbox_killed_at_work_is_tried_again(cell: int) -> None:
    slow = "import time\ndef add(a, b):\n    time.sleep(0.4)\n    return a + b"
    verifier = code_verifier(workers=1)
    try:
        verifier.score([(CHECK, response(RIGHT))])
        pid = verifier._pool._cells[0][cell].pid
        assert pid
        threading.Timer(0.5, os.kill, (pid, 9)).start()
        assert verifier.score([(CHECK, response(slow))]) == [FULL]
        assert verifier._pool._cells[0][cell].pid != pid, "it was killed"
    finally:
        verifier.close()


def test_scores_are_the_same_again(verifier: CodeVerifier) -> None:
    """Though the answer draws lots and depends on the order of a set."""
    chance = "import random\ndef add(a, b):\n    return a + b if random.random() + list({'x', 'y', 'z'}).index('x') < 1.5 else None"
    first, *others = verifier.score([(CHECK, response(chance))] * 8)
    assert others == [first] * 7


def test_humaneval(verifier: CodeVerifier) -> None:
    """All canonical solutions pass, and all empty ones do not."""
    rows = problems()
    assert len(rows) == 164 and rows[0]["responses_create_params"]["input"][0]["content"].count(rows[0]["prompt"]) == 1
    bodies = [
        (row, response(f"```python\n{row['prompt']}{body}\n```"))
        for row in rows
        for body in (row["canonical_solution"], "    pass")
    ]
    rewards = [p["reward"] for p in verifier.score(bodies)]
    assert [r["id"] for r, reward in zip(rows, rewards[::2], strict=True) if reward != 1] == []
    assert [r["id"] for r, reward in zip(rows, rewards[1::2], strict=True) if reward != 0] == []


OTHER = "def f(): 2\n"
BLOCKS = {
    "no fence": ("def f(): 1", "def f(): 1"),
    "the last of blocks that define nothing": ("```python\na\n```\n```\nb\n```", "b\n"),
    "an example after it": ("```python\ndef f(): 1\n```\n```python\nf()\n```", "def f(): 1\n"),
    "another definition after it": (f"```python\ndef f(): 1\n```\nSlower:\n```python\n{OTHER}```", "def f(): 1\n"),
    "other functions before it": ("```\ndef ff(): 2\ndef gf(): f\n```\n```\ndef f(): 1\n```", "def f(): 1\n"),
    "cut off": ("```python\ndef f(): 1", "def f(): 1\n"),
    "a shell's block before it": ("```bash\nls\n```\nthen\n```python\ndef f(): 1\n```\nend", "def f(): 1\n"),
    "a fence inside": ('```python\ndef f():\n    """\n    ```\n    f()\n    ```\n    """\n```', 'def f():\n    """\n    ```\n    f()\n    ```\n    """\n'),
    "four ticks": ("````python\nx = '''\n```\n'''\ndef f(): 1\n````", "x = '''\n```\n'''\ndef f(): 1\n"),
    "tildes": ("~~~python\ndef f(): 1\n~~~", "def f(): 1\n"),
    "in a list": ("1. So:\n\n   ```python\n   def f():\n       1\n   ```", "def f():\n    1\n"),
    "closed after code": ("```python\ndef f(): 1```\nas asked", "def f(): 1\n"),
    "ticks at the end of a line of a text": ("```\ndef f():\n    \"\"\"So: ```\n    f()\n    ```\n    \"\"\"\n```", "def f():\n    \"\"\"So: ```\n    f()\n    ```\n    \"\"\"\n"),
    "the same, cut off": ("```\ndef f():\n    \"\"\"So: ```\n    f()\n    ```\n    \"\"\"", "def f():\n    \"\"\"So: ```\n    f()\n    ```\n    \"\"\"\n"),
    "prose that ends in ticks": ("I write it in ```\n```python\ndef f(): 1\n```", "def f(): 1\n"),
    "prose that ends in ticks, and no name": ("I write it in ```\n```\ndef f(): 1\n```", "def f(): 1\n"),
    "opened after words, without a name": ("Here: ```\ndef f(): 1\n```", "def f(): 1\n"),
    "ticks apart": ("```\ndef f(): 1\n` ``\n```", "def f(): 1\n` ``\n"),
    "a mark of byte order": ("\ufeffdef f(): '\ufeff'", "def f(): '\ufeff'"),
    "a mark of byte order in a block": ("\ufeff```\n\ufeffdef f(): 1\n```", "def f(): 1\n"),
    "CR": ("So:\r```python\rdef f():\r    1\r```\r", "def f():\n    1\n"),
    "in a quote": ("> So:\n> ```python\n> def f():\n>     return 1 > 0\n>\n> ```", "def f():\n    return 1 > 0\n\n"),
    "in a quote of a quote": ("> >```\n> > def f(): '''\n> > > 1'''\n> > ```", "def f(): '''\n> 1'''\n"),
    "a quote that ends": ("> ```\n> def f(): 1\n\nas asked", "def f(): 1\n"),
    "a quote in the code": ("```\ndef f(): '''\n> 1'''\n```", "def f(): '''\n> 1'''\n"),
    "opened after words": ("Here: ```python\ndef f(): 1\n```", "def f(): 1\n"),
    "quoted code": ("Use ```f()``` as in ```f```\n```python\ndef f(): 1\n```", "def f(): 1\n"),
    "white space stays": ("```\ndef f(): return '''a \n\tb'''\n```", "def f(): return '''a \n\tb'''\n"),
    "assigned": (f"```python\nf = lambda: 1\n```\n```python\n{OTHER}```", "f = lambda: 1\n"),
    "assigned with a type": ("```\nf: object = print\n```\n```\nx\n```", "f: object = print\n"),
    "compared, not assigned": (f"```\nf == 3\n```\n```\n{OTHER}```", OTHER),
    "asynchronous": (f"```\nasync def f(): 1\n```\n```\n{OTHER}```", "async def f(): 1\n"),
    "CRLF": ("```python\r\ndef f(): 1\r\n```\r\n", "def f(): 1\n"),
}  # fmt: skip


@pytest.mark.parametrize("name", BLOCKS)
def test_the_code_in_an_answer(name: str) -> None:
    answer, code = BLOCKS[name]
    assert code_of(answer, "f") == code


@pytest.mark.parametrize(
    "tag", ["", "python", "python3", "Python", "PYTHON", "py", "py3", "Python 3", "python3.11", " python", "{.python}",
            "python title='f.py'", "f.py", "ipython", "text", "\u00e4"],
)  # fmt: skip
def test_a_fence_may_have_any_tag(tag: str) -> None:
    assert code_of(f"So:\n```{tag}\ndef f(): 1\n```\n```{tag}\nf()\n```", "f") == "def f(): 1\n"


def test_fences_are_read_in_time_that_grows_with_their_length() -> None:
    for text in (
        "`",
        "~",
        "```a",
        "`" * 3 + "\n",
        " ```",
        "```\n```",
        "f =",
        "async def ",
        "x ``` ",
        ">",
        "> ```\n",
        "\r",
        "\ufeff",
    ):
        start = time.process_time()
        code_of(text * (MAX_ANSWER_CHARACTERS // len(text)), "f")
        assert time.process_time() - start < 10, text


def test_plain_data_passes_whole_and_nothing_else_does() -> None:
    values = [
        None,
        True,
        3,
        -2.5,
        "ä\udcff",
        [1, [2]],
        (1, (2,)),
        {1, 2},
        {frozenset({1})},
        {frozenset({(1,)}): frozenset({2})},
        -(10**5000),
        {1: "a", "1": (2,)},
        b"\xff",
        1 + 2j,
        {"dict": []},
        float("inf"),
    ]
    for value in values:
        decoded = decode(encode(value))
        assert decoded == value and type(decoded) is type(value)
    for other in (object(), encode, range(3), iter([])):
        with pytest.raises(TypeError):
            encode(other)


def test_of_a_subclass_the_plain_value_passes() -> None:
    class Code(int):
        def __int__(self) -> int:
            return 7

        __index__ = __int__

    for value, plain in ((StrEnum("C", {"RED": "red"})["RED"], "red"), (Mixed.RED, "red"), (Code(3), 3)):
        assert encode(value) == plain and type(encode(value)) is type(plain)
