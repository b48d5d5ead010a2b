"""Runs the examples of the documentation and writes what they print below them.

    python docs/examples.py                     all pages; needs the release that `make demo` makes
    python docs/examples.py docs/auditors.md    these pages

A block of `bash` or `python` is an example. It runs as a reader would type it: the examples of a page run from top to
bottom, in one shell and one Python, in a copy of a checkout whose `runs/` has finished releases. A block without a
language directly below an example is its output, and this module writes it. Comments before a block change that; no
reader of a rendered page sees them:

    <!-- not run: REASON -->         not run, or an output that nothing here can print
    <!-- run: WHEN, BY WHOM -->      run, but not with the others
    <!-- output of: COMMANDS -->     the block is the output of commands that the page does not show
    <!-- exit: 1 -->                 the exit code of an example, if it is not 0
    <!-- lines: REGEX -->            the lines of the output that the page shows
    <!-- varies: WHAT -->            the output differs between releases in more than numbers; tests compare less of it
    <!-- only: atom-tiny, REASON --> a release that the example needs
    <!-- names: NAME = VALUE; … -->  what the page names of the release: see `names_of`

Tests run the same examples on a release of atom-smoke (tests/integration/docs/test_pages.py).
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
TINY, SMOKE = "atom-tiny", "atom-smoke"
VERSION = "0.1.0"
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
NOTE = re.compile(r"^<!-- ([a-z ]+):\s((?:(?!-->).)*?)\s*-->\n\n?", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(
    rf"(?P<notes>(?:{NOTE.pattern})*)(?:^(?!<!--)[^\n]*`(?P<file>[\w-]+\.(?:yaml|jsonl?))`:\n\n)?"
    r"^```(?P<language>\w*)\n(?P<text>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
EXAMPLES = ("bash", "python")
FOLDERS = {"auditors.md": f"runs/releases/{TINY}-{VERSION}", "formats.md": f"runs/releases/{TINY}-{VERSION}"}
"""{page: the folder in which its examples run}, if it is not the checkout."""
ELSEWHERE = {
    "cli.md": "written by docs/generate.py",
    "configuration.md": "written by docs/generate.py",
    "extending.md": "run by tests/integration/docs/test_extending.py",
    "2026-11.md": "a record of measurements",
}
"""{page: why its blocks are not run here}"""
MOST_LINES, FIRST, LAST = 16, 10, 4
"""A longer output is shown as its first and last lines, with `…` between."""
WIDTH = 300
"""Characters of a line of output; a longer one ends in `…`."""
ELISION = "…"
VARIABLE = (
    (re.compile(r"\b([0-9a-f]{8})[0-9a-f]{24,}\b"), r"\1…"),  # digests and commits
    (re.compile(r"\b(\S+)-\d{8}-\d{6}-[0-9a-f]{4}\b"), r"\1-…"),  # runs
    (re.compile(r"http://127\.0\.0\.1:\d{2,5}"), "http://127.0.0.1:8765"),
)
"""(what differs from run to run, what is shown in its place)"""
QUIET = {
    "COLUMNS": "100", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TQDM_DISABLE": "1", "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_XET": "1", "MLFLOW_TRACKING_URI": "none", "OMP_NUM_THREADS": "1",
}  # fmt: skip
"""Environment of all examples: no bars of progress and no hints of libraries, which no page shows; and one thread, on
which the last bits of a sum depend."""
SHELL = """
exec 3>&1
set -eo pipefail
while IFS=$'\\t' read -r script log errors code; do
    if [ "$code" = 0 ]; then
        . "$script" > "$log" 2> "$errors" < /dev/null
        echo 0 >&3
    else
        status=0
        (set +e; . "$script") > "$log" 2> "$errors" < /dev/null || status=$?
        echo "$status" >&3
    fi
done
"""
"""Runs files as parts of one shell, which ends at the first command that fails. One that shall fail is a shell of its
own."""
PYTHON = """
import os, sys
commands, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
names = {"__name__": "__main__"}
for line in commands:
    script, log, errors, code = line.rstrip("\\n").split("\\t")
    for number, path in ((1, log), (2, errors)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    exec(compile(open(script).read(), script, "exec"), names)
    sys.stdout.flush()
    print(0, file=answers, flush=True)
"""
"""Runs files as parts of one program; an exception ends it."""


class ExampleError(Exception):
    """An example ends with another exit code than its page states, or there is no release to run it on."""


@dataclass(frozen=True)
class Block:
    """A block of code of a page.

    Attributes:
        start: Offset of its text in the page.
        line: Number of its first line.
        language: `bash` and `python` are run; `yaml` is written to `file`; "" is an output.
        text: What stands between its fences.
        file: Name of the file that the line above it announces, if any.
        notes: {kind: text} of the comments before it.
    """

    start: int
    line: int
    language: str
    text: str
    file: str | None
    notes: Mapping[str, str]

    @property
    def end(self) -> int:
        return self.start + len(self.text)

    @property
    def script(self) -> str | None:
        """What is run for it: its text, or the commands that its page does not show."""
        if self.language in EXAMPLES:
            return self.text
        return self.notes.get("output of")

    @property
    def code(self) -> int:
        return int(self.notes.get("exit", "0"))


@dataclass(frozen=True)
class Example:
    """A block that is run, or written to a file, and the block of its output, if the page shows one."""

    block: Block
    output: Block | None


def blocks_of(text: str) -> list[Block]:
    """The blocks of a page, in order."""
    return [
        Block(
            match.start("text"),
            text.count("\n", 0, match.start("text")) + 1,
            match["language"],
            match["text"],
            match["file"],
            {kind: value.strip() for kind, value in NOTE.findall(match["notes"])},
        )
        for match in BLOCK.finditer(text)
    ]


def examples_of(text: str) -> list[Example]:
    """The examples of a page, whoever runs them."""
    blocks = blocks_of(text)
    examples = []
    for number, block in enumerate(blocks):
        if block.script is None and block.file is None:
            continue
        output = block if "output of" in block.notes else None
        if output is None and block.language in EXAMPLES and number + 1 < len(blocks):
            below = blocks[number + 1]
            gap = text[block.end + len("```") : below.start - len("```\n")]
            if not below.language and not gap.strip():
                output = below
        examples.append(Example(block, output))
    return examples


def pages() -> list[Path]:
    """All pages whose examples run here."""
    every = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [page for page in every if page.name not in ELSEWHERE]


@dataclass
class Place:
    """A folder in which a reader types examples.

    Attributes:
        folder: A checkout with `runs/`.
        environment: Variables of all examples.
        release: Name of the release that the examples are about.
        names: {value on the page: value in that release}, for what a page names of a release.
    """

    folder: Path
    environment: dict[str, str]
    release: str
    names: dict[str, str] = field(default_factory=dict)

    def replaced(self, text: str) -> str:
        """A text of a page with the names of this release."""
        return substituted(text, {**self.names, TINY: self.release})


@contextmanager
def place(folder: Path, home: Path, release: str) -> Iterator[Place]:
    """Makes an empty folder a checkout with a copy of a home folder, and starts the local Hub of that copy."""
    from release.hub.local.server import LOCAL_TOKEN, running

    for name in ("docs", "examples", "pipeline", "stages", "release", "data_recipes", "tests", "bench"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(home, folder / "runs", ignore=shutil.ignore_patterns("mlflow.db*", "work"))
    for name, arguments in (("atom", "-P -m pipeline.cli "), ("python", "")):
        command = folder / ".bin" / name
        command.parent.mkdir(exist_ok=True)
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}"$@"\n')
        command.chmod(0o755)
    path = os.pathsep.join([str(folder / ".bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(ROOT)}
    environment |= {"HF_HOME": str(folder / ".hf"), "HF_TOKEN": LOCAL_TOKEN}
    environment.pop("ATOM_HOME", None)
    with running(folder / "runs" / "hub") as endpoint:
        yield Place(folder, environment | {"HF_ENDPOINT": endpoint}, release)


class Interpreter:
    """A shell or a Python that runs one example after another, and keeps its variables."""

    def __init__(self, command: list[str], folder: Path, environment: Mapping[str, str]) -> None:
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, script: Path, log: Path, errors: Path, code: int) -> int:
        """Runs a file and returns its exit code. code: the expected one."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{script}\t{log}\t{errors}\t{code}\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        return int(answer) if answer else self.process.wait()

    def close(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def run(page: str, text: str, at: Place, wanted: tuple[str, ...] = ()) -> dict[int, str]:
    """Runs the examples of a page, and returns {line of an example: its output}.

    Args:
        page: Name of the page.
        text: Its text.
        at: Where its reader is.
        wanted: Notes of the kind `run` whose examples are run as well.

    Raises:
        ExampleError: At the first example whose exit code is not the stated one.
    """
    logs = Path(tempfile.mkdtemp(dir=at.folder, prefix=f".{Path(page).stem}-"))
    folder = at.folder / at.replaced(FOLDERS.get(page, "."))
    commands = {"bash": ["bash", "-c", SHELL], "python": [sys.executable, "-P", "-c", PYTHON]}
    outputs: dict[int, str] = {}
    with ExitStack() as stack:
        interpreters: dict[str, Interpreter] = {}
        for example in examples_of(text):
            block = example.block
            if reason_not_to_run(block, at.release, wanted):
                continue
            if block.script is None:
                assert block.file is not None, "a block of another language is written to a file"
                (folder / block.file).write_text(at.replaced(block.text), encoding="utf-8")
                continue
            language = block.language or "bash"
            if language not in interpreters:
                interpreters[language] = Interpreter(commands[language], folder, at.environment)
                stack.callback(interpreters[language].close)
            script, log, errors = (logs / f"{block.line}.{end}" for end in ("script", "log", "errors"))
            script.write_text(at.replaced(block.script) + "\n", encoding="utf-8")
            code = interpreters[language].run(script, log, errors, block.code)
            output, told = (
                path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in (log, errors)
            )
            if code != block.code:
                raise ExampleError(
                    f"{page}:{block.line} exits with {code}, not {block.code}\n{(output + told)[-3000:]}"
                )
            # the sentence of an error; beside the output of a success, standard error has progress and warnings
            outputs[block.line] = output + told if code or not output else output
    return outputs


def reason_not_to_run(block: Block, release: str, wanted: tuple[str, ...]) -> str | None:
    """Why an example is not run here; None if it is."""
    run_by = block.notes.get("run")
    only = block.notes.get("only")
    if run_by is not None and run_by not in wanted:
        return f"run {run_by}"
    if only is not None and not only.startswith(release):
        return f"only {only}"
    return block.notes.get("not run")


def shown(output: str, notes: Mapping[str, str], folder: Path) -> str:
    """An output as a page has it: without what differs from run to run, and without lines that nobody would read.

    Args:
        output: All that an example has printed.
        notes: Those of the example: `lines`.
        folder: Of the checkout, whose path is not shown.
    """
    text = output.replace(f"{folder}/", "").replace(str(folder), ".")
    for pattern, replacement in VARIABLE:
        text = pattern.sub(replacement, text)
    lines = [line.rpartition("\r")[2].rstrip() for line in text.rstrip().split("\n")]
    while lines and not lines[0]:
        del lines[0]
    if "lines" in notes:
        kept = [number for number, line in enumerate(lines) if re.search(notes["lines"], line)]
    elif len(lines) > MOST_LINES:
        kept = [*range(FIRST), *range(len(lines) - LAST, len(lines))]
    else:
        kept = list(range(len(lines)))
    result = []
    for number, before in zip(kept, [-1, *kept], strict=False):
        if number > before + 1:
            result.append(ELISION)
        line = lines[number]
        result.append(line if len(line) <= WIDTH else line[: WIDTH - 1].rstrip() + ELISION)
    if kept and kept[-1] < len(lines) - 1:
        result.append(ELISION)
    return "".join(f"{line}\n" for line in result)


def with_outputs(page: str, text: str, outputs: Mapping[int, str], folder: Path) -> str:
    """A page with the outputs of its examples. outputs: {line of an example: all that it printed}."""
    for example in reversed(examples_of(text)):
        if example.output is None or example.block.line not in outputs:
            continue
        output = shown(outputs[example.block.line], example.block.notes, folder)
        if not output or "```" in output:
            raise ExampleError(f"{page}:{example.block.line} prints nothing that a page can show: {output!r}")
        text = text[: example.output.start] + output + text[example.output.end :]
    return text


def stated_names(text: str) -> dict[str, str]:
    """{name: value} of what a page names of the release."""
    pairs = [part.partition(" = ") for kind, note in NOTE.findall(text) if kind == "names" for part in note.split("; ")]
    return {name.strip(): value.strip() for name, _, value in pairs}


def names_of(release: Path) -> dict[str, str]:
    """What a page may name of a release, each chosen by a rule:

    - release: its name, if it is not atom-tiny;
    - document: the first docstring of a class or function, by its id, that three steps of pre-training read or more;
    - word: the name of that class or function, which the document contains;
    - task: the first task of `rlvr`, by its id, with an answer that was trained on;
    - question: the first problem, by its id, that the model answers correctly in conversation, or the first of all;
    - prompt: the same in plain text;
    - request: the first request for a note;
    - checkpoint: the branch of the last checkpoint of pre-training.
    """
    import pyarrow.parquet as pq

    from release.layout import models_of

    data = release / "dataset"
    model = models_of(json.loads((release / "evidence/release.json").read_text(encoding="utf-8"))["nodes"])[-1]
    order = pq.read_table(sorted((data / "order/pretrain").glob("*.parquet")), columns=["id", "step"])
    steps: dict[str, set[int]] = {}
    for document, step in zip(order["id"].to_pylist(), order["step"].to_pylist(), strict=True):
        steps.setdefault(document, set()).add(step)
    kept = pq.read_table(data / "kept/docstrings", columns=["id", "text"]).to_pylist()
    document, word = min(
        (row["id"], word)
        for row in kept
        if (word := row["id"].rpartition(":")[2]).isalpha() and len(word) >= 6 and word in row["text"]
        if len(steps.get(row["id"], ())) >= 3 and "/_" not in row["id"]
    )
    answers = pq.read_table(data / "rl/rlvr/rollouts.parquet", columns=["task", "dropped"]).to_pylist()
    chat = pq.read_table(data / f"evaluation/test/{model}/answers.parquet", filters=[("sample", "=", -1)]).to_pylist()
    plain = pq.read_table(data / f"evaluation/{model}/items.parquet").to_pylist()
    asked = min((-row["reward"], row["id"]) for row in chat)[1]
    lines = (data / "evaluation/chat.jsonl").read_text(encoding="utf-8").splitlines()
    rows = map(json.loads, lines)
    questions = {row["id"]: row["responses_create_params"]["input"][-1]["content"] for row in rows}
    sealed = [int(path.name.rpartition("-")[2]) for path in (release / "checkpoints").glob("pretrain-step-*")]
    return {
        "release": release.name.removesuffix(f"-{VERSION}"),
        "document": document,
        "word": word,
        "task": min(row["task"] for row in answers if not row["dropped"]),
        "question": questions[asked],
        "prompt": min((-row["score"], row["id"], row["prompt"]) for row in plain)[2],
        "request": min((id, question) for id, question in questions.items() if "courtesy" in id)[1],
        "checkpoint": f"pretrain-step-{max(sealed)}",
    }


def substituted(text: str, replacements: Mapping[str, str]) -> str:
    """A text with other names, where no letter or digit stands beside them."""
    names = "|".join(re.escape(name) for name in sorted(replacements, key=len, reverse=True))
    return re.sub(rf"(?<!\w)(?:{names})(?!\w)", lambda match: replacements[match[0]], text)


def with_names(text: str, names: Mapping[str, str]) -> str:
    """A page with the names of a release in the place of those that it states."""
    stated = stated_names(text)
    return substituted(text, {value: names[name] for name, value in stated.items()}) if stated else text


def main(arguments: list[str]) -> None:
    """Writes the outputs of the given pages, or of all."""
    home = ROOT / "runs"
    tiny, smoke = (home / "releases" / f"{name}-{VERSION}" for name in (TINY, SMOKE))
    if not (tiny / "SHA256SUMS").is_file():
        raise ExampleError(
            f"the outputs on the pages are those of {tiny.relative_to(ROOT)}, which is not there: run `make demo`, "
            "then `make docs` again"
        )
    if not (smoke / "SHA256SUMS").is_file():
        for command in ("run", "build"):
            environment = {**os.environ, "ATOM_HOME": str(home), "PYTHONPATH": str(ROOT)}
            subprocess.run([sys.executable, "-P", "-m", "pipeline.cli", command, SMOKE], env=environment, check=True)
    names = {TINY: names_of(tiny), SMOKE: names_of(smoke)}
    chosen = [Path(argument).resolve() for argument in arguments] or pages()
    for page in chosen:
        text = page.read_text(encoding="utf-8")
        if not any(example.output or "run" in example.block.notes for example in examples_of(text)):
            continue
        text = with_names(text, names[stated_names(text).get("release", TINY)])
        notes = tuple({block.notes["run"] for block in blocks_of(text) if "run" in block.notes} - {"on Slurm"})
        with tempfile.TemporaryDirectory() as folder, place(Path(folder), home, TINY) as at:
            outputs = run(page.name, text, at, notes)
            page.write_text(with_outputs(page.name, text, outputs, at.folder), encoding="utf-8")
        print(f"{page.relative_to(ROOT)}: {len(outputs)} examples", flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    try:
        main(sys.argv[1:])
    except ExampleError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
