"""The gates of a release: small functions from the assembled folder to what is wrong with it.

A gate returns a `Gate`; a failed one says what to do. The results are published in evidence/gates.json.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from release.assembly import attest, metrics, secret_scan
from release.assembly.assemble import to_json, unexplained
from release.cards import croissant, plot, render
from release.checks import registry
from release.checks.gate_context import BEYOND, Context, Gate
from release.checks.post_gates import post_training
from release.layout import GATES, GATES_STATED, ORIGINS, SUMS, WITHOUT_ORDER, models_of, phases_of, when
from release.repositories import files_below
from stages import export
from stages.evaluation.settings import SURE

ALL = "over all"
RELOAD_SECONDS = 3600.0


def export_parity(c: Context) -> Gate:
    deltas = {}
    for path in sorted((c.folder / "evidence/parity").glob("*.json")):
        parity = metrics.read_json(path)
        deltas[path.stem] = parity["max_abs_logit_delta"]
        if not parity["max_abs_logit_delta"] < parity["tolerance"]:
            text = (
                f"export-{path.stem} differs by {parity['max_abs_logit_delta']:.3g}, tolerance {parity['tolerance']:g}"
            )
            return Gate("export_parity", False, f"{text}; the export is not the trained model, do not publish it")
    if missing := [name for name in models_of(c.release["nodes"]) if name not in deltas]:
        return Gate("export_parity", False, f"parity is not known for {missing[0]}; run its export again")
    return Gate("export_parity", True, ", ".join(f"{k} max |Δ| {deltas[k]:.3g}" for k in sorted(deltas, key=when)))


def reload(c: Context) -> list[Gate]:
    """Every model loads in a fresh interpreter with plain transformers, and its chat template round-trips."""
    problems: list[str] = []
    folders = list(c.models)
    loaded = c.loaded or run_reload([c.folder / name for name in folders])
    for folder, report in zip(folders, loaded, strict=True):
        problems += [f"{folder}: {problem}" for problem in report["problems"]]
        if report["parameters"] not in (None, c.models[folder]["parameters"]["total"]):
            problems.append(f"{folder}: transformers counts {report['parameters']} parameters, the file holds others")
    template_problems = [
        text for text in problems if "template" in text or "token" in text or "generation prompt" in text
    ]
    loading_problems = [text for text in problems if text not in template_problems]
    advice = "; fix the export or tokenizer stage and run again"
    return [
        Gate(
            "reload_in_transformers",
            not loading_problems,
            (loading_problems[0] + advice) if loading_problems else "every model loads, finite logits",
        ),
        Gate(
            "chat_template_round_trip",
            not template_problems,
            (template_problems[0] + advice) if template_problems else "text, tokens and markers survive",
        ),
    ]


def run_reload(folders: list[Path], limits: tuple[int, int] | None = None) -> list[dict[str, Any]]:
    """The judgment of `load_check.py` on each model folder, from one fresh interpreter.

    limits: bytes of memory and seconds of processor time that a stranger's models may take once the libraries are
    loaded.
    """
    command = [sys.executable, "-P", str(Path(export.__file__).with_name("load_check.py"))]
    command += [] if limits is None else [f"--memory={limits[0]}", f"--seconds={limits[1]}"]
    command += [str(folder.resolve()) for folder in folders]
    try:
        process = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=RELOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        timeout_message = f"loading did not end within {RELOAD_SECONDS:.0f} s"
        return [{"problems": [timeout_message], "parameters": None, "goldens": {}}] * len(folders)
    reports = [
        json.loads(line.removeprefix("RELOAD ")) for line in process.stdout.splitlines() if line.startswith("RELOAD ")
    ]
    if len(reports) != len(folders):
        last_line = (process.stderr.strip().splitlines() or ["no message"])[-1]
        if limits is not None and process.returncode < 0:
            last_line = f"it takes more than {limits[0] >> 20} MB of memory or {limits[1]} s of processor time"
        return [{"problems": [f"transformers cannot load it: {last_line}"], "parameters": None, "goldens": {}}] * len(
            folders
        )
    return reports


def ledger_closed(c: Context) -> Gate:
    """Every file comes from an artifact with a statement, or is the build's own and listed as such."""
    origins = metrics.read_json(c.folder / ORIGINS)
    paths = files_below(c.folder)
    problems = [f"{path} has no origin" for path in unexplained(c.folder, origins, paths)]
    problems += registry.manifests(c.folder) + registry.origins(c.folder) + registry.statements(c.folder)
    if problems:
        return Gate("ledger_closed", False, f"{problems[0]}; run the stage again so that it is stated, then build")
    copies = sum("artifact" in origin for origin in origins.values())
    return Gate(
        "ledger_closed",
        True,
        f"{copies} files copied from stated artifacts, {len(origins) - copies} generated and listed",
    )


def licenses_known(c: Context) -> Gate:
    unlicensed = sorted(
        n
        for n, row in c.data["sources"].items()
        if any((x or "").lower() in registry.UNKNOWN_LICENSES for x in row["licenses"])
    )
    if unlicensed:
        return Gate(
            "licenses_known",
            False,
            f"source {unlicensed[0]} has documents of unknown license; name it in the data recipe",
        )
    licenses = sorted({license for row in c.data["sources"].values() for license in row["licenses"]})
    return Gate("licenses_known", True, f"every document has a license: {', '.join(licenses)}")


def counts_balance(c: Context) -> Gate:
    problems = registry.dispositions(c.folder / "dataset")
    total = sum(row["documents_in"] for row in c.data["sources"].values())
    kept = sum(row["kept"] for row in c.data["sources"].values())
    detail = f"{total} documents in = {kept} kept + {total - kept} removed"
    return Gate("counts_balance", not problems, f"{problems[0]}; curation is at fault" if problems else detail)


def checkpoints_and_order(c: Context) -> Gate:
    rows = metrics.checkpoint_facts(c.folder / "checkpoints")
    for phase in phases_of(c.release["nodes"]):
        phase_rows = [row for row in rows if row["phase"] == phase]
        if not phase_rows:
            return Gate(
                "checkpoints_and_order", False, f"no checkpoint of {phase}; set {phase}.release_checkpoint_interval"
            )
        if phase in WITHOUT_ORDER:
            continue
        if phase not in c.data["order"]:
            return Gate("checkpoints_and_order", False, f"no order index of {phase}; run its order stage")
        steps, parts = c.data["order"][phase]["steps"], c.data["order"][phase]["parts"]
        if parts[0]["first_step"] != 1:
            text = f"the order of {phase} begins with step {parts[0]['first_step']}"
            return Gate("checkpoints_and_order", False, f"{text}; the order that the checkpoint followed is missing")
        if phase_rows[-1]["step"] != steps:
            text = f"the last checkpoint of {phase} is step {phase_rows[-1]['step']}, the order has {steps} steps"
            return Gate("checkpoints_and_order", False, f"{text}; finish the training stage")
    return Gate("checkpoints_and_order", True, f"{len(rows)} checkpoints; order of {', '.join(c.data['order'])}")


def learning(c: Context) -> list[Gate]:
    """Pre-training lowers bits per byte; mid-training raises accuracy and loses no more bits than the recipe allows.

    Bits per byte are asked for all held-out text together, and for each source, lest a large one hide a small one:
    pre-training answers for the sources that it read, mid-training for all.
    """
    init, base, mid = (c.data["evaluation"][phase] for phase in ("init", "base", "mid"))

    def accuracy(phase: metrics.Facts) -> float:
        return float(phase["accuracy_all"]["value"])

    pretrain_sources = {ALL, *_sources_read(c, "pretrain")}
    pretrain_changes = _changes(_bits(init), _bits(base), pretrain_sources)
    sources_so_far = pretrain_sources | _sources_read(c, "midtrain")
    midtrain_changes = _changes(_bits(base), _bits(mid), sources_so_far)
    significant_rises = _significant_rises(midtrain_changes, base, mid)
    gain, needed = accuracy(mid) - accuracy(base), c.evaluation["min_accuracy_gain"]
    allowed = c.evaluation["bits_per_byte_tolerance"]
    raised, errors = gain > needed, [phase["accuracy_all"]["se"] for phase in (base, mid)]
    details = [
        f"bits per byte {_changes_text(pretrain_changes)}",
        f"accuracy {accuracy(base):.3f} ± {errors[0]:.3f} → {accuracy(mid):.3f} ± {errors[1]:.3f}, "
        f"a gain of more than {needed:g} is demanded",
        f"bits per byte {_changes_text(midtrain_changes)}, at most {allowed:g} may be lost on each{BEYOND}",
    ]
    names = ("pretraining_lowers_bits_per_byte", "midtraining_raises_accuracy", "midtraining_keeps_bits_per_byte")
    lowered, no_loss = max(_rises(pretrain_changes)) < 0, max(significant_rises) <= allowed
    passed, sections = (lowered, raised, no_loss), ("pretrain", "midtrain", "midtrain")
    return [
        Gate(name, ok, text if ok else f"{text}; change the recipe's {section} section and run again")
        for name, ok, text, section in zip(names, passed, details, sections, strict=True)
    ]


def _sources_read(c: Context, phase: str) -> set[str]:
    """The sources that a phase read."""
    parts = c.data["order"].get(phase, {}).get("parts", ())
    return {source for part in parts for source in part["by_source"]}


def long_context(c: Context) -> list[Gate]:
    """Longer texts cost no more bits per byte on short ones than the recipe allows, and passkeys are found in them.

    Asked of a release with long-context phases only; of passkeys only if the models were asked for any.
    """
    scores = c.data["evaluation"]
    long = [model for model in scores if model.startswith("long")]
    if not long:
        return []
    allowed, details, worst = c.evaluation["bits_per_byte_tolerance"], [], -math.inf
    for model in long:
        sources = {ALL}.union(*(_sources_read(c, phase) for phase in c.data["order"] if when(phase) < when("sft")))
        bits_changes = _changes(_bits(scores["mid"]), _bits(scores[model]), sources)
        details.append(f"{model}: bits per byte {_changes_text(bits_changes)}")
        worst = max(worst, *_significant_rises(bits_changes, scores["mid"], scores[model]))
        # of one text both models see as much up to mid-training's context, where bits per byte let the longer see more
        short_losses = [_short_position_losses(scores[name].get("loss_by_position", {}), c) for name in ("mid", model)]
        if any(short_losses):
            changes = _changes(short_losses[0], short_losses[1], {*short_losses[0], *short_losses[1]})
            details.append(f"bits per token by position {_changes_text(changes)}")
            worst = max(worst, *_rises(changes))
    text, ok = f"{'; '.join(details)}; at most {allowed:g} may be lost on each{BEYOND}", worst <= allowed
    advice = "; change the recipe's long_context section and run again"
    gates = [Gate("longcontext_keeps_bits_per_byte", ok, text if ok else text + advice)]
    if any("passkey" in scores[model] for model in ("mid", long[-1])):
        ok, text = _passkeys(c, scores["mid"].get("passkey", {}), scores[long[-1]].get("passkey", {}))
        gates.append(Gate("longcontext_finds_passkeys", ok, text if ok else text + advice))
    return gates


def _short_position_losses(by_position: metrics.Facts, c: Context) -> dict[str, float]:
    """The loss at positions within mid-training's context."""
    context = metrics.context_of(metrics.checkpoint_facts(c.folder / "checkpoints"), "midtrain")
    return {name: float(row["value"]) for name, row in by_position.items() if int(name.split("-")[1]) < context}


def _passkeys(c: Context, before: metrics.Facts, after: metrics.Facts) -> tuple[bool, str]:
    """Whether the last model finds more keys than the mid-trained one in texts that are too long for that one."""
    context = metrics.context_of(metrics.checkpoint_facts(c.folder / "checkpoints"), "midtrain")
    lengths = [length for length in sorted({*before, *after}, key=int) if int(length) > context]
    if not lengths:
        return False, f"no passkey was asked for beyond the {context} tokens of mid-training"
    if missing := [length for length in lengths if length not in before or length not in after]:
        return False, f"passkeys of {missing[0]} tokens were asked of one model only"
    recall = [sum(rows[k]["value"] * rows[k]["n"] for k in lengths) / sum(rows[k]["n"] for k in lengths)
             for rows in (before, after)]  # fmt: skip
    text = f"keys found in more than {context} tokens: {recall[0]:.3f} → {recall[1]:.3f} ({', '.join(lengths)} tokens)"
    return recall[1] > recall[0], text


def _bits(scores: metrics.Facts) -> dict[str, float]:
    """Bits per byte over all held-out text, and of each source."""
    by_source = {name: float(row["value"]) for name, row in sorted(scores["bits_per_byte"].items())}
    return {ALL: float(scores["bits_per_byte_all"]["value"]), **by_source}


def _changes(before: dict[str, float], after: dict[str, float], names: set[str]) -> dict[str, tuple[float, float]]:
    """Bits per byte before and after of each name that is held out, the greatest rise first."""
    unknown = float("nan")
    pairs = {name: (before.get(name, unknown), after.get(name, unknown)) for name in names & {*before, *after}}
    return dict(sorted(pairs.items(), key=lambda pair: (-_rise(pair[1]), pair[0])))


def _rise(pair: tuple[float, float]) -> float:
    """How much worse; a value that one of the phases lacks, or that is no number, is as bad as can be."""
    rise = pair[1] - pair[0]
    return rise if math.isfinite(rise) else math.inf


def _significant_rises(
    changes: dict[str, tuple[float, float]], before: metrics.Facts, after: metrics.Facts
) -> list[float]:
    """The part of each rise in bits per byte that is no chance of the held-out documents: a small source has few of
    them, and one bound for all would ask of it what its figures cannot tell."""
    rises = []
    for name, pair in changes.items():
        rows = [s["bits_per_byte_all"] if name == ALL else s["bits_per_byte"].get(name) for s in (before, after)]
        chance = SURE * math.hypot(*(row["se"] for row in rows)) if all(rows) else 0.0
        rises.append(_rise(pair) - chance)
    return rises


def _rises(changes: dict[str, tuple[float, float]]) -> list[float]:
    return [_rise(pair) for pair in changes.values()]


def _changes_text(changes: dict[str, tuple[float, float]]) -> str:
    return ", ".join(f"{name} {before:.4f} → {after:.4f}" for name, (before, after) in changes.items())


def cards(c: Context) -> Gate:
    """Rendering the cards again from the published files gives the same bytes, and their scores are as measured."""
    problems = registry.cards(c.folder).problems
    for folder, model in c.models.items():
        if (c.folder / folder / "README.md").read_text() != render.model_card(
            folder, c.release, model, c.data, c.interventions, c.costs
        ):
            problems.append(f"{folder}/README.md is not what the artifacts give")
        if (c.folder / folder / plot.NAME).read_bytes() != plot.draw(c.folder / folder):
            problems.append(f"{folder}/{plot.NAME} is not what the logs of training give")
    if (c.folder / "dataset/README.md").read_text() != render.data_card(c.release, c.data, c.canary):
        problems.append("dataset/README.md is not what the artifacts give")
    return Gate(
        "card_numbers",
        not problems,
        f"{problems[0]}; build again" if problems else "every table and score equals the artifacts'",
    )


def described(c: Context) -> Gate:
    """mlcroissant finds no error in the description of the data, and loads records by it."""
    problems = croissant.problems(c.folder / "dataset" / croissant.NAME)
    detail = f"{problems[0]}; fix release/cards/croissant.py" if problems else "croissant.json: no error, records load"
    return Gate("croissant", not problems, detail)


def no_secrets(c: Context) -> Gate:
    paths = [p for p in files_below(c.folder) if Path(p).name != SUMS]
    hits = secret_scan.scan(c.folder, paths, c.machine)
    return Gate(
        "no_secrets",
        not hits,
        f"{hits[0]}; remove it at its source and run again" if hits else f"{len(paths)} files searched",
    )


def run_all(c: Context) -> list[Gate]:
    return [
        export_parity(c), *reload(c), ledger_closed(c), licenses_known(c), counts_balance(c), checkpoints_and_order(c),
        *learning(c), *long_context(c), *post_training(c), cards(c), described(c), no_secrets(c),
    ]  # fmt: skip


def write(folder: Path, nodes: dict[str, dict[str, str]], gates: list[Gate]) -> None:
    """The results as a table, and as a statement about all artifacts. nodes: as in evidence/release.json."""
    rows = {gate.name: {key: value for key, value in asdict(gate).items() if key != "name"} for gate in gates}
    (folder / GATES).write_text(json.dumps(rows, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    stated = attest.gates(nodes, {gate.name: gate.ok for gate in gates})
    (folder / GATES_STATED).write_bytes(to_json(stated))
