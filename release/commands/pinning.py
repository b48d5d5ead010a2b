"""The command `pin`: what the sources of a data recipe are, before anything is paid for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.graph.recipe import lock_of
from pipeline.operations.command_options import DATA, JsonOption, open_store

app = typer.Typer()


@app.command(rich_help_panel=DATA)
def pin(
    recipe: Annotated[
        str, typer.Argument(help="name of a packaged recipe or data recipe, or path to the YAML file of either")
    ],
    no_sample: Annotated[
        bool, typer.Option("--no-sample", help="probe nothing; earlier probes of the same files stay")
    ] = False,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="write a page about all sources as well")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Pin a data recipe's sources, and probe them.

    The Hub at HF_ENDPOINT is asked for the commit of each source's revision, and for the size and digest of each file
    that matches its pattern. Files on this machine are pinned by their tree digest. Of some files, some MB are read,
    and the reader and the steps of the source run on them: what `atom plan` needs to know of licenses, languages,
    removals and tokens. Sources that are drawn from a seed have no files. All of this is written to NAME.lock.yaml
    beside the data recipe NAME.yaml, source by source. The same command goes on after an interruption. If RECIPE is a
    recipe whose tokenizer is sealed, it counts the tokens; else they are bytes_per_token of each source.

    Exit code 2 says that some source cannot be had or used as it is; the others are pinned all the same. HF_TOKEN, or
    the token of `hf auth login`, is used for private and gated datasets.

    Example: atom pin open --report sources.html
    """
    from pipeline.core.errors import AtomError
    from stages.data import pinning

    pins, failure = [], None
    path = pinning.data_recipe(recipe)
    lock, tokenizer = lock_of(path), None if no_sample else pinning.tokenizer_of(recipe, open_store())
    try:
        for row in pinning.pin(path, not no_sample, tokenizer):
            pins.append(row.json())
            if not as_json:
                print(row, flush=True)
    except AtomError as error:
        failure = error
    if as_json:
        pins.sort(key=lambda row: str(row["name"]))
        print(json.dumps({"lock": str(lock), "sources": pins, "failure": failure and str(failure)}, indent=1))
    elif pins:
        print(f"written to {lock}")
    if report is not None:
        from release.source_report.report import write_page

        write_page(report, path, "" if failure is None else str(failure))
    if failure is not None:
        raise failure
