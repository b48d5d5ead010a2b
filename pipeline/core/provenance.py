"""The ledger: files with one in-toto Statement v1 each, with an SLSA provenance v1 predicate, named by their digest.

Statements link by digest: the product of one is a material of the next. A failed attempt has a statement as well; its
subject is the attempt's log. https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, NotRequired, cast

from pydantic import AfterValidator, FiniteFloat, TypeAdapter
from typing_extensions import TypedDict

from pipeline.core import atomic_files, json_files
from pipeline.core.json_files import Damaged
from pipeline.core.store import Artifact, canonical, sha256_bytes

STATEMENT = "https://in-toto.io/Statement/v1"
PREDICATE = "https://slsa.dev/provenance/v1"
BUILD_TYPE = "urn:atom-release:stage:v1"
BUILDER = "urn:atom-release:builder:v1"
# The beginnings of the URIs of materials: an artifact by its key, a module of the code by its name.
ARTIFACT_URI = "atom:artifact/"
CODE_URI = "atom:code/"
# The byproduct of a stage that trains.
STARTS = "starts"
# The file of a product that its statement repeats, for every stage.
SUMMARY = "summary.json"
# The log of timed metrics, whose digest is a byproduct.
METRICS = "metrics.jsonl"


class _Sha256(TypedDict):
    sha256: str


class _Subject(TypedDict):
    name: str
    digest: _Sha256


class Dependency(_Subject):
    """A material: an artifact, or a module of the code."""

    uri: str


class CheckpointOf(TypedDict):
    key: str
    step: int


class Parameters(TypedDict):
    """The request of an attempt."""

    stage: str
    version: NotRequired[Any]
    node: str
    key: str
    config: dict[str, Any]
    # The phase and the step of a checkpoint.
    of: NotRequired[CheckpointOf]


class _Environment(TypedDict):
    fingerprint: str


class _Internal(TypedDict):
    environment: _Environment
    operation: NotRequired[dict[str, Any]]
    earlier_operations: NotRequired[list[dict[str, Any]]]


class _Definition(TypedDict):
    buildType: NotRequired[Any]
    externalParameters: Parameters
    internalParameters: _Internal
    resolvedDependencies: list[Dependency]


class _Metadata(TypedDict):
    invocationId: str
    startedOn: str
    finishedOn: str


class Byproduct(TypedDict):
    """An in-toto ResourceDescriptor with its content."""

    name: str
    digest: NotRequired[Any]
    annotations: NotRequired[Any]


class Deviation(TypedDict):
    """A line of a log that came out otherwise."""

    step: int | None
    """step of the line"""
    fields: dict[str, list[Any]]
    """`[logged, now]` by name"""


class Replayed(TypedDict):
    """The comparison of a start's first steps with the log of the attempt before."""

    first: int | None
    """first step that the previous attempt had logged after the checkpoint; null without any"""
    last: int | None
    """last of these steps"""
    lines: int
    """number of compared lines"""
    deviating: int
    """number of different lines"""
    deviations: list[Deviation]
    """the first ten different lines; `fields` is `{name: [logged, now]}`"""


class Rehearsed(TypedDict):
    """Measurements of the last start of a rehearsal. Its artifact has the lines that were compared."""

    tokens_per_s: FiniteFloat
    """median over ten steps"""
    planned_tokens_per_s: FiniteFloat | None
    """of the plan; null where it has no estimate, as on CPU"""
    slow: bool
    """whether that is below `rehearsal.least_of_plan` of the plan"""
    nodes: int
    """number of nodes"""
    moved_ranks: int
    """ranks that ran on another node after the restart than before it"""


class Start(TypedDict):
    """A start of a stage that trains. The stage adds the optional fields, unless it was killed before."""

    start: int
    """number of its lease"""
    startedOn: str
    """time in UTC, to the second"""
    commit: str | None
    """commit of the code; null in a wheel"""
    dirty: bool
    """whether the code was changed since that commit; false in a wheel"""
    prediction: str | None
    """digest of the [prediction](#prediction) that was sealed at that time; null without one"""
    restored_step: NotRequired[int | None]
    """step of the work checkpoint; null if the phase starts from its beginning"""
    device: NotRequired[dict[str, Any]]
    """as `environment.device`"""
    replayed: NotRequired[Replayed]
    """comparison with the log of the attempt before"""
    rehearsed: NotRequired[Rehearsed]
    """of the last start of a rehearsal"""


class _Usage(TypedDict):
    wall_seconds: NotRequired[FiniteFloat]
    cpu_seconds: NotRequired[FiniteFloat]
    gpu_seconds: NotRequired[FiniteFloat]


class _Outcome(TypedDict):
    text: str


def _has_usage_and_outcome(byproducts: list[Byproduct]) -> list[Byproduct]:
    for name, kind in (("usage", TypeAdapter(_Usage)), ("outcome", TypeAdapter(_Outcome))):
        annotations = [byproduct["annotations"] for byproduct in byproducts if byproduct["name"] == name]
        if not annotations:
            raise ValueError(f"there is no {name}")
        kind.validate_python(annotations[0], strict=True)
    return byproducts


class _Details(TypedDict):
    builder: NotRequired[Any]
    metadata: _Metadata
    byproducts: Annotated[list[Byproduct], AfterValidator(_has_usage_and_outcome)]


class _Predicate(TypedDict):
    buildDefinition: _Definition
    runDetails: _Details


class Statement(TypedDict):
    """The fields of a statement about an attempt of a stage that are read; others stay as they are."""

    _type: NotRequired[Any]
    subject: list[_Subject]
    predicateType: NotRequired[Any]
    predicate: _Predicate


BODY: TypeAdapter[Any] = TypeAdapter(Statement)


def clock(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """The content of a statement about one attempt of a stage.

    Attributes:
        subject: SHA-256 of the artifact by its key, or of the log of a failed attempt by its place.
        stage: Name of the stage.
        version: Version of the stage.
        node: Name of the node.
        key: Key of the node, or of the checkpoint.
        config: The part of the config that is in the key.
        operations: Operational fields of this attempt and of the attempts that it resumed, the latest last.
        materials: Input artifacts by role.
        code: SHA-256 of the modules of the stage.
        environment: The result of `environment.describe`.
        invocation: `<run>/<node>`: the place of the logs.
        started: Seconds since the epoch.
        finished: Seconds since the epoch.
        usage: Time, energy and cost, with the method of each.
        outcome: "sealed", or one sentence on the failure.
        kind: The kind of a failure.
        checkpoint_of: The phase and the step of a checkpoint.
        product: The sealed artifact. Its summary.json becomes a byproduct, so that the ledger alone has it.
        starts: The record of each start whose work the product contains, for a stage that trains.
        metrics: SHA-256 of the timed metrics of a sealed artifact.
    """

    subject: dict[str, str]
    stage: str
    version: int
    node: str
    key: str
    config: Mapping[str, Any]
    operations: list[dict[str, Any]]
    materials: dict[str, Artifact]
    code: dict[str, str]
    environment: dict[str, Any]
    invocation: str
    started: float
    finished: float
    usage: Mapping[str, Any]
    outcome: str
    kind: str | None = None
    checkpoint_of: CheckpointOf | None = None
    product: Artifact | None = None
    starts: list[Start] | None = None
    metrics: str | None = None


def statement(record: AttemptRecord) -> Statement:
    """Returns the statement about an attempt."""
    parameters = {name: getattr(record, name) for name in ("stage", "version", "node", "key", "config")}
    if record.checkpoint_of:
        parameters["of"] = record.checkpoint_of
    internal: dict[str, Any] = {"environment": record.environment, "operation": record.operations[-1]}
    if record.operations[1:]:
        internal["earlier_operations"] = record.operations[:-1]

    artifacts = sorted(record.materials.items())
    dependencies = [_dependency(role, f"{ARTIFACT_URI}{a.key}", a.digest) for role, a in artifacts]
    dependencies += [_dependency(name, f"{CODE_URI}{name}", digest) for name, digest in record.code.items()]

    failure = {"kind": record.kind} if record.kind else {}
    byproducts: list[Byproduct] = [
        {"name": "usage", "annotations": record.usage},
        {"name": "outcome", "annotations": {"text": record.outcome} | failure},
    ]
    if record.starts:
        byproducts.append({"name": STARTS, "annotations": {"starts": record.starts}})
    if record.product:
        byproducts += summaries(record.product)
    if record.metrics:
        byproducts.append({"name": METRICS, "digest": {"sha256": record.metrics}})

    started, finished = clock(record.started), clock(record.finished)
    return {
        "_type": STATEMENT,
        "subject": [{"name": name, "digest": {"sha256": digest}} for name, digest in sorted(record.subject.items())],
        "predicateType": PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": cast(Parameters, parameters),
                "internalParameters": cast(_Internal, internal),
                "resolvedDependencies": dependencies,
            },
            "runDetails": {
                "builder": {"id": BUILDER},
                "metadata": {"invocationId": record.invocation, "startedOn": started, "finishedOn": finished},
                "byproducts": byproducts,
            },
        },
    }


def _dependency(name: str, uri: str, digest: str) -> Dependency:
    return {"name": name, "uri": uri, "digest": {"sha256": digest}}


def summaries(product: Artifact) -> Iterator[Byproduct]:
    """Yields the byproduct of a product's summary.json, if it has one."""
    for row in product.rows:
        if row.path == SUMMARY:
            # A number without a JSON form (NaN, infinity) becomes a string: it must not prevent the statement of a
            # finished stage.
            content = json.loads((product / SUMMARY).read_text(), parse_constant=str)
            yield {"name": SUMMARY, "digest": {"sha256": row.sha256}, "annotations": content}


def write(ledger: Path, key: str, body: Statement) -> Path:
    """Writes a statement to `<ledger>/<key>/<sha256 of its bytes>.json`, completely or not at all."""
    data = canonical(body)
    folder = ledger / key
    folder.mkdir(parents=True, exist_ok=True)
    # The name is the digest of the bytes, so a statement that is edited later is noticed.
    target = folder / f"{sha256_bytes(data)}.json"
    atomic_files.write(target, data, durable=True)
    return target


def statements(ledger: Path, key: str) -> tuple[list[tuple[Path, Statement]], list[Damaged]]:
    """Returns all statements about a key, in the order of their end times, and those that cannot be read."""
    readable, damaged = [], []
    try:
        names = [name for name in json_files.names(ledger / key) if re.fullmatch(r"[0-9a-f]+\.json", name)]
    except Damaged as error:
        return [], [error]
    for name in names:
        path = ledger / key / name
        try:
            data = json_files.read_bytes(path)
            body = json_files.parse(data, path, BODY)
            if sha256_bytes(data) != path.stem:
                raise Damaged(path, "its bytes are not those that it is named by")
            readable.append((path, body))
        except FileNotFoundError:
            continue
        except Damaged as error:
            damaged.append(error)
    return sorted(readable, key=lambda item: item[1]["predicate"]["runDetails"]["metadata"]["finishedOn"]), damaged


def read(ledger: Path, key: str) -> Iterator[tuple[Path, Statement]]:
    """Yields all statements about a key that can be read, in the order of their end times; the others are reported."""
    readable, damaged = statements(ledger, key)
    for error in damaged:
        json_files.report(error, "this statement is left out")
    yield from readable


def outcome(body: Statement) -> str:
    return str(_byproducts(body)["outcome"]["annotations"]["text"])


def kind(body: Statement) -> str | None:
    """Returns the kind of a failure; None of a product."""
    failure_kind = _byproducts(body)["outcome"]["annotations"].get("kind")
    return None if failure_kind is None else str(failure_kind)


def usage(body: Statement) -> dict[str, Any]:
    return dict(_byproducts(body)["usage"]["annotations"])


def summary(body: Statement) -> Byproduct | None:
    """Returns the byproduct of a product's summary.json, whose content are its annotations; None without one."""
    return _byproducts(body).get(SUMMARY)


def metrics(body: Statement) -> str | None:
    """Returns the SHA-256 of the timed metrics of a sealed product; None if it has none."""
    product = _byproducts(body).get(METRICS)
    return None if product is None else str(product["digest"]["sha256"])


def starts(body: Statement) -> list[Start]:
    """Returns the records of the starts of a stage that trains; none of another stage."""
    product = _byproducts(body).get(STARTS)
    return [] if product is None else list(product["annotations"]["starts"])


def _byproducts(body: Statement) -> dict[str, Byproduct]:
    # Of several byproducts with one name, the first one counts.
    return {product["name"]: product for product in reversed(body["predicate"]["runDetails"]["byproducts"])}


def sealed(ledger: Path, artifact: Artifact) -> tuple[Path, Statement] | None:
    """Returns the statement that made this very artifact, with its file; None without one."""
    for path, body in read(ledger, artifact.key):
        if {"name": artifact.key, "digest": {"sha256": artifact.digest}} in body["subject"]:
            return path, body
    return None


def parameters_of(body: Statement) -> Parameters:
    """Returns the request of the attempt: stage, node, key and config."""
    return body["predicate"]["buildDefinition"]["externalParameters"]


def dependencies_of(body: Statement) -> list[Dependency]:
    """Returns the artifacts and modules that a statement says went in."""
    return body["predicate"]["buildDefinition"]["resolvedDependencies"]


def code_of(body: Statement) -> dict[str, str]:
    """Returns {module: sha256} of the code that a statement says it ran."""
    return {d["name"]: d["digest"]["sha256"] for d in _dependencies(body, CODE_URI)}


def materials_of(body: Statement) -> dict[str, str]:
    """Returns {role: sha256} of the artifacts that a statement says went in."""
    return {d["name"]: d["digest"]["sha256"] for d in _dependencies(body, ARTIFACT_URI)}


def material_keys(body: Statement) -> dict[str, str]:
    """Returns {role: key} of the artifacts that a statement says went in."""
    return {d["name"]: d["uri"].removeprefix(ARTIFACT_URI) for d in _dependencies(body, ARTIFACT_URI)}


def _dependencies(body: Statement, uri: str) -> list[Dependency]:
    return [dependency for dependency in dependencies_of(body) if dependency["uri"].startswith(uri)]


def phase_of(body: Statement) -> str | None:
    """Returns the key of the phase that a checkpoint is of; None if the statement is about something else."""
    checkpoint_of = parameters_of(body).get("of")
    return str(checkpoint_of["key"]) if checkpoint_of else None


def environment_of(body: Statement) -> dict[str, Any]:
    """Returns the environment of the attempt."""
    return dict(body["predicate"]["buildDefinition"]["internalParameters"]["environment"])


def operation_of(body: Statement) -> dict[str, Any]:
    """Returns the operational part of the config of the attempt."""
    return dict(body["predicate"]["buildDefinition"]["internalParameters"].get("operation", {}))


def invocation(body: Statement) -> str:
    """Returns `<run>/<node>`: the place of the attempt's logs."""
    return str(body["predicate"]["runDetails"]["metadata"]["invocationId"])


def operations_of(body: Statement) -> list[dict[str, Any]]:
    """Returns the operational configs of the attempt and of those that it resumed, the latest last."""
    earlier = body["predicate"]["buildDefinition"]["internalParameters"].get("earlier_operations", [])
    return [*earlier, operation_of(body)]
