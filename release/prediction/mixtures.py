"""`atom mix`: proposes the weights of the sources of pre-training, from proxies that were run with drawn weights.

A proxy is a copy of a small recipe with another `pretrain.mix`, in `$ATOM_HOME/mixtures/`; its run is like any other.
Weights are drawn from a Dirichlet distribution around the natural ones, those of the supply. As in RegMix
(arXiv:2407.01492), these are flattened by a square root, so that small sources are seen. The draws follow from the seed
and the sources of the small recipe alone: more runs keep those before, and one set of proxies serves several targets.

RegMix took 512 models of a million parameters, and found that ranks of mixes held at a thousand times the size. Olmix
(arXiv:2602.12237) found a rank correlation with models of a billion parameters of 0.73 for proxies of a million, and of
0.89 or more from 15 million on, with runs in proportion to the sources.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

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
from pipeline.graph.recipe import Recipe
from release.prediction.sealing import EVALUATION, pretraining, sealed
from stages.evaluation import mixing_law
from stages.evaluation.mixing_law import Array, Fit, Law
from stages.evaluation.scaling_laws import LEVEL, Band, band

# Version of the form of mix.json.
SCHEMA = 1
REPORT, PLOT, FOLDER = "mix.json", "mix.png", "mixtures"
# Passes over a source up to which repeated tokens are nearly worth new ones (Muennighoff et al. 2023, arXiv:2305.16264).
EPOCHS = 4.0
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
# Seconds between two looks at the runs.
POLL = 0.2


class Supply(NamedTuple):
    """The training tokens of a source.

    Attributes:
        tokens: Their number; None if it is unknown.
        basis: What it is from: counted after curation, or stated by the data recipe, before curation.
    """

    tokens: float | None
    basis: Literal["counted", "stated", "unknown"]


def supply_of(graph: Graph, store: Store | None = None) -> dict[str, Supply]:
    """Returns the supply of each source of a recipe's data: counted if its tokens are in the store, or else stated."""
    data: Any = graph.recipe.data
    if store is not None and store.sealed(key := graph.nodes["tokenize"].key):
        counted = store.open(key).json("meta.json")["tokens"]["train"]
        return {source.name: Supply(float(counted.get(source.name, 0)), "counted") for source in data.sources}
    supply = {source.name: Supply(None, "unknown") for source in data.sources}
    for source in data.sources:
        if source.expected:
            size = source.expected.bytes * (1 - data.heldout_fraction_of(source))
            supply[source.name] = Supply(size / BYTES_PER_TOKEN, "stated")
    return supply


def mix_of(graph: Graph) -> dict[str, float]:
    """Returns the weights of a recipe's pre-training, by source."""
    config: Any = pretraining(graph).config
    return dict(config.phase.mix)


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
    """Returns the graphs of the proxies of a small recipe. Their files are not written yet.

    Args:
        graph: The small recipe.
        runs: Number of proxies.
        store: The home.
        without_data: See `dag.compose`.

    Raises:
        AtomError: If the recipe has a single source, or the runs are too few for a law.
    """
    own, name, least = mix_of(graph), graph.recipe.config.name, mixing_law.least_runs(len(mix_of(graph)))
    if len(own) < 2:
        raise AtomError(f"pretrain.mix of {name} has a single source, so that there is nothing to weigh; add another")
    if runs < least:
        raise AtomError(f"--runs {runs}: the law of the {len(own)} sources of {name} needs at least {least} runs")
    mixes = draw(own, natural_mix(supply_of(graph), list(own)), runs, graph.recipe.config.seed)
    derived = [_derived(graph.recipe, mix, f"{name[:56]}-mix-{n:03}", store) for n, mix in enumerate(mixes, 1)]
    return [dag.compose(recipe, store, without_data) for recipe in derived]


def _derived(recipe: Recipe, mix: Mapping[str, float], name: str, store: Store) -> Recipe:
    """Returns a recipe with another name and mix in the folder of proxies, whose paths lead to the same files."""
    own, base = f"recipes/{recipe.path.name}", recipe.path.parent
    folder = (store.home / FOLDER / recipe.config.name).resolve()
    raw: Any = parse_yaml(recipe.files[own], recipe.title)
    data = recipes.find(raw["data"], "data_recipes", "data recipe", base)
    raw |= {"name": name, "data": os.path.relpath(data.resolve(), folder)}
    raw["pretrain"] = {**raw["pretrain"], "mix": dict(mix)}
    tasks = (raw["evaluation"].get("harness") or {}).get("folders", ())
    for section, field in (raw.get("start_from") or {}, "folder"), *((entry, "path") for entry in tasks):
        if section.get(field):
            section[field] = os.path.relpath((base / section[field]).resolve(), folder)
    content = yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).encode()
    files = {place: body for place, body in recipe.files.items() if place != own} | {f"recipes/{name}.yaml": content}
    return replace(
        recipe, path=folder / f"{name}.yaml", config=recipes.schema().model_validate(raw), files=files
    )


def write_recipe(recipe: Recipe) -> None:
    """Writes the file of a proxy's recipe, and its extensions beside it."""
    modules = recipe.extensions.files()
    for name, content in {**modules, recipe.path.name: recipe.files[f"recipes/{recipe.path.name}"]}.items():
        path = recipe.path.parent / name
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_files.write(path, content)


def run_all(files: Sequence[Path], jobs: int, cluster: str, note: Callable[[str], None]) -> None:
    """Runs recipes up to the evaluation of the base model, each as `atom run`.

    After a failure, or Ctrl-C, no further run begins. A failure lets the others end; Ctrl-C stops them cleanly.

    Args:
        files: The recipes. What a run prints is appended to a file beside its recipe.
        jobs: Runs at a time.
        cluster: The cluster profile.
        note: Takes a line on the progress.

    Raises:
        AtomError: If a run failed, with its last line.
        KeyboardInterrupt: After the runs have stopped.
    """
    waiting, running, begin, failed = list(files), dict[Path, subprocess.Popen[bytes]](), time.monotonic(), None
    try:
        while running or (waiting and failed is None):
            while waiting and failed is None and len(running) < jobs:
                file = waiting.pop(0)
                command = [sys.executable, "-m", "pipeline.cli", "run", str(file), "--until", EVALUATION]
                command += ["--cluster", cluster]
                with open(file.with_suffix(".log"), "ab") as log:
                    # In a session of its own: Ctrl-C of a terminal reaches it once, from here.
                    running[file] = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
            time.sleep(POLL)
            for file in [file for file, process in running.items() if process.poll() is not None]:
                failed = file if running.pop(file).returncode else failed
                left = len(waiting) + len(running)
                eta = duration((time.monotonic() - begin) / (len(files) - left) * left)
                note(f"{file.stem} is over; {len(files) - left} of {len(files)}, eta {eta}")
    except KeyboardInterrupt:
        for process in running.values():
            process.send_signal(signal.SIGINT)
        for process in running.values():
            process.wait()
        raise
    if failed is not None:
        log_file = failed.with_suffix(".log")
        (line,) = log_file.read_text("utf-8", "replace").strip().splitlines()[-1:] or ["without a word"]
        raise AtomError(f"{failed.stem} failed: {line.removeprefix('atom: ')} (log: {log_file})")


def bits_of(graph: Graph, store: Store) -> dict[str, float]:
    """Returns the bits per byte of held-out documents after pre-training, by source. Raises AtomError if not sealed."""
    scores = sealed(graph, EVALUATION, store, EVALUATION).json("scores.json")
    return {source: float(row["value"]) for source, row in scores["bits_per_byte"].items()}


@dataclass(frozen=True)
class Target:
    """The run that a mix is for.

    Attributes:
        name: Its recipe.
        tokens: Tokens of its pre-training.
        supply: The supply of the S sources, by name.
    """

    name: str
    tokens: int
    supply: Mapping[str, Supply]

    @cached_property
    def limits(self) -> Array:
        """The largest weights [S]: those with which a source is read EPOCHS times, or 1.

        Raises:
            AtomError: If all sources together have too few tokens.
        """
        most = [1.0 if known is None else EPOCHS * known / self.tokens for known, _ in self.supply.values()]
        limits = np.minimum(most, 1.0)
        if not mixing_law.can_serve(limits):
            raise AtomError(
                f"{self.name} reads {human(self.tokens)} tokens, and {EPOCHS:g} epochs of {', '.join(self.supply)} are "
                f"{human(sum(most) * self.tokens)}; shorten its pre-training, or add sources"
            )
        return limits


def target_of(graph: Graph, sources: Sequence[str], store: Store) -> Target:
    """Returns a recipe as the target. Raises AtomError if its data lacks a source."""
    config, supply, name = vars(pretraining(graph).config), supply_of(graph, store), graph.recipe.config.name
    if missing := [source for source in sources if source not in supply]:
        raise AtomError(f"the data of {name} has no source {missing[0]}, which the proxies mix; add it there")
    return Target(name, config["phase"].tokens(), {source: supply[source] for source in sources})


@dataclass(frozen=True)
class Mixture:
    """The result of `atom mix`.

    Attributes:
        proxies: The proxies.
        target: The run that the mix is for.
        domains: Factor of each of D domains, which sum to 1.
        fit: The law.
    """

    proxies: Sequence[Graph]
    target: Target
    domains: Mapping[str, float]
    fit: Fit

    @cached_property
    def factors(self) -> Array:
        return np.asarray(list(self.domains.values()))

    def propose(self, law: Law) -> Array:
        return mixing_law.propose(law, self.factors, self.target.limits)

    @cached_property
    def mixes(self) -> dict[str, Array]:
        """The proposed mix, that of the small recipe, and the natural one if the supply is known, all [S]."""
        sources = list(self.target.supply)
        named = {"recipe": mix_of(self.proxies[0]), "natural": natural_mix(self.target.supply, sources)}
        rows = {name: np.asarray([mix.get(source, 0.0) for source in sources]) for name, mix in named.items() if mix}
        return {"proposed": self.propose(self.fit.law), **rows}

    @cached_property
    def spread(self) -> list[Band]:
        """The proposed weights, with the bands of those that the laws of the bootstrap propose."""
        drawn = np.asarray([self.propose(law) for law in self.fit.draws])
        return [band(float(weight), drawn[:, n]) for n, weight in enumerate(self.mixes["proposed"])]

    def mean_bits(self, name: str, less: str | None = None) -> Band:
        """Returns what is expected of the mean bits per byte of a mix, or of its difference from another one."""

        def mean(law: Law) -> float:
            return float((law.bits(self.mixes[name]) - (law.bits(self.mixes[less]) if less else 0)) @ self.factors)

        return band(mean(self.fit.law), np.asarray([mean(law) for law in self.fit.draws]))

    @cached_property
    def correlations(self) -> dict[str, float]:
        """Rank correlations of the proxies, between measured bits and those expected from the others: mean, domains."""
        expected, measured = self.fit.left_out, self.fit.measured
        columns = {"mean": (expected @ self.factors, measured @ self.factors)}
        columns |= dict(zip(self.domains, zip(expected.T, measured.T, strict=True), strict=True))
        return {name: mixing_law.rank_correlation(*pair) for name, pair in columns.items()}

    @cached_property
    def pareto(self) -> dict[str, list[Array]]:
        """The best mixes as one domain counts more and more, from the proposal to the best mix of this domain alone."""
        laws, limits, alone = self.fit.law, self.target.limits, np.eye(len(self.factors))
        shares = np.linspace(0, 1, CURVE)
        return {
            domain: [mixing_law.propose(laws, (1 - s) * self.factors + s * alone[n], limits) for s in shares]
            for n, domain in enumerate(self.domains)
        }

    def remarks(self) -> Iterator[str]:
        """Yields sentences on what the proposal rests on."""
        config = vars(pretraining(self.proxies[0]).config)
        parameters = config["model"].parameters(config["padded_vocab_size"])["total"]
        if parameters < CARRIES_OVER:
            yield (
                f"the proxies have {human(parameters)} parameters; ranks of mixes are known to carry over to large "
                f"models from {human(CARRIES_OVER)} on"
            )
        rows = zip(self.target.supply.items(), self.mixes["proposed"], self.fit.weights.T, strict=True)
        for (source, supply), weight, drawn in rows:
            if not drawn.min() <= weight <= drawn.max():
                yield f"the proposed weight of {source} is outside those of the proxies"
            if supply.tokens is None:
                yield f"the supply of {source} is unknown and limits nothing; state `expected` in the data recipe"

    def to_json(self) -> dict[str, Any]:
        law, supply, sources = self.fit.law, self.target.supply, list(self.target.supply)

        def expected(weights: Array) -> dict[str, Any]:
            return {"weights": _named(sources, weights), "bits": _named(self.domains, law.bits(weights))}

        return {
            "schema": SCHEMA,
            "formula": mixing_law.FORMULA,
            "level": LEVEL,
            "target": {"name": self.target.name, "tokens": self.target.tokens, "epochs": EPOCHS},
            "domains": dict(self.domains),
            "sources": {
                source: {**supply[source]._asdict(), "limit": float(limit), "proposed": asdict(spread)}
                for source, limit, spread in zip(sources, self.target.limits, self.spread, strict=True)
            },
            "law": {
                domain: {"floor": float(floor), "slopes": _named(sources, slopes)}
                for domain, floor, slopes in zip(self.domains, law.floors, law.slopes, strict=True)
            },
            "rank_correlation": self.correlations,
            "ranks": self.correlations["mean"] >= RANKS,
            "mixes": {name: {**expected(mix), "mean": asdict(self.mean_bits(name))} for name, mix in self.mixes.items()},
            "runs": [
                {
                    "name": proxy.recipe.config.name,
                    "weights": _named(sources, mix),
                    "bits": _named(self.domains, bits),
                }
                for proxy, mix, bits in zip(self.proxies, self.fit.weights, self.fit.measured, strict=True)
            ],
            "pareto": {domain: list(map(expected, mixes)) for domain, mixes in self.pareto.items()},
            "remarks": list(self.remarks()),
        }

    def sentences(self) -> list[str]:
        """Returns the lines that the command prints."""
        ranks = ", ".join(f"{name} {value:.2f}" for name, value in self.correlations.items())
        verdict = "ranks" if self.correlations["mean"] >= RANKS else "DOES NOT RANK"
        lines = [f"the law {verdict} the {len(self.proxies)} proxies, each left out of it: correlation of ranks {ranks}"]
        if verdict != "ranks":
            lines[0] += "; do not use the mix below, but train proxies longer or add some"
        lines.append(f"proposed for {human(self.target.tokens)} tokens of {self.target.name}, bands of {LEVEL:.0%}:")
        for (source, (tokens, basis)), row in zip(self.target.supply.items(), self.spread, strict=True):
            use = f"{row.value * self.target.tokens / tokens:.2g} epochs of {human(tokens)}" if tokens else "supply"
            lines.append(f"  {source} {_text(row, '.3f')}, {use} {basis}")
        for name, mix in self.mixes.items():
            bits = ", ".join(f"{domain} {value:.3f}" for domain, value in _named(self.domains, self.fit.law.bits(mix)).items())
            less = f"; proposed less this: {_text(self.mean_bits('proposed', name), '+.4f')}" if name != "proposed" else ""
            lines.append(f"{name} mix: {_text(self.mean_bits(name), '.4f')} bits per byte ({bits}){less}")
        mix = {source: weight for source, weight in _named(self.target.supply, self.mixes["proposed"]).items() if weight}
        return [*lines, *self.remarks(), f"mix: {json.dumps(mix).replace(chr(34), '')}"]


def _named(names: Iterable[str], row: Array) -> dict[str, float]:
    return dict(zip(names, row.tolist(), strict=True))


def _text(row: Band, form: str) -> str:
    return f"{row.value:{form}} ({row.low:{form}} to {row.high:{form}})"


def make(proxies: Sequence[Graph], target: Target, domains: Mapping[str, float], store: Store) -> Mixture:
    """Fits the law to sealed proxies.

    Args:
        proxies: The proxies.
        target: The run that the mix is for.
        domains: Factors of domains, which are sources with held-out documents; empty: those that are mixed, equally.
        store: The home.

    Raises:
        AtomError: If a proxy is not sealed, a domain was not scored, or the runs cannot carry the law.
    """
    scores = [bits_of(proxy, store) for proxy in proxies]
    domains = domains or {source: 1.0 for source in target.supply if source in scores[0]}
    if unknown := [domain for domain in domains if domain not in scores[0]]:
        raise AtomError(f"{unknown[0]} has no held-out documents that were scored; there are {', '.join(scores[0])}")
    weights = [[mix_of(proxy).get(source, 0.0) for source in target.supply] for proxy in proxies]
    try:
        fit = mixing_law.fit(weights, [[row[domain] for domain in domains] for row in scores])
    except ValueError as error:
        raise AtomError(f"these {len(proxies)} proxies carry no proposal: {error}") from None
    total = sum(domains.values())
    return Mixture(proxies, target, {domain: factor / total for domain, factor in domains.items()}, fit)


def write(mixture: Mixture, plot: bytes, folder: Path) -> None:
    """Writes REPORT and PLOT into a folder, which is made."""
    folder.mkdir(parents=True, exist_ok=True)
    report = json.dumps(mixture.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n"
    atomic_files.write(folder / REPORT, report)
    atomic_files.write(folder / PLOT, plot)
