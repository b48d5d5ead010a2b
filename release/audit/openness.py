"""The openness of a release: twenty questions, each answered from the published files with evidence and a reason.

Y: yes. P: partly. N: no. The questions, in openness.yaml, join those of the Model Openness Framework (arXiv
2403.13784), OSAID 1.0 and the transparency duties of the EU's AI Act with what auditors of open models ask. A row is a
yes only if its claim was shown, by the files or by somebody else. A claim of the maker's own is a part. `atom verify`
checks that the files are right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import yaml

from pipeline.core import provenance
from pipeline.core.errors import AtomError
from pipeline.core.yaml_text import read_trusted
from release import layout, references, schema
from release.audit.replay.plan import Plan, select_steps
from release.audit.replay.report import read_certificates
from release.audit.replay.source import Source
from release.facts import run_facts
from release.facts.published_tables import read_json
from release.facts.score_facts import CONTAMINATION
from release.layout import (
    GATES,
    MODEL,
    ORIGINS,
    RECIPE,
    REFERENCES,
    SIGNATURE,
    SIZE,
    TRAINING,
    WITHOUT_ORDER,
    numbered,
    phases_of,
)
from release.opened_release import Release
from release.signing import recorded_identity
from release.standards import bundle
from release.standards.frameworks import NO_CLASS
from release.standards.standard_facts import NOT_STATED
from stages.evaluation.scores import VERDICTS
from stages.train.imported_weights import NAME as BASE

SMALL_BYTES = 4_000_000_000
"""The size of weights that a laptop holds: a billion parameters in fp32."""
LEAST_SIZES = 2
"""Smaller models of a family of sizes."""
BY_SOURCE = ("", "none")
"""Bases of a license that were not found in the document's own row, file or page."""
Answer = tuple[Literal["Y", "P", "N"], str, Sequence[str]]
"""The answer, its reason, and the paths of its evidence."""


@dataclass(frozen=True)
class Row:
    """A question and its answer.

    Attributes:
        name: The question in a few words.
        answer: Y, P or N.
        reason: Why, in a few words.
        evidence: Paths in the release.
        for_a_yes: What the maker must add for a Y; "" if the answer is Y.
    """

    name: str
    answer: Literal["Y", "P", "N"]
    reason: str
    evidence: tuple[str, ...]
    for_a_yes: str


class Published(Release):
    """A release with what several rows read.

    Attributes:
        identity: The identity of the signer, as `atom verify` checked it; "" if it did not.
    """

    def __init__(self, folder: Path, identity: str = "") -> None:
        super().__init__(folder)
        self.identity = identity

    @cached_property
    def gates(self) -> dict[str, Any]:
        gates: dict[str, Any] = read_json(self.root / GATES)
        return gates

    @cached_property
    def phases(self) -> list[str]:
        """The phases that trained, in their order."""
        return phases_of(path.name for path in (self.root / "evidence/training").iterdir())

    @cached_property
    def published_base(self) -> str | None:
        """The repository of the published model that training began with; None without one."""
        path = self.root / "evidence" / BASE
        return str(read_json(path)["repo"]) if path.exists() else None

    def without(self, paths: dict[str, str]) -> list[str]:
        """Returns the names whose path, or pattern, matches no file."""
        return [name for name, path in paths.items() if next(self.root.glob(path), None) is None]

    def passed(self, gate: str) -> str | None:
        """Returns the detail of a gate that was passed."""
        result = self.gates.get(gate, {})
        return result["detail"] if result.get("ok") else None


def _complete(missing: Sequence[str], total: int, whole: str, lack: str, evidence: Sequence[str]) -> Answer:
    """Returns Y if nothing is missing, N if all of `total` is, else P."""
    if not missing:
        return "Y", whole, evidence
    none_is_there = len(missing) == total
    return "N" if none_is_there else "P", f"{lack} {', '.join(missing)}", [] if none_is_there else evidence


def _of_gate(release: Published, gate: str, evidence: Sequence[str]) -> Answer:
    detail = release.passed(gate)
    return ("N", f"the gate {gate} was not passed", [GATES]) if detail is None else ("Y", detail, [*evidence, GATES])


def _of_standards(release: Published, paths: Sequence[str]) -> Answer:
    """Returns Y if the documents are there and the gate found them valid and right."""
    if missing := release.without({path: path for path in paths}):
        return "N", f"there is no {missing[0]}", []
    return _of_gate(release, "standards", paths)


def _of_files(release: Published, question: Mapping[str, Any]) -> Answer:
    """Answers a question by the files of a release, of each phase or of the whole."""
    phases, paths = release.phases, question.get("paths", {})
    if "phases" in question:
        if question.get("ordered"):
            phases = [phase for phase in phases if numbered(phase)[0] not in WITHOUT_ORDER]
        paths = {phase: question["phases"].format(phase=phase) for phase in phases}
    whole = question["whole"].format(phases=", ".join(phases))
    return _complete(release.without(paths), len(paths), whole, question["lack"], question["evidence"])


def documents(release: Published, evidence: Sequence[str]) -> Answer:
    import pyarrow.parquet as pq

    files = layout.all_files(layout.kept_files(release.dataset))
    texts = sum(pq.ParquetFile(path).metadata.num_rows for path in files)
    sources = read_json(release.dataset / "summary.json")["sources"].values()
    kept = sum(sum(s["kept"].values()) if isinstance(s["kept"], dict) else s["kept"] for s in sources)
    if by_reference := references.read(release.dataset):
        named = ", ".join(f"{name} ({each.origin})" for name, each in by_reference.items())
        reason = f"of {kept:,} kept documents the texts, or how `atom rebuild-data` gets them again: {named}"
        return ("Y" if texts == kept else "P"), reason, [*evidence, f"dataset/{REFERENCES}"]
    if texts == kept and (base := release.published_base) is not None:
        reason = f"the texts of all {kept:,} documents of this training; those of {base}, which it began with, are not"
        return "P", reason, [*evidence, f"evidence/{BASE}"]
    if texts == kept:
        return "Y", f"the texts of all {kept:,} documents that were kept", evidence
    return "P" if texts else "N", f"the texts of {texts:,} of {kept:,} documents", evidence


def licenses(release: Published, evidence: Sequence[str]) -> Answer:
    answer, detail, evidence = _of_gate(release, "licenses_known", evidence)
    if answer == "N":
        return answer, detail, evidence
    by_source = []
    for path in sorted((release.dataset / "sources").glob("*.json")):
        source = read_json(path)
        # A source that lists no licenses declares one for all its documents.
        bases = {row["found"] for row in source.get("licenses", [])} or {""}
        if source.get("files") != 0 and not bases.isdisjoint(BY_SOURCE):
            by_source.append(source["name"])
    if by_source:
        detail += f"; declared for the whole source, not document by document: {', '.join(by_source)}"
    return ("P" if by_source else "Y"), detail, evidence


def rollouts(release: Published, evidence: Sequence[str]) -> Answer:
    kinds = {phase: numbered(phase)[0] for phase in release.phases}
    # Phases without an order are those that sample answers.
    wanted = {phase: f"dataset/rl/{phase}/rollouts.parquet" for phase, k in kinds.items() if k in WITHOUT_ORDER}
    wanted.pop("reward", None)  # it learns from the pairs of others
    if "dpo" in kinds.values():
        wanted["pairs of dpo"] = "dataset/rl/dpo/pairs.parquet"
    if read_json(release.root / RECIPE).get("preferences"):
        wanted["pairs of preferences"] = "dataset/rl/preferences/preferences.parquet"
    if not wanted:
        return "Y", "no phase draws answers", ["evidence/training"]
    whole = "every sampled answer with tokens, log-probabilities and reward"
    return _complete(release.without(wanted), len(wanted), whole, "no table of", evidence)


def outputs(release: Published, evidence: Sequence[str]) -> Answer:
    evaluation = release.dataset / "evaluation"
    measured = [path.parent.relative_to(release.root).as_posix() for path in sorted(evaluation.rglob("scores.json"))]
    missing = release.without({folder: f"{folder}/*.parquet" for folder in measured})
    whole = f"tables beside {len(measured)} files of scores"
    return _complete(missing, len(measured), whole, "scores alone in", evidence)


def contamination(release: Published, evidence: Sequence[str]) -> Answer:
    if release.passed("contamination_report") is None:
        return (
            "P",
            "documents with items were removed by a rule; nobody searched for the rest",
            ["dataset/dispositions"],
        )
    report = read_json(release.dataset / CONTAMINATION)
    # Items for validation are no test items.
    splits = [verdicts for split, verdicts in report["items"].items() if split != "validation"]
    counts = {name: sum(verdicts[name] for verdicts in splits) for name in VERDICTS}
    detail = ", ".join(f"{count:,} {name}" for name, count in counts.items())
    reason = f"of the test items {detail}"
    return ("Y" if set(+Counter(counts)) <= {"clean"} else "P"), reason, evidence


def _lack_of_replay(source: Source, phase: str) -> str:
    """Returns what a replay of a phase's last steps lacks; "" if nothing."""
    try:
        Plan.read(source, phase, *select_steps(source, phase, None, None))
    except (AtomError, KeyError, TypeError, ValueError, AttributeError) as error:
        return str(error) or type(error).__name__
    return ""


def replay(release: Published, evidence: Sequence[str]) -> Answer:
    source = Source(release.root)
    reasons = [f"{phase} ({lack})" for phase in release.phases if (lack := _lack_of_replay(source, phase))]
    command = f"`atom replay . PHASE` has all it needs of {', '.join(release.phases)}"
    return _complete(reasons, len(release.phases), command, "not of", evidence)


def bitwise(release: Published, evidence: Sequence[str]) -> Answer:
    """Answers if the training can be repeated bit for bit.

    Never Y from files: a certificate has no signature, so its maker may have written it.
    """
    stated = {
        certificate.notes["phase"]: certificate.path.name
        for certificate in read_certificates(release.root)
        if certificate.result == "PASSED" and certificate.notes["tensors_that_differ"] == 0
    }
    devices = set()
    for body in release.statements.values():
        if numbered(provenance.parameters_of(body)["node"].split("@")[0])[0] in (*TRAINING, SIZE):
            devices.add(str(provenance.environment_of(body).get("device", {}).get("type", "unknown")))
    trained = f"trained on {', '.join(sorted(devices))}"
    promise = "equal bits in an equal environment are promised" if devices == {"cpu"} else "a tolerance is stated"
    missing = [phase for phase in release.phases if phase not in stated]
    parts = [trained, promise]
    if shown := [f"{phase} ({stated[phase]})" for phase in release.phases if phase in stated]:
        parts.append(f"unsigned certificates say so of {', '.join(shown)}")
    if missing:
        parts.append(f"no certificate says so of {', '.join(missing)}")
    return "P", "; ".join(parts), evidence


def signatures(release: Published, evidence: Sequence[str]) -> Answer:
    places = [f"{place.folder}/{SIGNATURE}".lstrip("/") for place in release.repositories]
    missing = release.without({path: path for path in places})
    present = [path for path in places if path not in missing]
    whole = f"{len(places)} repositories and branches"
    answer, reason, evidence = _complete(missing, len(places), whole, "`atom sign` has not written", present)
    if answer != "Y":
        return answer, reason, evidence
    if None in {recorded_identity(release.root / path) for path in present}:
        return "P", f"{whole}, by a key; nothing outside the release vouches for it", evidence
    if not release.identity:
        return "P", f"{whole}, by an identity that nothing has checked", evidence
    return "Y", f"{whole}, by {release.identity}, which was checked", evidence


def bill(release: Published, evidence: Sequence[str]) -> Answer:
    answer, detail, evidence = _of_standards(release, evidence)
    if answer == "N":
        return answer, detail, evidence
    packages = read_json(release.root / bundle.RECORDED)
    licensed, locked = (sum(bool(package[name]) for package in packages) for name in ("license", "hashes"))
    counts = f"{len(packages)} packages, {licensed} with an SPDX license, {locked} with hashes"
    return answer, f"CycloneDX 1.7 and SPDX 3.0.1, valid: models, sources and {counts}", evidence


def eu_summary(release: Published, evidence: Sequence[str]) -> Answer:
    answer, detail, evidence = _of_standards(release, evidence)
    if answer == "N":
        return answer, detail, evidence
    body = read_json(release.root / bundle.EU_SUMMARY)
    counts = Counter(field["basis"] for section in body["sections"] for field in section["fields"])
    stated = f"{counts['computed']} answers computed, {counts['maker']} by the maker"
    reason = f"by the template {body['template']}: {stated}, {counts[NOT_STATED]} not stated"
    return ("P" if counts[NOT_STATED] else "Y"), reason, evidence


def framework(release: Published, evidence: Sequence[str]) -> Answer:
    answer, detail, evidence = _of_standards(release, evidence)
    if answer == "N":
        return answer, detail, evidence
    body = yaml.safe_load((release.root / bundle.MOF).read_text())
    missing = [text for texts in body["missing"].values() for text in texts]
    lack = f"; missing: {'; '.join(missing)}" if missing else ""
    reason = f"seventeen components with reasons, class: {body['class']}{lack}"
    return ("P" if body["class"] == NO_CLASS else "Y"), reason, evidence


def energy(release: Published, evidence: Sequence[str]) -> Answer:
    if release.without({bundle.ENERGY: bundle.ENERGY}):
        return "N", f"there is no {bundle.ENERGY}", []
    usages = [provenance.usage(body) for body in release.statements.values() if provenance.phase_of(body) is None]
    counted = sum("energy_joules_estimate" in usage for usage in usages)
    if not counted:
        return "N", "no statement has the energy of its stage", []
    body = read_json(release.root / bundle.ENERGY)
    estimate = f"{body['total']['energy_kwh']:.3g} kWh by an estimate for {counted} of {len(usages)} attempts"
    if (carbon := body["factors"]["carbon"]) is None:
        return "P", f"{estimate}; no carbon, since the maker states no factor", evidence
    factor = f"{carbon['grams_per_kwh']:g} g/kWh ({carbon['source']})"
    return "P", f"{estimate}; {body['total']['co2_kg']:.3g} kg CO2e by {factor}", evidence


def sizes(release: Published, evidence: Sequence[str]) -> Answer:
    sizes, source = release.sizes[1:], Source(release.root)
    places = [f"{run_facts.TRAINING}/{size.name}" for size in sizes]
    reasons = [f"{size.name} ({lack})" for size in sizes if (lack := _lack_of_replay(source, size.name))]
    if reasons:
        return "P", f"not all of {len(sizes)} smaller models can be trained again: {', '.join(reasons)}", places
    if sizes:
        named = ", ".join(f"{size.name} of {size.total:,} parameters, loss {size.loss:.3f}" for size in sizes)
        reason = f"{named}; of each recipe, log, weights and optimizer; `atom replay . {sizes[0].name}` trains it again"
        answer: Literal["Y", "P", "N"] = "Y" if len(sizes) >= LEAST_SIZES else "P"
        return answer, f"{reason}; pre-training alone, not exported", [*places, "checkpoints", "dataset/order/pretrain"]
    size = sum(path.stat().st_size for path in (release.root / MODEL).glob("*.safetensors"))
    answer = "P" if size <= SMALL_BYTES else "N"
    return answer, f"weights of {size / 1e6:,.1f} MB, one size; a release names no others of its recipe", [MODEL]


FUNCTIONS = [documents, licenses, rollouts, outputs, contamination, replay, bitwise, signatures, bill]
FUNCTIONS += [eu_summary, framework, energy, sizes]
"""The answers that take more than a gate or the presence of files, by their names in openness.yaml."""


def rows(folder: Path, identity: str = "") -> Iterator[Row]:
    """Yields the twenty rows, in order. Raises AtomError if the folder is not a whole release that can be read.

    Args:
        folder: Of the release.
        identity: Of the signer of all its repositories, which the caller has checked; "" if it has not.
    """
    if not (folder / ORIGINS).is_file() or not (folder / "checkpoints").is_dir():
        raise AtomError(f"{folder} is not a whole release; the openness of one repository alone is not computed")
    schema.require_readable(folder)
    published = Published(folder, identity)
    functions = {function.__name__: function for function in FUNCTIONS}
    for question in read_trusted(Path(__file__).with_suffix(".yaml")):
        if "function" in question:
            answer, reason, evidence = functions[question["function"]](published, question["evidence"])
        elif "gate" in question:
            answer, reason, evidence = _of_gate(published, question["gate"], question["evidence"])
        else:
            answer, reason, evidence = _of_files(published, question)
        for_a_yes = "" if answer == "Y" else question["for_a_yes"]
        yield Row(question["name"], answer, reason, tuple(evidence), for_a_yes)


def to_json(table: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in table]


def text(table: Sequence[Row]) -> str:
    lines = []
    for row in table:
        lines.append(f"{row.answer}  {row.name}: {row.reason}")
        if row.for_a_yes:
            lines.append(f"     for a yes: {row.for_a_yes}")
    counts = {answer: sum(row.answer == answer for row in table) for answer in "YPN"}
    return "\n".join([*lines, f"openness: {counts['Y']} of {len(table)} yes, {counts['P']} partly, {counts['N']} no"])
