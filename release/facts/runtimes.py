"""Runs the final model and its variants in other programs, and compares tokens and log-probabilities.

The result is `evidence/runtimes.json`. Each program has an interpreter of its own, which an environment variable names;
`make test-runtimes` makes them. The fixed inputs of goldens.json are compared: token ids of the texts, greedy
continuations, and the log-probability of each token. The reference is transformers here, in fp32, on the weights as a
variant stores them. So a difference is that of the program, and not of the rounding of weights, which `loss.json`
states.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from release import scratch
from release.facts.model_facts import EXPERTS
from release.facts.published_tables import read_json
from release.facts.variant_facts import base_of
from release.layout import GOLDENS, LOSS, MODEL
from release.repositories import variant_folders
from stages.export import runtimes as scripts
from stages.export.variants.registry import DISTILLED, VARIANTS, Variant, Writer

SECONDS = 3600
"""The limit for one run."""
VLLM_HEAD = 32
"""vLLM's kernels for the CPU know heads of this size and larger ones."""
VLLM_LATENT = (512, 64)
"""For latent attention, they know this latent and this rotary part (its `CPUMLABackend`)."""
ORIGINAL = Variant("safetensors", "", 0, "", "")
"""The final model among the variants."""


@dataclass(frozen=True)
class Bound:
    """The limits of a comparison.

    Attributes:
        mean: Of the mean difference of log-probabilities.
        largest: Of the largest difference.
        other_greedy: Of the share of greedy continuations that are not the reference's.
    """

    mean: float
    largest: float
    other_greedy: float


EXACT = Bound(1e-4, 1e-3, 0.0)
"""A program that computes in fp32 on weights that it does not round."""
ROUNDED = Bound(0.2, 5.0, 1.0)
"""One that rounds activations to 8 bits. On near ties a router then takes other experts, and a greedy continuation goes
another way; weights at wrong places are several nats off."""
BOUNDS = {"F16": Bound(0.01, 0.1, 0.25)}
"""By encoding of a variant, of a program that computes in it."""


class ProgramRun(TypedDict):
    """The run of one program on one folder."""

    folder: str
    """the folder"""
    runtime: str
    """the runtime that read it"""
    status: Literal["reference", "passed", "failed", "skipped"]
    """the result; `reference` for the runtime that computed `goldens.json`, which the gates on loading judge"""
    reason: NotRequired[str]
    """why it was skipped or failed"""
    version: NotRequired[str]
    """package and version"""
    rows: NotRequired[int]
    """texts of `goldens.json`"""
    positions: NotRequired[int]
    """compared log-probabilities: of every token of text and continuation but the first"""
    same_ids: NotRequired[int]
    """texts with equal token ids"""
    conversations: NotRequired[int]
    """rendered conversations of `goldens.json`"""
    same_conversations: NotRequired[int]
    """conversations with equal token ids"""
    same_greedy: NotRequired[int]
    """texts with equal greedy continuations"""
    mean_difference: NotRequired[float]
    """mean absolute difference of the log-probabilities, in nats"""
    largest_difference: NotRequired[float]
    """largest absolute difference, in nats"""
    bound: NotRequired[dict[str, float]]
    """the allowed values: `mean`, `largest`, and `other_greedy`, a share of `rows`"""


@dataclass(frozen=True)
class Runtime:
    """A program that loads models.

    Attributes:
        script: The file in stages/export/runtimes.
        variable: The environment variable that names its interpreter; None for this one.
        writers: Of the variants that it reads.
        lack: Returns what it lacks for a variant of a model, from its config.json, in one sentence.
        arguments: Returns the arguments after the path.
    """

    script: str
    variable: str | None
    writers: tuple[Writer, ...]
    lack: Callable[[Variant, Mapping[str, Any]], str] = lambda variant, config: ""
    arguments: Callable[[Variant], Sequence[str]] = lambda variant: ()


def _vllm_lacks(variant: Variant, config: Mapping[str, Any]) -> str:
    if "kv_lora_rank" in config:
        latent = config["kv_lora_rank"], config["qk_rope_head_dim"]
        if latent != VLLM_LATENT:
            sizes = [f"{keys} + {rotary}" for keys, rotary in (VLLM_LATENT, latent)]
            return f"its kernels for the CPU know latents of {sizes[0]}, and these are {sizes[1]}"
    elif config["head_dim"] < VLLM_HEAD:
        return f"its kernels for the CPU know heads of {VLLM_HEAD} and larger, and these have {config['head_dim']}"
    if not any(key in config for key in EXPERTS):
        return ""
    if variant.encoding == "fp8":
        return "its FP8 experts for the CPU have a scale for each block of 128 weights, and these have one a channel"
    return ""


def _vllm_dtype(variant: Variant) -> list[str]:
    return ["bfloat16" if variant.writer == "compressed-tensors" else "float32"]


def _peft_lacks() -> str:
    return "" if importlib.util.find_spec("peft") else "it is not installed here; pip install peft"


REFERENCE = "transformers 5"
RUNTIMES = {
    REFERENCE: Runtime("transformers_run.py", None, ("safetensors",)),
    "transformers 4": Runtime("transformers_run.py", "ATOM_TRANSFORMERS4_PYTHON", ("safetensors",)),
    "vLLM": Runtime("vllm_run.py", "ATOM_VLLM_PYTHON", ("safetensors", "compressed-tensors"), _vllm_lacks, _vllm_dtype),
    "PEFT": Runtime("transformers_run.py", None, ("peft",), lambda variant, config: _peft_lacks()),
    "llama.cpp": Runtime("llama_cpp_run.py", "ATOM_LLAMA_CPP_PYTHON", ("gguf",)),
}


def bound_of(runtime: str, variant: Variant) -> Bound:
    """Returns the bound of a run."""
    if runtime not in ("llama.cpp", "vLLM") or variant.encoding in ("", "bfloat16"):
        return EXACT
    return BOUNDS.get(variant.encoding, ROUNDED)


def compare_all(release: Path, progress: Callable[[str], None] = lambda text: None) -> list[ProgramRun]:
    """Runs all programs on the final model and its variants, of a release that has their files and its goldens.

    A program that is not here is a run that was skipped, with the reason.
    """
    model, runs = release / MODEL, []
    goldens = read_json(model / GOLDENS)
    rows, conversations = goldens["rows"], goldens.get("conversations", [])
    for name in (MODEL, *variant_folders(release)):
        folder = release / name
        variant = ORIGINAL if name == MODEL else VARIANTS[read_json(folder / LOSS)["variant"]]
        readers = [runtime for runtime, program in RUNTIMES.items() if variant.writer in program.writers]
        of_sizes = folder if variant is VARIANTS[DISTILLED] else model
        with scratch.folder() as place:
            reference: Expected | None = None
            for runtime in readers:
                if runtime == REFERENCE and name == MODEL:
                    stated = f"transformers {version('transformers')}"
                    runs.append(ProgramRun(folder=name, runtime=runtime, status="reference", version=stated))
                    continue
                if reason := _absence(RUNTIMES[runtime], variant, read_json(of_sizes / "config.json")):
                    runs.append(ProgramRun(folder=name, runtime=runtime, status="skipped", reason=reason))
                    continue
                progress(f"{name} in {runtime}")
                try:
                    # Once for all programs, and only if one of them runs.
                    reference = reference or _reference(model, folder, place / "dequantized", rows)
                    runs.append(_compare(name, folder, runtime, variant, reference, conversations))
                except Failed as error:
                    runs.append(ProgramRun(folder=name, runtime=runtime, status="failed", reason=str(error)))
    return runs


def _absence(runtime: Runtime, variant: Variant, config: Mapping[str, Any]) -> str:
    """Returns a sentence why a program does not run; "" if it does."""
    if lack := runtime.lack(variant, config):
        return lack
    if runtime.variable and not os.environ.get(runtime.variable):
        return f"it is not installed here; {runtime.variable} names its interpreter"
    return ""


class Failed(Exception):
    """The last line of a program that gave no answer."""


Answers = dict[str, Any]
Expected = tuple[list[dict[str, Any]], list[list[float]]]
"""Rows of a request, with the continuations that are expected; log-probabilities by row."""


def _reference(model: Path, folder: Path, place: Path, rows: Sequence[Mapping[str, Any]]) -> Expected:
    """Returns the answers of transformers here with the weights of a variant. Raises Failed if it cannot load them."""
    request = [{name: row[name] for name in ("text", "ids", "greedy")} for row in rows]
    if folder != model:
        from stages.export.variants import conversion

        variant = read_json(folder / LOSS)["variant"]
        base = base_of(folder.parent, folder) if VARIANTS[variant].writer == "peft" else None
        conversion.write_dequantized(variant, folder if variant == DISTILLED else model, folder, place, base)
        # The recorded continuations are those of the final model; a variant may give others, so they are drawn again.
        request = [{"text": row["text"], "ids": row["ids"], "draw": len(row["greedy"])} for row in rows]
    read = _run(RUNTIMES[REFERENCE], model if folder == model else place, ORIGINAL, request)["rows"]
    request = [{**row, "greedy": answer["greedy"]} for row, answer in zip(rows, read, strict=True)]
    return request, [row["logprobs"] for row in read]


def _compare(
    name: str,
    folder: Path,
    runtime: str,
    variant: Variant,
    reference: Expected,
    conversations: Sequence[Mapping[str, Any]] = (),
) -> ProgramRun:
    """Raises Failed if the program gives no answer."""
    request, expected = reference
    answer = _run(RUNTIMES[runtime], folder, variant, request, [row["text"] for row in conversations])
    answers = answer["rows"]
    differences = [
        abs(a - b)
        for row, values in zip(answers, expected, strict=True)
        for a, b in zip(row["logprobs"], values, strict=True)
    ]
    # The bound is published with the figures, so that a later reader needs no table of this version.
    bound = bound_of(runtime, variant)
    run = ProgramRun(
        folder=name,
        runtime=runtime,
        status="passed",
        version=f"{answer['program']} {answer['version']}",
        rows=len(request),
        positions=len(differences),
        same_ids=sum(a["ids"] == b["ids"] for a, b in zip(answers, request, strict=True)),
        conversations=len(conversations),
        same_conversations=sum(a == b["ids"] for a, b in zip(answer["texts"], conversations, strict=True)),
        same_greedy=sum(a["greedy"] == b["greedy"] for a, b in zip(answers, request, strict=True)),
        mean_difference=round(sum(differences) / len(differences), 6),
        largest_difference=round(max(differences), 6),
        bound={"mean": bound.mean, "largest": bound.largest, "other_greedy": bound.other_greedy},
    )
    if problem := problem_of(run):
        run["status"], run["reason"] = "failed", problem
    return run


def problem_of(run: ProgramRun) -> str:
    """Returns a sentence on what a run has beyond its bound; "" if it keeps it."""
    bound, rows = run["bound"], run["rows"]
    if run["same_ids"] != rows:
        return f"{rows - run['same_ids']} of {rows} texts have other token ids"
    if (others := run["conversations"] - run["same_conversations"]) > 0:
        return f"{others} of {run['conversations']} conversations have other token ids"
    if rows - run["same_greedy"] > bound["other_greedy"] * rows:
        return f"{rows - run['same_greedy']} of {rows} greedy continuations are others"
    for kind, difference in (("mean", run["mean_difference"]), ("largest", run["largest_difference"])):
        if not difference <= bound[kind]:  # not a number fails too
            return f"the {kind} difference of log-probabilities is {difference:.3g}, allowed {bound[kind]:g}"
    return ""


def _run(
    runtime: Runtime, folder: Path, variant: Variant, rows: Sequence[Mapping[str, Any]], texts: Sequence[str] = ()
) -> Answers:
    """Returns the answer of a program. Raises Failed."""
    # Programs such as vLLM need packages that exclude ours, so each has an interpreter of its own.
    python = os.environ[runtime.variable] if runtime.variable else sys.executable
    # llama.cpp opens one file, and the others a folder.
    subject = next(iter(sorted(folder.glob("*.gguf"))), folder)
    script = Path(scripts.__path__[0]) / runtime.script
    command = [python, "-P", str(script), str(subject.resolve()), *runtime.arguments(variant)]
    if variant.writer == "peft":
        command.append(str(base_of(folder.parent, folder).resolve()))
    try:
        process = subprocess.run(
            command,
            input=json.dumps({"rows": rows, "texts": texts}),
            capture_output=True,
            text=True,
            timeout=SECONDS,
            env=_environment(),
        )
    except subprocess.TimeoutExpired:
        raise Failed(f"{python} gave no answer within {SECONDS} s; give it an idle machine, and build again") from None
    except OSError as error:
        setting = f"{runtime.variable} = {python}" if runtime.variable else python
        raise Failed(f"{setting} does not run ({error.strerror}); name a Python interpreter") from None
    # Programs print messages of their own, so the line with the answer is marked.
    lines = [line.removeprefix("RUN ") for line in process.stdout.splitlines() if line.startswith("RUN ")]
    if process.returncode or not lines:
        last = (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
        raise Failed(" ".join(last.split())[:300])
    answer: Answers = json.loads(lines[-1])
    return answer


def _environment() -> dict[str, str]:
    """Returns the environment of a program: this process's, without its modules, network and threads.

    vLLM's engine runs in the program's own process: the error of another one would only be "Engine core initialization
    failed".
    """
    ours = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    vllm = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    return {**ours, **offline, **vllm, "OMP_NUM_THREADS": "1"}
