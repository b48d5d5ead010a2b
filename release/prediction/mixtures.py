"""`atom mix`: proposes the weights of the sources of pre-training, from proxies that were run with drawn weights.

A proxy is a copy of a small recipe with another `pretrain.mix`, in `$ATOM_HOME/mixtures/`; its run is like any other.
Weights are drawn from a Dirichlet distribution around the natural ones, those of the supply. As in RegMix
(arXiv:2407.01492), these are flattened by a square root, so that small sources are seen. The draws follow from the seed
of the small recipe and from its sources with their supply, which `atom pin` changes: more runs keep those before, and
one set of proxies serves several targets.

RegMix took 512 models of a million parameters, and found that ranks of mixes held at a thousand times the size. Olmix
(arXiv:2602.12237) found a rank correlation with models of a billion parameters of 0.73 for proxies of a million, and of
0.89 or more from 15 million on, with runs in proportion to the sources.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from pipeline.core import atomic_files
from pipeline.core.errors import AtomError
from pipeline.core.progress import duration, human
from pipeline.core.store import Store
from pipeline.core.yaml_text import parse_yaml
from pipeline.graph import dag
from pipeline.graph import recipe as recipes
from pipeline.graph.dag import Graph
from release.prediction.sealing import EVALUATION, NODE, pretraining, sealed
from stages.evaluation import mixing_law
from stages.evaluation.mixing_law import Array, Fit, Law
from stages.evaluation.scaling_laws import LEVEL, band

# Version of the form of mix.json.
SCHEMA = 1
# Bytes of a token where none were counted; small vocabularies have fewer, and then more tokens.
BYTES_PER_TOKEN = 4.0
# The part of each draw that is divided evenly, so that no proxy lacks a source.
EVEN = 0.01
# The least rank correlation of proxies that are left out at which the law is a base for a choice.
RANKS = 0.7
# Parameters from which on ranks of mixes carry over (Olmix, above).
CARRIES_OVER = 15_000_000
# Places of a Pareto curve.
CURVE = 11


class Supply(NamedTuple):
    """The training tokens of a source.

    Attributes:
        tokens: Their number; None if it is unknown.
        basis: What it is from: `counted` after curation, `probed` or `stated` as `atom plan` shows, `expected` by the
            data recipe before curation, or `unknown`.
    """

    tokens: float | None
    basis: str


def supply_of(graph: Graph, store: Store | None = None) -> dict[str, Supply]:
    """Returns the supply of each source of a recipe's data: counted if its tokens are in the store."""
    data: Any = graph.recipe.data
    if store is not None and store.sealed(key := graph.nodes["tokenize"].key):
        counted = store.open(key).json("meta.json")["tokens"]["train"]
        return {source.name: Supply(float(counted.get(source.name, 0)), "counted") for source in data.sources}
    supply = {source.name: Supply(None, "unknown") for source in data.sources}
    for source in (source for source in data.sources if source.expected):
        tokens = source.expected.bytes / BYTES_PER_TOKEN
        supply[source.name] = Supply(tokens * (1 - data.heldout_fraction_of(source)), "expected")
    # Documents that are drawn may be repeated, so what `plan` computes of them is no limit.
    rows = (row for row in dag.supply(graph) if row.tokens is not None and row.basis != "computed")
    return supply | {row.source: Supply(row.tokens, row.basis) for row in rows}


def mix_of(graph: Graph) -> dict[str, float]:
    """Returns the weights of a recipe's pre-training, by source."""
    return dict(vars(pretraining(graph).config)["phase"].mix)


def natural_mix(supply: Mapping[str, Supply], sources: Sequence[str]) -> dict[str, float] | None:
    """Returns weights in proportion to the supply; None if that of a source is unknown, or none has any."""
    tokens = np.asarray([supply[source].tokens for source in sources], float)
    # NaN, of an unknown supply, is not above 0 either.
    return _mix(sources, tokens / tokens.sum()) if tokens.sum() > 0 else None


def _mix(sources: Sequence[str], weights: Array) -> dict[str, float]:
    """Returns rounded weights by source, without those of 0, which a recipe cannot have."""
    exact = mixing_law.rounded(weights, np.ones(len(sources)))
    return {source: float(weight) for source, weight in zip(sources, exact, strict=True) if weight}


def draw(own: Mapping[str, float], natural: Mapping[str, float] | None, runs: int, seed: int) -> list[dict[str, float]]:
    """Returns the weights of each proxy. Those of one place are the same for any number of runs.

    If the sources have equal supplies, all mixes are equally likely.

    Args:
        own: The weights of the small recipe, which the first proxy has.
        natural: Those of the supply, which the second one has. None: unknown, and draws are around `own`.
        runs: Number of proxies.
        seed: Seed of the small recipe.
    """
    sources, generator = list(own), np.random.default_rng(seed)
    center = np.sqrt([(natural or own).get(source, 0.0) for source in sources])
    mixes = [dict(mix) for mix in (own, natural) if mix]
    while len(mixes) < runs:
        # A distribution needs parameters above 0, also for a source without supply.
        drawn = generator.dirichlet(np.maximum(len(sources) * center / center.sum(), 1e-3))
        mixes.append(_mix(sources, (1 - EVEN) * drawn + EVEN / len(sources)))
    return mixes


def proxies_of(graph: Graph, runs: int, store: Store, without_data: bool = False) -> list[Graph]:
    """Writes the recipes of the proxies of a small recipe, and returns their graphs.

    Args:
        graph: The small recipe.
        runs: Number of proxies.
        store: The home.
        without_data: See `dag.compose`.

    Raises:
        AtomError: If the runs are too few for a law.
    """
    own, name = mix_of(graph), graph.recipe.config.name
    if runs < (least := len(own) + mixing_law.SPARE):
        raise AtomError(f"--runs {runs}: the law of the {len(own)} sources of {name} needs at least {least} runs")
    mixes = draw(own, natural_mix(supply_of(graph), list(own)), runs, graph.recipe.config.seed)
    return [dag.compose(_derived(graph.recipe, n, mix, store), store, without_data) for n, mix in enumerate(mixes, 1)]


def _derived(recipe: recipes.Recipe, number: int, mix: Mapping[str, float], store: Store) -> recipes.Recipe:
    """Writes a recipe with another name and mix into the folder of proxies. Its paths lead to the same files."""
    own, base, title = f"recipes/{recipe.path.name}", recipe.path.parent, recipe.config.name
    folder, name = (store.home / "mixtures" / title).resolve(), f"{title[:50]}-mix-{number:03}"
    raw: Any = parse_yaml(recipe.files[own], recipe.title)
    data = os.path.relpath(recipes.find(raw["data"], "data_recipes", "data recipe", base).resolve(), folder)
    raw |= {"name": name, "data": data, "pretrain": {**raw["pretrain"], "mix": dict(mix)}}
    task_sets = (raw["evaluation"].get("harness") or {}).get("folders", ())
    for section, field in (raw.get("start_from") or {}, "folder"), *((tasks, "path") for tasks in task_sets):
        if section.get(field):
            section[field] = os.path.relpath((base / section[field]).resolve(), folder)
    content = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).encode()
    for file, body in {**recipe.extensions.files(), f"{name}.yaml": content}.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(folder / file, body)
    files = {file: body for file, body in recipe.files.items() if file != own} | {f"recipes/{name}.yaml": content}
    return replace(recipe, path=folder / f"{name}.yaml", config=recipes.schema().model_validate(raw), files=files)


def run_all(files: Sequence[Path], jobs: int, cluster: str) -> None:
    """Runs recipes up to the evaluation of the base model, each as `atom run`, and prints the progress on stderr.

    After a failure or Ctrl-C, no further run begins. Ctrl-C of a terminal reaches the runs, which stop cleanly.

    Args:
        files: The recipes. What a run prints is appended to a file beside its recipe.
        jobs: Runs at a time.
        cluster: The cluster profile.

    Raises:
        AtomError: If a run failed, with its last line.
        KeyboardInterrupt: After the runs have stopped.
    """

    def run(file: Path) -> int:
        command = [sys.executable, "-m", "pipeline.cli", "run", str(file), "--until", EVALUATION, "--cluster", cluster]
        with open(file.with_suffix(".log"), "ab") as log:
            return subprocess.run(command, stdout=log, stderr=log, check=False).returncode

    begin, pool = time.monotonic(), ThreadPoolExecutor(jobs)
    futures = {pool.submit(run, file): file for file in files}
    try:
        for number, future in enumerate(as_completed(futures), 1):
            file = futures[future]
            if future.result():
                log = file.with_suffix(".log")
                line = log.read_text("utf-8", "replace").strip().rpartition("\n")[2].removeprefix("atom: ")
                raise AtomError(f"{file.stem} failed: {line} (log: {log})")
            eta = duration((time.monotonic() - begin) / number * (len(files) - number))
            print(f"{file.stem} is done; {number} of {len(files)}, eta {eta}", file=sys.stderr, flush=True)
    finally:
        pool.shutdown(cancel_futures=True)


def bits_of(graph: Graph, store: Store) -> dict[str, float]:
    """Returns the bits per byte of held-out documents after pre-training, by source. Raises AtomError if not sealed."""
    scores = sealed(graph, EVALUATION, store, EVALUATION).json("scores.json")
    return {source: float(row["value"]) for source, row in scores["bits_per_byte"].items()}


class Target(NamedTuple):
    """The run that a mix is for.

    Attributes:
        name: Its recipe.
        tokens: Tokens of its pre-training.
        epochs: By source, how often all phases together may read it.
        supply: The supply of the S sources, by name.
        limits: The largest weights [S]: those with which a source is read as often as the recipe takes, or 1. What
            later phases read counts as well.
    """

    name: str
    tokens: int
    epochs: Mapping[str, float]
    supply: Mapping[str, Supply]
    limits: Array


def target_of(graph: Graph, sources: Sequence[str], store: Store) -> Target:
    """Returns a recipe as the target. Raises AtomError if its data lacks a source, or has too few tokens for it."""
    config, supply, name = vars(pretraining(graph).config), supply_of(graph, store), graph.recipe.config.name
    if missing := [source for source in sources if source not in supply]:
        raise AtomError(f"the data of {name} has no source {missing[0]}, which the proxies mix; add it there")
    supply, tokens = {source: supply[source] for source in sources}, config["phase"].tokens()
    epochs = {source: float(vars(graph.recipe.config)["supply"].most_epochs(source)) for source in sources}
    later = {row.source: sum(row.asked.values()) - row.asked.get(NODE, 0.0) for row in dag.supply(graph)}
    most = [
        1.0 if known is None else max(0.0, epochs[source] * known - later.get(source, 0.0)) / tokens
        for source, (known, _) in supply.items()
    ]
    limits = np.minimum(most, 1.0)
    if np.floor(limits * mixing_law.UNITS).sum() < mixing_law.UNITS:
        raise AtomError(
            f"{name} reads {human(tokens)} tokens, and the epochs that its supply allows of {', '.join(sources)}, "
            f"without what later phases read, are {human(sum(most) * tokens)}; shorten its pre-training, add sources, "
            "or acknowledge more by supply.acknowledged_epochs"
        )
    return Target(name, tokens, epochs, supply, limits)


def factors_of(text: str) -> dict[str, Any]:
    """Returns the factors of `--weights`, by domain. Raises AtomError for another form."""
    factors = parse_yaml(f"{{{text}}}".encode(), "--weights")
    if not all(isinstance(factor, int | float) and 0 < factor < np.inf for factor in factors.values()):
        raise AtomError("--weights: write such as 'manuals: 2, programs: 1', with numbers above 0")
    return factors


def report_of(proxies: Sequence[Graph], target: Target, domains: Mapping[str, float], store: Store) -> dict[str, Any]:
    """Fits the law to sealed proxies, and proposes a mix.

    Args:
        proxies: The proxies.
        target: The run that the mix is for.
        domains: Factors of D domains, which are sources with held-out documents; empty: those that are mixed, equally.
        store: The home.

    Returns:
        The content of mix.json.

    Raises:
        AtomError: If a proxy is not sealed, or a domain was not scored.
    """
    sources, scores = list(target.supply), [bits_of(proxy, store) for proxy in proxies]
    domains = domains or {source: 1.0 for source in sources if source in scores[0]}
    if unknown := [domain for domain in domains if domain not in scores[0]]:
        raise AtomError(f"{unknown[0]} has no held-out documents that were scored; there are {', '.join(scores[0])}")
    measured = np.asarray([[row[domain] for domain in domains] for row in scores])
    fit = mixing_law.fit(np.asarray([_row(sources, mix_of(proxy)) for proxy in proxies]), measured)
    findings = _findings(fit, target, np.asarray(list(domains.values())) / sum(domains.values()), list(domains))
    about = {"schema": SCHEMA, "formula": mixing_law.FORMULA, "level": LEVEL}
    about["target"] = {"name": target.name, "tokens": target.tokens}
    return {**about, **findings, "remarks": list(_remarks(proxies[0], findings))}


def _findings(fit: Fit, target: Target, factors: Array, domains: Sequence[str]) -> dict[str, Any]:
    """Returns the part of mix.json that follows from the law and the factors [D] of the domains."""
    law, draws, sources = fit.law, fit.draws, list(target.supply)

    def best(law: Law, factors: Array) -> Array:
        return mixing_law.propose(law, factors, target.limits)

    def entry(mix: Array, bits: Array | None = None) -> dict[str, Any]:
        expected = law.bits(mix) if bits is None else bits
        return {"weights": _named(sources, mix), "bits": _named(domains, expected), "mean": float(expected @ factors)}

    def spread(mix: Array, less: Array | None = None) -> dict[str, float]:
        value, drawn = ((each.bits(mix) - (0 if less is None else each.bits(less))) @ factors for each in (law, draws))
        return asdict(band(float(value), drawn))

    proposed = best(law, factors)
    mixes = {"proposed": proposed, "recipe": fit.weights[0]}
    if natural := natural_mix(target.supply, sources):
        mixes["natural"] = _row(sources, natural)
    drawn = np.asarray([best(Law(*pair), factors) for pair in zip(draws.floors, draws.slopes, strict=True)])
    bands = [asdict(band(float(weight), row)) for weight, row in zip(proposed, drawn.T, strict=True)]
    rows = zip(target.supply.items(), target.epochs.values(), target.limits.tolist(), bands, strict=True)
    laws = zip(domains, factors.tolist(), law.floors.tolist(), law.slopes, strict=True)
    pairs = [(fit.left_out @ factors, fit.measured @ factors), *zip(fit.left_out.T, fit.measured.T, strict=True)]
    ranks = np.asarray([mixing_law.rank_correlation(*pair) for pair in pairs])
    shares, alone = np.linspace(0, 1, CURVE)[:, None], np.eye(len(factors))
    curves = zip(domains, ((1 - shares) * factors + shares * row for row in alone), strict=True)
    return {
        "sources": {
            name: {**known._asdict(), "epochs": epochs, "limit": most, "proposed": row}
            for (name, known), epochs, most, row in rows
        },
        "domains": {name: {"factor": f, "floor": least, "slopes": _named(sources, s)} for name, f, least, s in laws},
        "rank_correlation": _named(["mean", *domains], ranks),
        "mixes": {name: entry(m) | {"expected": spread(m), "above": spread(m, proposed)} for name, m in mixes.items()},
        "runs": list(map(entry, fit.weights, fit.measured)),
        "pareto": {domain: [entry(best(law, row)) for row in curve] for domain, curve in curves},
    }


def _named(names: Iterable[str], row: Array) -> dict[str, float]:
    return dict(zip(names, row.tolist(), strict=True))


def _row(sources: Sequence[str], mix: Mapping[str, float]) -> Array:
    return np.asarray([mix.get(source, 0.0) for source in sources])


def _remarks(proxy: Graph, findings: Mapping[str, Any]) -> Iterator[str]:
    """Yields sentences on what a proposal rests on."""
    config = vars(pretraining(proxy).config)
    parameters, least = config["model"].parameters(config["padded_vocab_size"])["total"], human(CARRIES_OVER)
    if parameters < CARRIES_OVER:
        yield f"the proxies have {human(parameters)} parameters; ranks of mixes are known to carry over from {least} on"
    for source, row in findings["sources"].items():
        drawn = [run["weights"][source] for run in findings["runs"]]
        if not min(drawn) <= row["proposed"]["value"] <= max(drawn):
            yield f"the proposed weight of {source} is outside those of the proxies"


def sentences(report: Mapping[str, Any]) -> list[str]:
    """Returns the lines that the command prints."""
    ranks, target, proposed = report["rank_correlation"], report["target"], report["mixes"]["proposed"]["weights"]
    verdict = "ranks the proxies" if ranks["mean"] >= RANKS else "does not rank the proxies, so use no mix below"
    by_domain = ", ".join(f"{name} {value:.2f}" for name, value in ranks.items())
    lines = [f"the law {verdict}: rank correlation, each of the {len(report['runs'])} left out of it, {by_domain}"]
    lines.append(f"proposed for {human(target['tokens'])} tokens of {target['name']}, bands of {report['level']:.0%}:")
    for source, row in report["sources"].items():
        weight, tokens = row["proposed"], row["tokens"]
        epochs = weight["value"] * target["tokens"] / max(tokens or 0, 1)
        use = "unknown supply" if tokens is None else f"{epochs:.2g} epochs of {human(tokens)} tokens ({row['basis']})"
        lines.append(f"  {source} {_text(weight, '.3f')}: {use}")
    for name, row in report["mixes"].items():
        bits = ", ".join(f"{domain} {value:.3f}" for domain, value in row["bits"].items())
        above = f", {_text(row['above'], '+.4f')} above the proposed mix" if name != "proposed" else ""
        lines.append(f"{name} mix: {_text(row['expected'], '.4f')} bits per byte{above}; {bits}")
    mix = ", ".join(f"{source}: {weight}" for source, weight in proposed.items() if weight)
    return [*lines, *report["remarks"], f"mix: {{{mix}}}"]


def _text(row: Mapping[str, float], form: str) -> str:
    return f"{row['value']:{form}} ({row['low']:{form}} to {row['high']:{form}})"
