"""The commands that make and publish a release: build, site, sign, publish, retract."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.core.errors import AtomError
from pipeline.core.progress import StatusLine
from pipeline.operations.command_options import RELEASE, JsonOption, RecipeArgument, graph_of, open_store
from release.commands.options import ReleaseArgument, TrustConfigOption, print_line, require_release

if TYPE_CHECKING:
    from release.hub.publish import PublishReport

app = typer.Typer()


@app.command(rich_help_panel=RELEASE)
def build(
    recipe: RecipeArgument,
    previous: Annotated[
        Path | None,
        typer.Option(metavar="RELEASE", help="an earlier release, with which cards compare"),
    ] = None,
) -> None:
    """Make the release folder, with its gates.

    All its content comes from the sealed artifacts of the recipe; a failed gate stops the build.

    Example: atom build atom-tiny
    """
    # Before the imports, so that registries get the names of the recipe's extensions.
    store, graph = open_store(), graph_of(recipe)
    from release.assembly.build_release import build as build_release
    from release.assembly.collect import build_input

    folder = build_release(build_input(graph, store, previous), store.home, print)
    print(f"release built: {folder}; next: atom verify {folder}")


@app.command(rich_help_panel=RELEASE)
def site(release: ReleaseArgument) -> None:
    """Write the web page of a release.

    `atom build` has written it. This command makes it again, after an update of atom: `site/index.html` opens in any
    browser, without a server and without a network. `atom verify` compares it with the other files of the release.

    Example: atom site runs/releases/atom-tiny-0.1.0
    """
    from release.assembly.build_release import rewrite_page
    from release.layout import PAGE

    require_release(release)
    changed = rewrite_page(release, print_line)
    print(f"{'page written' if changed else 'the page is up to date'}: {(release / PAGE).resolve().as_uri()}")


@app.command(rich_help_panel=RELEASE)
def sign(
    release: ReleaseArgument,
    key: Annotated[
        Path | None, typer.Option(help="a private key on an elliptic curve, as PEM; ATOM_KEY_PASSWORD opens it")
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

    A `model.sig` (OpenSSF Model Signing) in each covers all its files. Give the printed fingerprint to your users by
    another channel than the release itself.

    With --keyless there is no key to keep: Sigstore certifies the address or workflow that an OpenID provider vouches
    for, and its public log keeps that name forever. The credentials of a CI job are used if there are any (GitHub
    Actions, GitLab CI, Google Cloud, Buildkite); otherwise a browser opens, or a link is shown. It needs a network.

    Example: atom sign runs/releases/atom-tiny-0.1.0 --key signing.pem
    """
    from release import signing

    if keyless:
        if key is not None:
            raise AtomError("--keyless signs without a key; leave out --key")
        require_release(release)
        identity = signing.sign_keyless(release, trust_config, print_line)
        options = f"--identity {identity.name} --issuer {identity.issuer}"
        print(f"signed by {identity}; check it: atom verify {release} {options}")
        return
    if trust_config is not None:
        raise AtomError("--trust-config names an instance of Sigstore; give it with --keyless")
    if key is None:
        raise AtomError(f"no key to sign with; give --key PEM ({signing.HOW_TO}), or --keyless to sign without a key")
    signing_key = signing.SigningKey(key, os.environ.get("ATOM_KEY_PASSWORD"))
    require_release(release)
    name = signing.sign(release, signing_key, print_line)
    print(f"signed by {name}; check it: atom verify {release} --key {name}")


@app.command(rich_help_panel=RELEASE)
def publish(
    release: ReleaseArgument,
    to: Annotated[str, typer.Option("--to", metavar="NAMESPACE", help="user or organization on the Hub")],
    public: Annotated[
        bool, typer.Option("--public", help="make the repositories public after they are verified")
    ] = False,
    acknowledge: Annotated[
        list[str] | None,
        typer.Option(help="a stale stage, or `dirty`, that may be made public anyway; repeatable"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload a release to the Hub.

    The repositories are private until all are uploaded, pulled back and verified; --public then makes them public.
    HF_ENDPOINT and HF_TOKEN are respected. The page of the release becomes a static Space, which also shows the
    certificates of replays in RELEASE.replays/.

    Example: atom publish runs/releases/atom-tiny-0.1.0 --to my-organization
    """
    from release.hub.publish import publish as publish_release

    # With --json, stdout has the report alone.
    progress = StatusLine() if as_json else print_line
    report = publish_release(release, to, public, progress, acknowledge or ())
    print(json.dumps(report.to_json(), indent=1) if as_json else _published_text(report))


@app.command(rich_help_panel=RELEASE)
def retract(
    release: ReleaseArgument,
    documents: Annotated[
        list[str],
        typer.Option(help="a deny-list (docs/opt-out.md), or with --request the id of a document; repeatable"),
    ],
    request: Annotated[
        str | None, typer.Option(metavar="REFERENCE", help="of the request for documents that are given by id")
    ] = None,
    date: Annotated[str | None, typer.Option(metavar="YYYY-MM-DD", help="of that request; default: today")] = None,
    models: Annotated[
        bool, typer.Option("--models", help="also take back the models and checkpoints that were trained on them")
    ] = False,
    key: Annotated[
        Path | None, typer.Option(help="the private key of a signed release; ATOM_KEY_PASSWORD opens it")
    ] = None,
    local: Annotated[bool, typer.Option("--local", help="change the folder only, and nothing on the Hub")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would change, and change nothing")] = False,
    as_json: JsonOption = False,
) -> None:
    """Retract documents of a published release.

    Their texts leave every file; the branches on the Hub are rewritten, their history is squashed, and the old LFS
    objects are deleted. A tombstone stays. An interrupted run is finished by the same command. Without --models every
    model stays, with a notice on its card.

    Example: atom retract runs/releases/atom-tiny-0.1.0 --documents deny.jsonl --dry-run
    """
    from release import retraction, signing

    # First, since a run that was killed in the middle of a replacement may have left no folder.
    retraction.settle(release.resolve())
    require_release(release)
    signing_key = None if key is None else signing.SigningKey(key, os.environ.get("ATOM_KEY_PASSWORD"))
    result = retraction.retract(
        release,
        retraction.deny_list_of(documents, request, date),
        models,
        signing_key,
        dry_run,
        not local,
        StatusLine() if as_json else print_line,
    )
    print(json.dumps(result.to_json(), indent=1) if as_json else retraction.text(result))


def _published_text(report: PublishReport) -> str:
    """Returns one line for each repository, and one on the whole publication."""
    lines = [f"{r.kind} {r.repo}@{r.revision} {r.commit[:12]}" for r in report.repositories]
    visible = "public" if report.public else "private"
    return "\n".join([*lines, f"published to {report.endpoint}, {visible}, pulled back and verified"])
