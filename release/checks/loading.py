"""Checks that plain transformers loads the models of a release, in a fresh interpreter.

Models, tokenizers and chat templates must give the outputs that the build recorded.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.core.errors import installing
from release import untrusted
from release.checks import check_runner, formats
from release.checks.check import Absent, BuildContext, Findings, LoadProblem, LoadReport, require_file
from release.checks.check_runner import Budget
from release.facts.published_tables import read_json
from release.layout import GOLDENS
from release.opened_release import Release
from stages import export
from stages.formats.tokenizer import INFERENCE_FILE, THINK_END, THINK_START, TRAINING_FILE

MODEL, CHAT_TEMPLATE = "model", "chat_template"
LOADING_SECONDS, BYTES_PER_SECOND = 3600, 5_000_000
"""The limit for loading models: so many seconds, and one for so many bytes of their weights."""
NOTHING_FROM_THE_HUB = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0"}
"""Variables with which transformers downloads nothing, and takes no kernel that a config names."""


def load_models(folders: list[Path], budget: Budget | None = None) -> list[LoadReport]:
    """Returns a report on each model folder, from one fresh interpreter.

    `budget` has the limits for untrusted models after the libraries are loaded.
    """
    # -P keeps the working folder off the path, where a file could have the name of a library.
    command = [sys.executable, "-P", str(Path(export.__file__).with_name("load_check.py"))]
    command += [f"--whole={export.WHOLE_BYTES}"]
    command += [] if budget is None else [f"--memory={budget.memory}", f"--seconds={budget.seconds:.0f}"]
    command += [str(folder.resolve()) for folder in folders]
    wall_seconds = LOADING_SECONDS + weight_bytes(folders) // BYTES_PER_SECOND
    try:
        process = subprocess.run(
            command,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=wall_seconds,
            env={**os.environ, **NOTHING_FROM_THE_HUB},
        )
    except subprocess.TimeoutExpired:
        return _failed(folders, f"loading did not end within {wall_seconds} s")
    # Libraries print lines of their own, so those with a report are marked.
    lines = [line.removeprefix("RELOAD ") for line in process.stdout.splitlines() if line.startswith("RELOAD ")]
    if len(lines) == len(folders):
        return [_report(json.loads(line)) for line in lines]
    last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
    # Ended by a signal: a limit was exceeded, and the last line of the program does not say so.
    if budget is not None and process.returncode < 0:
        memory, seconds = budget.memory >> 20, budget.seconds
        last_line = f"it takes more than {memory} MB of memory or {seconds:.0f} s of processor time"
    return _failed(folders, f"transformers cannot load it: {last_line}")


def weight_bytes(folders: list[Path]) -> int:
    return sum(path.stat().st_size for folder in folders for path in folder.glob("*.safetensors"))


def _report(body: dict[str, Any]) -> LoadReport:
    return LoadReport([LoadProblem(*row) for row in body["problems"]], body["parameters"], body["goldens"])


def _failed(folders: list[Path], message: str) -> list[LoadReport]:
    # One interpreter loads all models, so nobody knows which of them failed.
    return [LoadReport([LoadProblem(MODEL, message)])] * len(folders)


GOLDEN_BOUND = 1e-3
"""The tolerance for logits in fp32, which another processor adds up in another order."""
MEMORY, SECONDS = 400 << 20, 10
"""The limits for loading a model in transformers, beyond the needs of its weights."""


def loads_with_goldens(release: Release) -> Findings:
    """Checks that each model loads within limits, and that fixed inputs give the outputs of the build.

    Its chat template must round-trip, too.
    """
    if lacking := check_runner.missing_limits():
        raise Absent(f"not checked, because loading a model within limits needs {lacking}")
    for name in ("torch", "transformers"):  # the fresh interpreter would report their absence as a fault of the model
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
    # All models in one interpreter: importing transformers takes longer than loading a small model.
    models = release.model_folders
    size = weight_bytes(models)
    budget = Budget(MEMORY + 8 * size, SECONDS * len(models) + size // BYTES_PER_SECOND)
    findings = Findings()
    for model, report in zip(models, load_models(models, budget), strict=True):
        messages = [problem.text for problem in report.problems] or _compare_with_goldens(model, report)
        findings.problems += [f"{model.name}: {text}" for text in messages]
    return findings


def _compare_with_goldens(model: Path, report: LoadReport) -> list[str]:
    """Compares the outputs of tokenizer, template and weights with those of the build; logits within GOLDEN_BOUND."""
    golden = read_json(require_file(model, GOLDENS))
    problems = []
    for expected, actual in zip(golden["rows"], report.goldens["rows"], strict=True):
        for field in ("text", "ids", "greedy"):
            if expected[field] != actual[field]:
                problems.append(f"{GOLDENS}: the {field} of {expected['text']!r} are {actual[field]!r} here")
        if not all(abs(a - b) <= GOLDEN_BOUND for a, b in zip(expected["logits"], actual["logits"], strict=True)):
            problems.append(f"{GOLDENS}: logits after {expected['text']!r} differ by more than {GOLDEN_BOUND:g}")
    conversations = golden.get("conversations", []), report.goldens.get("conversations", [])
    for number, (expected, actual) in enumerate(zip(*conversations, strict=True), 1):
        problems += [
            f"{GOLDENS}: transformers gives conversation {number} another {field}"
            for field in ("text", "ids")
            if expected[field] != actual[field]
        ]
    return problems


def loads_as_exported(build: BuildContext) -> Findings:
    """Checks that every model loads completely, and has finite logits.

    It must have all its tensors and the number of parameters in its files.
    """
    findings = Findings(summary="every model loads, finite logits")
    for folder, report in build.load_reports.items():
        findings.problems += [f"{folder}: {text}" for text in report.of_part(MODEL)]
        if report.parameters not in (None, build.release.models[folder].parameters.total):
            findings.problems.append(
                f"{folder}: transformers counts {report.parameters} parameters, the file holds others"
            )
    return findings


def chat_template_round_trips(build: BuildContext) -> Findings:
    """Checks that the output of the chat template survives the tokenizer, with every marker as one token.

    The files must have the form that runtimes read.
    """
    findings = Findings(summary="text, tokens and markers survive")
    for folder, report in build.load_reports.items():
        texts = [*report.of_part(CHAT_TEMPLATE), *_form_problems(build.release.root / folder)]
        findings.problems += [f"{folder}: {text}" for text in texts]
    return findings


def _form_problems(model: Path) -> list[str]:
    """Lists what runtimes other than the present transformers would stumble over."""
    config = read_json(model / "tokenizer_config.json")
    template = (model / INFERENCE_FILE).read_text("utf-8")
    added_tokens = {token["content"]: token for token in read_json(model / "tokenizer.json")["added_tokens"]}
    faults = {
        "tokenizer_config.json lists extra_special_tokens, which transformers 4 refuses": isinstance(
            config.get("extra_special_tokens"), list
        ),
        "tokenizer_config.json has no model_max_length": not config.get("model_max_length"),
        f"{INFERENCE_FILE} has generation blocks, which runtimes refuse": "generation -%}" in template,
        "the markers of reasoning are special tokens, which default decoding drops": any(
            added_tokens[marker]["special"] for marker in (THINK_START, THINK_END) if marker in added_tokens
        ),
    }
    return [text for text, is_wrong in faults.items() if is_wrong]


ARGUMENTS = ("messages", "tools", "add_generation_prompt")


def chat_templates(release: Release) -> Findings:
    """Checks that both chat templates of each model render the recorded conversations as at the build.

    Sandboxed Jinja must render them as transformers did, and `tokenizers` must give the recorded token ids.
    """
    findings = Findings(compared=False, summary="Jinja and transformers render the recorded conversations alike")
    for model in release.model_folders:
        if not (model / GOLDENS).is_file():
            continue
        findings.compared = True
        rows = untrusted.read_json(model / GOLDENS, follow=True).get("conversations")
        if rows is None:
            findings.problems.append(f"{model.name}/{GOLDENS} records no conversations")
            continue
        for name in (INFERENCE_FILE, TRAINING_FILE):
            if (model / name).is_file():
                findings.problems += [f"{model.name}/{name} {text}" for text in _template_problems(model / name, rows)]
        findings.problems += [f"{model.name}: {text}" for text in _id_problems(model, rows, findings)]
    return findings


def _template_problems(path: Path, rows: list[dict[str, Any]]) -> Iterator[str]:
    """Yields the problems of a template with the recorded conversations."""
    try:
        compiled = compile_template(untrusted.read(path, formats.TEXT_BYTES, follow=True).decode())
        for number, row in enumerate(rows, 1):
            arguments = {argument: row[argument] for argument in ARGUMENTS}
            if row["enable_thinking"] is not None:
                # It is left out where it is null, so that the template takes its own default.
                arguments["enable_thinking"] = row["enable_thinking"]
            if compiled.render(**arguments) != row["text"]:
                yield f"renders conversation {number} of {GOLDENS} otherwise"
    except MemoryError:
        raise
    except Exception as error:  # a template can raise anything
        yield f"renders no conversation: {type(error).__name__}: {' '.join(str(error).split())}"


def _id_problems(model: Path, rows: list[dict[str, Any]], findings: Findings) -> list[str]:
    try:
        from tokenizers import Tokenizer
    except ImportError:
        reason = f"token ids of conversations: tokenizers is not installed; {installing('train')}"
        findings.skipped["token ids"] = reason
        return []
    content = untrusted.read(model / "tokenizer.json", formats.TEXT_BYTES, follow=True)
    tokenizer = Tokenizer.from_str(content.decode())
    return [
        f"tokenizer.json encodes conversation {number} of {GOLDENS} otherwise"
        for number, row in enumerate(rows, 1)
        if tokenizer.encode(row["text"], add_special_tokens=False).ids != row["ids"]
    ]


def compile_template(template: str) -> Any:
    """Compiles a template in the Jinja sandbox that transformers uses.

    It has the functions that chat templates may call. Raises what Jinja raises.
    """
    import jinja2
    import jinja2.ext
    import jinja2.sandbox

    class Generation(jinja2.ext.Extension):
        """The block that marks the text of the assistant."""

        tags = {"generation"}  # noqa: RUF012 - so the base class has it

        def parse(self, parser: Any) -> Any:
            number = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return jinja2.nodes.Scope(body, lineno=number)

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def to_json(value: Any, indent: int | None = None) -> str:  # Jinja's own escapes HTML and sorts
        return json.dumps(value, ensure_ascii=False, indent=indent)

    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    # The date of a template differs from day to day, so its form stands for it here.
    environment.globals |= {"raise_exception": refuse, "strftime_now": lambda form: form}
    return environment.from_string(template)
