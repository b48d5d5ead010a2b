"""The commands about a release: from building it to what a stranger asks of it."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.core.errors import AtomError
from pipeline.operations.command_options import JsonOption, RecipeArgument, graph_of, open_store

app = typer.Typer()

ReleaseArgument = Annotated[Path, typer.Argument(help="a release folder made by `atom build`")]
AnyReleaseArgument = Annotated[
    Path, typer.Argument(metavar="RELEASE", help="a release folder, or the folder of one pulled repository of it")
]

TrustConfigOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="trust configuration of another instance of Sigstore than the public one"),
]


def require_release(folder: Path, *marks: str) -> None:
    """Raises AtomError if a folder is not a release, nor (marks: files that only those have) what else may be meant."""
    if not any((folder / mark).exists() for mark in ("evidence/release.json", *marks)):
        raise AtomError(f"{folder} is not a release folder; make one with `atom build`, or pull one from the Hub")


@app.command()
def build(recipe: RecipeArgument) -> None:
    """Make the release folder, with its gates.

    Everything in it comes from the sealed artifacts of the recipe; a gate that fails stops the build.
    """
    from release.assembly.build_release import build as build_release
    from release.assembly.collect import build_input

    store = open_store()
    folder = build_release(build_input(graph_of(recipe), store), store.home, print)
    print(f"release built: {folder}; next: atom verify {folder}")


@app.command()
def sign(
    release: ReleaseArgument,
    key: Annotated[
        Path | None, typer.Option(help="a private key on an elliptic curve, as PEM; ATOM_KEY_PASSWORD opens it")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="a certificate of that key, as PEM")] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="certificates that vouch for it, up to the root; repeatable")
    ] = None,
    keyless: Annotated[
        bool,
        typer.Option(
            "--keyless", help="instead of a key, by Sigstore: as the CI job that runs this, else as you, in a browser"
        ),
    ] = False,
    trust_config: TrustConfigOption = None,
) -> None:
    """Sign every repository of a release.

    A `model.sig` (OpenSSF Model Signing) in each covers all its files. Give the fingerprint that is printed to your
    users by another way than the release itself.

    With --keyless there is no key to keep: Sigstore certifies the address or workflow that an OpenID provider vouches
    for, and its public log keeps that name for ever. The job's own credentials are used where there are some (GitHub
    Actions, GitLab CI, Google Cloud, Buildkite), else a browser is opened, or a link is shown. It needs a network.
    """
    from release import signing

    def say(text: str) -> None:
        print(text, flush=True)

    if keyless:
        if key is not None or certificate is not None or chain:
            raise AtomError("--keyless signs without a key; leave out --key, --certificate and --chain")
        require_release(release)
        who = signing.sign_keyless(release, trust_config, say)
        print(f"signed by {who}; check it: atom verify {release} --identity {who.name} --issuer {who.issuer}")
        return
    if trust_config is not None:
        raise AtomError("--trust-config is of an instance of Sigstore; give it with --keyless")
    if key is None:
        raise AtomError(f"no key to sign with; give --key PEM ({signing.HOW_TO}), or sign without one by --keyless")
    signing_key = signing.SigningKey(key, certificate, tuple(chain or ()), os.environ.get("ATOM_KEY_PASSWORD"))
    require_release(release)
    name = signing.sign(release, signing_key, say)
    print(f"signed by {name}; check it: atom verify {release} --key {name}")


@app.command()
def publish(
    release: ReleaseArgument,
    to: Annotated[str, typer.Option("--to", metavar="NAMESPACE", help="user or organization on the Hub")],
    public: Annotated[
        bool, typer.Option("--public", help="make the repositories public after they are verified")
    ] = False,
    acknowledge: Annotated[
        list[str] | None,
        typer.Option(help="a stale stage, or `dirty`, that may be made public nevertheless; repeatable"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a release to the Hub.

    The repositories are private until all are uploaded, pulled back and verified; --public then makes them public.
    HF_ENDPOINT and HF_TOKEN are respected.
    """
    from release.hub.publish import publish as publish_release

    out = sys.stderr if as_json else sys.stdout
    report = publish_release(release, to, public, lambda text: print(text, file=out, flush=True), acknowledge or ())
    print(json.dumps(report.to_json(), indent=1) if as_json else _published_text(report))


@app.command()
def verify(
    target: Annotated[
        str, typer.Argument(metavar="PATH_OR_REPO[@REVISION]", help="release folder, pulled repository, or Hub id")
    ],
    deep: Annotated[bool, typer.Option("--deep", help="also recompute what can be recomputed from the bytes")] = False,
    key: Annotated[
        str | None, typer.Option(help="who must have signed it: a public key's file, or its fingerprint sha256:…")
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="a certificate that is trusted, if it was signed with one; repeatable")
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
    as_json: JsonOption = False,
) -> None:
    """Check every byte of a release, and who signed it.

    Exit code 1 says which file or claim is bad.
    """

    if proof is not None:
        return _check_proofs(proof, Path(target), as_json)
    from release.audit.verify import verify as verify_release
    from release.signing import Trust

    trust = Trust(key, tuple(chain or ()), identity, issuer, trust_config)
    verdict = verify_release(target, deep, lambda text: print(text, file=sys.stderr, flush=True), trust)
    print(json.dumps(verdict.to_json(), indent=1) if as_json else _verdict_text(verdict))
    if not verdict.ok:
        raise typer.Exit(1)


def _check_proofs(proof: Path, roots: Path, as_json: bool) -> None:
    """Exit code 1 if one of them does not hold."""
    from release.audit import merkle

    found = merkle.check_file(proof, roots)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        for table, wrong in found.items():
            print(f"BAD     {table}: {wrong}" if wrong else f"ok      {table}: the row is in it, by its root alone")
    if not found or any(found.values()):
        raise typer.Exit(1)


@app.command()
def show(
    release: ReleaseArgument,
    as_json: JsonOption = False,
) -> None:
    """Tell on one page what a release is, what went into it, how good it is and how that was checked."""
    from release.audit import show as page

    require_release(release)
    found = page.facts_of(release)
    print(json.dumps(found, indent=1) if as_json else page.text(found))


@app.command()
def trace(
    release: AnyReleaseArgument,
    step: Annotated[int | None, typer.Option(help="the documents of this optimizer step")] = None,
    phase: Annotated[str | None, typer.Option(help="of which phase, if several have that step")] = None,
    doc: Annotated[str | None, typer.Option(metavar="ID", help="what became of this document, and who saw it")] = None,
    text: Annotated[
        str | None, typer.Option(help="documents that contain this, to the letter, and who saw them")
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="with --doc: all that a removal request must reach, with proofs")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Lead from a step to documents, and from a document or text to steps and checkpoints."""
    from release.audit import tracing

    if [step, doc, text].count(None) != 2:
        raise AtomError("atom trace answers one question: give --step N, --doc ID or --text STR")
    if phase is not None and step is None:
        raise AtomError("--phase names the phase of a step; give it with --step N")
    if report and doc is None:
        raise AtomError("--report is about a document; give it with --doc ID")
    require_release(release, "dispositions.parquet")

    def say(words: str) -> None:
        print(words, file=sys.stderr, flush=True)

    answer: tracing.Answer
    if step is not None:
        answer = tracing.trace_step(release, phase, step)
    elif text is not None:
        answer = tracing.trace_text(release, text, open_store().home / "trace", say)
    else:
        assert doc is not None, "one of the three was given"
        answer = tracing.trace_removal(release, doc, say) if report else tracing.trace_document(release, doc)
    print(json.dumps(answer.to_json(), indent=1) if as_json else tracing.text(answer))


@app.command()
def replay(
    release: ReleaseArgument,
    stage: Annotated[str, typer.Argument(help="a training phase with a data order, for example pretrain")],
    steps: Annotated[
        str | None, typer.Option(metavar="A:B", help="steps of two published checkpoints; default: the last two")
    ] = None,
    certificate: Annotated[Path | None, typer.Option(help="write an in-toto statement of the result here")] = None,
    unconfined: Annotated[
        bool, typer.Option("--unconfined", help="run code that an older release carries without bubblewrap")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Train a published piece again from its checkpoint and data, and compare every tensor.

    Where the code here is not the one that trained it, the code that the release carries is run, under bubblewrap.
    Exit code 0: every bit is the same, or all differences lie within a stated tolerance; 1: it differs.
    """
    from release.audit import replay as replays

    require_release(release)
    first, last = _span(steps)
    result = replays.replay(
        release, stage, first, last, lambda text: print(text, file=sys.stderr, flush=True), unconfined
    )
    print(json.dumps(result.to_json(), indent=1) if as_json else replays.text(result), flush=True)
    if certificate is not None:
        certificate.write_text(json.dumps(replays.certificate(result, release), indent=1, sort_keys=True) + "\n")
    if not result.ok:
        raise typer.Exit(1)


def _span(steps: str | None) -> tuple[int | None, int | None]:
    """The two numbers of A:B. Raises AtomError."""
    if steps is None:
        return None, None
    first, _, last = steps.partition(":")
    if not (first.isdigit() and last.isdigit()):
        raise AtomError(f"--steps {steps} is not A:B, two steps of published checkpoints, for example 30:60")
    return int(first), int(last)


def _verdict_text(verdict: Any) -> str:
    """One line a check, everything that is wrong below its check, and the verdict last."""
    marks = {True: "ok     ", False: "BAD    ", None: "skipped"}
    lines = []
    for check in verdict.checks:
        lines.append(f"{marks[check.ok]} {check.name}: {check.detail}")
        lines += [f"          {text}" for text in check.wrong]
        lines += [f"{marks[None]} {check.name}: {text}" for text in check.skipped]
    outcome = "verified" if verdict.ok else "NOT what it claims to be"
    return "\n".join([*lines, f"{verdict.kind} {verdict.subject}: {outcome}"])


def _published_text(report: Any) -> str:
    """One line a repository."""
    lines = [f"{r.kind} {r.repo}@{r.revision} {r.commit[:12]}" for r in report.repositories]
    visible = "public" if report.public else "private"
    return "\n".join([*lines, f"published to {report.endpoint}, {visible}, pulled back and verified"])
