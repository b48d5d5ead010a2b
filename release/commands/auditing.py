"""The commands that audit a release: verify, show, trace, replay."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.core.progress import StatusLine
from pipeline.operations.command_options import CHECK, DATA, JsonOption, QuietOption
from release.commands.options import (
    AnyReleaseArgument,
    ReleaseArgument,
    TrustConfigOption,
    require_release,
)

if TYPE_CHECKING:
    from release import tracing
    from release.checks.verdict import Verdict

app = typer.Typer()
# The exit code for a release of which documents were taken back.
RETRACTED_CODE = 3


@app.command(rich_help_panel=CHECK)
def verify(
    target: Annotated[
        str, typer.Argument(metavar="PATH_OR_REPO[@REVISION]", help="release folder, pulled repository, or Hub id")
    ],
    deep: Annotated[bool, typer.Option("--deep", help="also recompute what can be recomputed from the bytes")] = False,
    key: Annotated[
        str | None, typer.Option(help="who must have signed it: a public key's file, or its fingerprint sha256:…")
    ] = None,
    identity: Annotated[
        str | None,
        typer.Option(metavar="WHO", help="who must have signed it without a key: an address, or a workflow's URL"),
    ] = None,
    issuer: Annotated[
        str | None, typer.Option(metavar="URL", help="the OpenID provider that vouches for --identity")
    ] = None,
    trust_config: TrustConfigOption = None,
    proof: Annotated[
        Path | None,
        typer.Option(
            help="instead, check these Merkle proofs (atom trace --report --json) against TARGET, a merkle.json"
        ),
    ] = None,
    openness: Annotated[
        bool, typer.Option("--openness", help="also answer twenty questions on how open the release is, from its files")
    ] = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a release, and who signed it.

    The line before the last is one to quote: the checks by their result, and the digest that stands for all bytes.
    With --quiet it prints that, what is bad, and the verdict.
    Exit code 1 says which file or claim is bad; 3 that documents were taken back from it.

    Example: atom verify runs/releases/atom-tiny-0.1.0
    """
    if proof is not None:
        return _check_proofs(proof, Path(target), as_json)
    from release.audit.verify import verify as verify_release
    from release.signing import Trust

    trust = Trust(key, identity, issuer, trust_config)
    with StatusLine(quiet) as progress:
        verdict = verify_release(target, deep, progress, trust)
    from release.audit import openness as audit

    # An identity counts only with a verified signature.
    checked = identity if identity and verdict.signed else ""
    table = list(audit.rows(Path(target), checked)) if openness and verdict.ok else []
    if as_json:
        print(json.dumps(verdict.to_json() | ({"openness": audit.to_json(table)} if table else {}), indent=1))
    else:
        print("\n".join([_verdict_text(verdict, quiet), *([audit.text(table)] if table else [])]))
    if not verdict.ok:
        raise typer.Exit(1)
    if verdict.retracted:
        raise typer.Exit(RETRACTED_CODE)


def _check_proofs(proof: Path, roots: Path, as_json: bool) -> None:
    """Checks proofs against roots. Exits with code 1 if one is not valid."""
    from release import merkle

    problems = merkle.check_file(proof, roots)
    if as_json:
        print(json.dumps(problems, indent=1))
    else:
        for table, problem in problems.items():
            print(f"BAD     {table}: {problem}" if problem else f"ok      {table}: the row is in it, by its root alone")
    # A file without proofs proves nothing.
    if not problems or any(problems.values()):
        raise typer.Exit(1)


@app.command(rich_help_panel=CHECK)
def show(
    release: ReleaseArgument,
    as_json: JsonOption = False,
) -> None:
    """Show a release on one page.

    The page has its corpus, training, quality, caveats and checks.

    Example: atom show runs/releases/atom-tiny-0.1.0
    """
    from release.audit import show as page
    from release.opened_release import Release

    require_release(release)
    facts = page.facts_of(Release(release))
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else page.WIDTH
    print(json.dumps(facts, indent=1) if as_json else page.text(facts, width))


@app.command(rich_help_panel=CHECK)
def trace(
    release: AnyReleaseArgument,
    step: Annotated[int | None, typer.Option(help="the documents, tasks and answers of this optimizer step")] = None,
    phase: Annotated[str | None, typer.Option(help="of which phase, if several have that step")] = None,
    doc: Annotated[
        str | None, typer.Option(metavar="ID", help="the fate of this document or task, and the steps that read it")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="documents that contain this text exactly, and the steps that read them")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="with --doc: everything that a removal request must reach, with proofs")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Trace a step, a document or a text of a release.

    A step leads to its documents, a step of reinforcement learning also to tasks, answers and rewards; a document, a
    task or a text leads to steps and checkpoints.

    Example: atom trace runs/releases/atom-tiny-0.1.0 --step 100 --phase pretrain
    """
    from release import tracing

    if [step, doc, text].count(None) != 2:
        raise AtomError("atom trace answers one question: give --step N, --doc ID or --text STR")
    if phase is not None and step is None:
        raise AtomError("--phase names the phase of a step; give it with --step N")
    if report and doc is None:
        raise AtomError("--report is about a document; give it with --doc ID")
    require_release(release, "dispositions")
    answer: tracing.Answer
    with StatusLine() as progress:
        if step is not None:
            answer = tracing.trace_step(release, phase, step)
        elif text is not None:
            answer = tracing.trace_text(release, text, progress)
        else:
            assert doc is not None, "one of the three was given"
            answer = tracing.trace_removal(release, doc, progress) if report else tracing.trace_document(release, doc)
    print(json.dumps(answer.to_json(), indent=1) if as_json else tracing.text(answer))


@app.command("rebuild-data", rich_help_panel=DATA)
def rebuild_data(
    release: AnyReleaseArgument,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="FOLDER", help="of the tables with texts; default: RELEASE.data")
    ] = None,
    source: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=FOLDER", help="the files of a source that no Hub has; repeatable"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Get the documents that a release has by reference.

    The files of each source are pulled from HF_ENDPOINT, or read from the folder that you give, and compared with their
    digests; every text is compared with its published hash. A run that was interrupted goes on with the next part.
    `atom replay` finds the tables in their default place.

    Example: atom rebuild-data runs/releases/atom-tiny-0.1.0
    """
    from release.audit import rebuild

    require_release(release, "dispositions")
    folders = {}
    for text in source or ():
        name, mark, folder = text.partition("=")
        if not mark or not Path(folder).exists():
            raise AtomError(f"--source {text} names no folder that exists; write NAME=FOLDER")
        folders[name] = Path(folder)
    with StatusLine() as progress:
        result = rebuild.rebuild(release, to or rebuild.folder_of(release), folders, progress)
    print(json.dumps(result.to_json(), indent=1) if as_json else rebuild.text(result))


@app.command(rich_help_panel=CHECK)
def replay(
    release: ReleaseArgument,
    stage: Annotated[str, typer.Argument(help="a training phase, for example pretrain or rlvr")],
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="steps of two published checkpoints; default: the last two")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="write an in-toto statement of the result here")] = None,
    as_json: JsonOption = False,
) -> None:
    """Retrain published steps and compare every tensor.

    The steps are trained from their published checkpoint and data; phases of post-training read the published answers
    and draw none.
    Exit code 0: every bit is the same, or all differences are within a stated tolerance; 1: it differs.

    Example: atom replay runs/releases/atom-tiny-0.1.0 pretrain
    """
    from release.audit import replay as replays

    require_release(release)
    first, last = _span(steps)
    with StatusLine() as progress:
        result = replays.replay(release, stage, first, last, progress)
    print(json.dumps(result.to_json(), indent=1) if as_json else replays.text(result), flush=True)
    if certificate is not None:
        certificate.write_text(json.dumps(replays.certificate(result, release), indent=1, sort_keys=True) + "\n")
    if not result.ok:
        raise typer.Exit(1)


def _span(steps: str | None) -> tuple[int | None, int | None]:
    """Returns the two numbers of A:B. Raises AtomError if there are none."""
    if steps is None:
        return None, None
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise AtomError(f"--steps {steps} is not A:B, two steps of published checkpoints, for example 30:60")
    return int(first), int(last)


def _verdict_text(verdict: Verdict, quiet: bool = False) -> str:
    """Returns one line for each check, its problems below it, a sentence to quote, and the verdict last.

    With `quiet`, only the checks that are bad have a line.
    """
    marks = {True: "ok     ", False: "BAD    ", None: "skipped"}
    lines = []
    for check in verdict.checks:
        if quiet and check.ok is not False:
            continue
        lines.append(f"{marks[check.ok]} {check.name}: {check.detail}")
        lines += [f"          {text}" for text in check.wrong]
        lines += [f"{marks[None]} {check.name}: {text}" for text in check.skipped]
    return "\n".join([*lines, verdict.in_one_sentence(), f"{verdict.kind} {verdict.subject}: {verdict.outcome()}"])
