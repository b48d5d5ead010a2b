"""Checks that the order of training is within the training documents, and ends at the last checkpoint."""

from __future__ import annotations

from release.assembly.checkpoint_facts import read_checkpoints
from release.assembly.published_tables import stream_rows
from release.checks.check import BuildContext, Subject
from release.checks.findings import Findings
from release.layout import WITHOUT_ORDER, phases_of


def segments(subject: Subject) -> Findings:
    """Checks that every segment of the order is within a training document, and that no held-out document was trained
    on."""
    dataset = subject.folder
    columns = ["source", "split", "ordinal", "id", "tokens"]
    earlier = sorted((dataset / "earlier").glob("order-*/order.parquet"))
    current = dataset / "tokens/documents.parquet"
    # An earlier run may have had different documents, which are then beside its order.
    tables = [*(dataset / "earlier").glob("tokenize-*/documents.parquet"), current]
    problems = []
    for path in sorted((dataset / "order").glob("*/order.parquet")) + earlier:
        training_documents = {
            (row["source"], row["ordinal"], row["id"]): row["tokens"]
            for table in (tables if path in earlier else [current])
            for row in stream_rows(table, columns)
            if row["split"] == "train"
        }
        name, previous = path.relative_to(dataset).as_posix(), (0, 0, -1)
        for row in stream_rows(path, ["step", "row", "segment", "source", "ordinal", "id", "offset", "length"]):
            tokens = training_documents.get((row["source"], row["ordinal"], row["id"]))
            if tokens is None:
                problems.append(
                    f"{name}: step {row['step']} row {row['row']} is {row['id']}, which is no training document"
                )
            elif not 0 <= row["offset"] < row["offset"] + row["length"] <= tokens:
                problems.append(f"{name}: step {row['step']} row {row['row']} reaches beyond the end of {row['id']}")
            position = (row["step"], row["row"], row["segment"])
            if position <= previous:
                problems.append(f"{name}: step {row['step']} row {row['row']} is out of order or doubled")
            previous = position
    return Findings(problems)


def checkpoints_and_order(build: BuildContext) -> Findings:
    """Checks that every phase has checkpoints, and an order from its first step to that of the last checkpoint."""
    rows = read_checkpoints(build.folder / "checkpoints")
    orders, findings = build.data.order, Findings()
    findings.summary = f"{len(rows)} checkpoints; order of {', '.join(orders)}"
    for phase in phases_of(build.release.nodes):
        steps = [row.step for row in rows if row.phase == phase]
        if not steps:
            findings.problems.append(f"no checkpoint of {phase}; set {phase}.release_checkpoint_interval")
        elif phase in WITHOUT_ORDER:
            continue
        elif phase not in orders:
            findings.problems.append(f"no order index of {phase}; run its order stage")
        elif (first := orders[phase].parts[0].first_step) != 1:
            text = f"the order of {phase} begins with step {first}"
            findings.problems.append(f"{text}; the order that the checkpoint followed is missing")
        elif steps[-1] != orders[phase].steps:
            text = f"the last checkpoint of {phase} is step {steps[-1]}, the order has {orders[phase].steps} steps"
            findings.problems.append(f"{text}; finish the training stage")
    return findings
