"""The whole pipeline with one command: run, build, sign, publish to a local Hub, pull back, verify, and a short table.

    python -m release.demo [RECIPE]

Every step is the command that a user would type; it is printed before it runs. Needs no account and no network.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

    from pipeline.core.store import Store
    from pipeline.graph.dag import Graph
    from stages.evaluation.scores import Figure

NAMESPACE, TOKEN = "local", "hf_local"


def atom(*arguments: str, **environment: str) -> None:
    """Runs one `atom` command as a user would. Exits with its code if it fails."""
    print(f"\n$ atom {' '.join(arguments)}", flush=True)
    process = subprocess.run([sys.executable, "-m", "pipeline.cli", *arguments], env={**os.environ, **environment})
    if process.returncode:
        sys.exit(process.returncode)


@contextmanager
def meanwhile(*arguments: str) -> Iterator[None]:
    """Runs an `atom` command that only reads beside those of the `with` block, and prints it and its output after them.
    Exits with its code if it fails."""
    command = [sys.executable, "-m", "pipeline.cli", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        yield
        output = process.communicate()[0]
    finally:
        process.kill()
        process.wait()
    print(f"\n$ atom {' '.join(arguments)}\n{output}", end="", flush=True)
    if process.returncode:
        sys.exit(process.returncode)


def main(recipe: str) -> None:
    from pipeline.core.store import Store, home_folder
    from pipeline.graph import dag
    from pipeline.graph import recipe as recipes
    from release import signing
    from release.hub.local.server import running

    started = time.monotonic()
    store = Store(home_folder())
    composed = dag.compose(recipes.load(recipe), store)
    identity = composed.recipe.config
    release = store.home / "releases" / f"{identity.name}-{identity.version}"

    atom("run", recipe)
    atom("build", recipe)
    key = store.home / "keys" / "demo.pem"
    if not key.exists():
        print(f"\nmaking a key for this demo, {_short_path(key)}")
        signing.make_key(key)
    atom("sign", str(release), "--key", str(key))
    name = signing.fingerprint(signing.SigningKey(key).public_key())
    print("\nstarting an empty local Hub with the routes of huggingface.co")
    shutil.rmtree(store.home / "hub", ignore_errors=True)  # a Hub keeps a version forever, and the demo may be rebuilt
    deep = meanwhile("verify", "--deep", str(release), "--key", name)
    with deep, running(store.home / "hub", NAMESPACE, TOKEN) as endpoint:
        hub = {"HF_ENDPOINT": endpoint, "HF_TOKEN": TOKEN}
        atom("publish", str(release), "--to", NAMESPACE, **hub)
        atom("verify", f"{NAMESPACE}/{identity.name}@v{identity.version}", "--key", name, **hub)
    summary(composed, store, release, time.monotonic() - started)


def summary(composed: Graph, store: Store, release: Path, seconds: float) -> None:
    """Prints the table at the end; every figure is read from the release or the ledger."""
    from rich.console import Console
    from rich.table import Table

    from pipeline.core import provenance
    from pipeline.core.progress import duration
    from pipeline.tracking import mlflow_sync
    from release.assembly.data_facts import read_data_facts
    from release.assembly.model_facts import read_model_facts
    from release.cards import caveats
    from release.cards.tables import titles, with_error

    data, model = read_data_facts(release / "dataset"), read_model_facts(release / "model")
    console = Console(width=None if sys.stdout.isatty() else 150)

    def table(title: str, *columns: str) -> Table:
        grid = Table(
            title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, header_style="dim"
        )
        for i, column in enumerate(columns):
            grid.add_column(column, justify="left" if i == 0 else "right")
        return grid

    print()
    names = list(data.sources)
    corpus = table("Corpus: documents", "", *names, "all")

    def row(label: str, values: list[int]) -> None:
        corpus.add_row(label, *(f"{v:,}" for v in values), f"{sum(values):,}")

    row("in", [data.sources[n].documents_in for n in names])
    families = sorted({rule.split("/")[0] for n in names for rule in data.sources[n].removed})
    for family in families:
        row(f"removed: {family}", [_by_family(data.sources[n].removed, family) for n in names])
    row("kept", [data.sources[n].kept for n in names])
    row("tokens", [sum(data.sources[n].tokens.values()) for n in names])
    console.print(corpus)

    sentences = [*caveats.caveat_sentences(model), *caveats.unread(model.scores, data.order)]
    print("\nWhat to know before any figure")
    for sentence in sentences:
        console.print(sentence.replace("**", ""), markup=False, highlight=False)

    scores = data.evaluation
    phases = list(scores)
    quality = table("\nHeld-out quality: value ± standard error", "", *titles(phases).values())
    for source in scores[phases[-1]]["bits_per_byte"]:
        cells = [with_error(scores[p]["bits_per_byte"][source], 3) for p in phases]
        quality.add_row(f"bits per byte, {source}", *cells)
    for task in scores[phases[-1]]["accuracy"]:
        cells = [with_error(scores[p]["accuracy"][task], 3) for p in phases]
        quality.add_row(f"exact match, {task}", *cells)
    console.print(quality)

    if data.chat:
        conversation(console, table, data.chat)

    p = model.parameters
    print(f"\nModel: {p.total:,} parameters, {p.active:,} active for one token")
    print(
        f"Export parity: largest logit difference to the trainer {model.parity['max_abs_logit_delta']:.1e}, "
        f"allowed {model.parity['tolerance']:.0e}"
    )

    times = []
    for name, node in composed.nodes.items():
        statement = provenance.sealed(store.ledger, store.open(node.key))
        if statement:
            times.append((name, provenance.usage(statement[1])["wall_seconds"]))
    print("Time of each stage: " + ", ".join(f"{name} {duration(wall)}" for name, wall in times))
    print(f"This command took {duration(seconds)}; a second run reuses sealed artifacts.")

    uri, release_path = mlflow_sync.shown_uri(store), _short_path(release)
    print(f"\nRelease  {release_path}\nHub      {_short_path(store.home / 'hub')}\nMLflow   {uri}")
    name = composed.recipe.path.stem
    print(
        "\nWhat to try next (with .venv/bin in front of PATH)\n"
        "  atom status                     how the run went, stage by stage\n"
        f"  less {release_path}/model/README.md    the model card: every number in it was measured\n"
        f"  atom show {release_path}      the release on one page\n"
        f"  atom trace {release_path} --phase pretrain --step 7    the documents of that batch, and their origin\n"
        f"  atom replay {release_path} pretrain    retrain its last steps, and compare every tensor\n"
        f"  atom verify {release_path}    then flip any byte of it, and verify again\n"
        f"  mlflow ui --backend-store-uri {uri}\n"
        f"  atom plan {name}             change a field in a copy of the recipe, and plan the copy:\n"
        "                                  only stages that depend on the field will run"
    )


def conversation(console: Console, table: Any, chat: dict[str, Any]) -> None:
    """Prints the scores after each phase of post-training: test problems, fresh set, reward by part, preferences."""
    from release.cards import caveats, chat_tables
    from release.cards.tables import with_error
    from stages.evaluation.scores import pass_at_1

    test, fresh, preferences = (chat.get(benchmark, {}) for benchmark in ("test", "fresh", "preferences"))
    grid = table("\nIn conversation: value ± standard error; pass@1: right answers drawn at temperature 1", "", *test)

    def row(label: str, cells: Sequence[Figure | None]) -> None:
        grid.add_row(label, *(with_error(c, 3) if c else "" for c in cells))

    for kind in next(iter(test.values()))["problems"]:
        row(
            f"pass@1, {kind}", [model_scores["problems"][kind]["samples"]["accuracy"] for model_scores in test.values()]
        )
    row("pass@1, all", [pass_at_1(test).get(name) for name in test])
    totals = [model_scores["problems_all"] for model_scores in test.values()]
    row("greedy, all", [total["greedy"]["accuracy"] if total else None for total in totals])
    row("pass@1, fresh set", [pass_at_1(fresh).get(name) for name in test])
    measured = caveats.parts(chat)
    for part in chat_tables.ordered([part for model_scores in measured.values() for part in model_scores]):
        label = f"  its part {part}" if part != "reward" else "preference reward"
        row(label, [measured.get(name, {}).get(part) for name in test])
    row(
        "wins against an earlier model",
        [preferences[name]["win_rate"] if name in preferences else None for name in test],
    )
    console.print(grid)


def _short_path(path: Path) -> str:
    """A path below the working folder relative to it, any other in full."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _by_family(removed: dict[str, int], family: str) -> int:
    return sum(count for rule, count in removed.items() if rule.split("/")[0] == family)


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "atom-tiny")
