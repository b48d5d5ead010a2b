"""A second verifier of a release, which shares no code with `atom`: it follows docs/formats.md and nothing else.

    python evidence/independent_verifier.py RELEASE        # Python 3.11 or newer, with pyarrow

RELEASE is the whole folder of a release of format 1, as it was built: no document was taken back. Each check below has
a sentence, and every problem is a line. The exit code is 0 for a sound release, 1 for problems, 2 if RELEASE is none.
Ids are kept, some 200 bytes of memory for each document; texts are not.
"""

import hashlib
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

FORMAT = 1
SUMS = "SHA256SUMS"
SIGNATURES = {"model.sig", "model.pub"}  # they sign the checksums, and are in none
GATES = {"evidence/gates.json", "evidence/attestations/gates.json"}  # without an origin
KEPT = ["id", "source", "content_hash", "license", "split"]
TOKENS = ["id", "source", "split", "part", "ordinal", "content_hash", "tokens"]
near = partial(math.isclose, rel_tol=1e-9, abs_tol=1e-12)


def files(root: Path) -> dict[str, Path]:
    paths = {p.relative_to(root).as_posix(): p for p in sorted(root.rglob("*")) if p.is_symlink() or not p.is_dir()}
    return {name: path for name, path in paths.items() if "/.cache/" not in f"/{name}"}


def canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@cache
def file_sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def parts(folder: Path) -> list[Path]:
    """The files of a table in the order of their numbers."""
    return sorted(folder.glob("part-*.parquet"), key=lambda path: int(path.stem.split("-")[1]))


def rows(path: Path, columns: list[str] | None = None) -> Iterator[dict[str, Any]]:
    for batch in pq.ParquetFile(path).iter_batches(2048, columns=columns):
        yield from batch.to_pylist()


def checksums(root: Path) -> Iterator[str]:
    """Each file is listed with its digest, each listed file is there, and nothing is a link."""
    present = files(root)
    digests = {name: file_sha256(path) for name, path in present.items() if path.is_file() and not path.is_symlink()}
    yield from (f"{name} is a link, or no regular file" for name in present if name not in digests)
    covered = set()
    for sums in sorted(name for name in digests if name.rpartition("/")[2] == SUMS):
        base = "" if sums == f"evidence/{SUMS}" else sums[: -len(SUMS)]
        for line in present[sums].read_text(encoding="utf-8").splitlines():
            digest, _, name = line.partition("  ")
            covered.add(base + name)
            if digests.get(base + name) != digest:
                yield f"{base + name} is not the file that {sums} lists"
    unlisted = {name for name in digests if name.rpartition("/")[2] in SIGNATURES} | {SUMS}
    yield from (f"{name} is in no checksum file" for name in sorted(set(digests) - covered - unlisted))


def artifacts(root: Path) -> dict[str, Any]:
    """Returns {node or key: manifest}."""
    return {path.stem: read(path) for path in sorted((root / "evidence/manifests").glob("*.json"))}


def provenance(root: Path) -> Iterator[str]:
    """Manifests have their digests, and every file is one of an artifact or is listed as generated."""
    manifests = artifacts(root)
    for node, manifest in manifests.items():
        listed = sorted([row["path"], row["size"], row["sha256"]] for row in manifest["files"])
        if sha256(canonical(listed)) != manifest["digest"]:
            yield f"evidence/manifests/{node}.json does not have the digest of its rows"
    for node, stated in read(root / "evidence/release.json")["nodes"].items():
        if {name: manifests.get(node, {}).get(name) for name in ("key", "digest")} != stated:
            yield f"evidence/release.json: the artifact of {node} has another key or digest than its manifest"
    origins, present = read(root / "evidence/origins.json"), files(root)
    digests = {(node, row["path"]): row["sha256"] for node, m in manifests.items() for row in m["files"]}
    for name, origin in sorted(origins.items()):
        if name not in present:
            yield f"{name} has an origin and is missing"
        elif "artifact" in origin and digests.get((origin["artifact"], origin["file"])) != file_sha256(root / name):
            yield f"{name} is not {origin['file']} of {origin['artifact']}"
    known = origins.keys() | GATES | {n for n in present if n.startswith("site/")}
    yield from (f"{n} has no origin" for n in present if n not in known and present[n].name not in SIGNATURES | {SUMS})


def statements(root: Path) -> Iterator[str]:
    """Each artifact has a statement; a key follows from stage, version, config and the keys of the inputs."""
    digests = {manifest["key"]: manifest["digest"] for manifest in artifacts(root).values()}
    stated = set()
    for path in sorted((root / "evidence/statements").glob("*.json")):
        body, name = read(path), f"evidence/statements/{path.name}"
        if path.stem != file_sha256(path):
            yield f"{name} is not named by its digest"
        build = body["predicate"]["buildDefinition"]
        external = build["externalParameters"]
        uris = {item["name"]: item for item in build["resolvedDependencies"] if "atom:artifact/" in item["uri"]}
        inputs = {role: item["uri"].removeprefix("atom:artifact/") for role, item in uris.items()}
        made_of = [external["stage"], external["version"], external["config"], inputs]
        if phase := external.get("of"):  # of a release checkpoint
            made_of = [phase["key"], phase["step"]]
        if (key := f"{external['node']}-{sha256(canonical(made_of))[:12]}") != external["key"]:
            yield f"{name}: the key {external['key']} does not follow from the config and inputs, which give {key}"
        for subject in body["subject"]:
            if digests.get(subject["name"]) == subject["digest"]["sha256"]:
                stated.add(subject["name"])
                for role, item in uris.items():
                    if digests.get(inputs[role]) != item["digest"]["sha256"]:
                        yield f"{name}: its input {inputs[role]} is no artifact of this release"
    yield from (f"no statement is about the artifact {key} as it is here" for key in sorted(set(digests) - stated))


def documents(root: Path) -> Iterator[str]:
    """In = kept + removed; each kept text has its hash, in all three tables; ids are unique."""
    data = root / "dataset"
    by_reference = read(data / "references.json")["sources"] if (data / "references.json").exists() else {}
    for source in sorted(path.name for path in (data / "dispositions").iterdir()):
        ids, counts = set[str](), Counter[tuple[str, bool]]()
        for path in parts(data / "dispositions" / source):
            kept, tokens = (data / folder / source / path.name for folder in ("kept", "tokens/documents"))
            place, expected = f"{source}/{path.name}", []
            for row in rows(path):
                counts[row["disposition"], bool(row["rule"])] += 1
                if row["id"] in ids or not row["license"]:
                    yield f"{place}: document {row['id']} has two dispositions, or no license"
                ids.add(row["id"])
                if row["disposition"] == "kept":
                    expected.append((row["id"], row["kept_hash"], row["split"], row["license"]))
            given, columns = [], ["id", "content_hash", "split", "license"]
            for row in rows(kept, [*columns, "text"]):
                text, stated = row["text"], source in by_reference
                if (text is None) != stated or (not stated and sha256(text.encode()) != row["content_hash"]):
                    yield f"{place}: the text of {row['id']} is not that of its hash"
                given.append(tuple(row[name] for name in columns))
            if given != expected:
                yield f"{place}: the kept documents are not those of the dispositions"
            shards = [tuple(row[name] for name in columns) for row in rows(tokens, columns)]
            if sorted(shards, key=lambda row: row[2]) != sorted(expected, key=lambda row: row[2]):
                yield f"{place}: the tokenized documents are not the kept ones"
        if set(counts) - {("kept", False), ("removed", True)}:
            yield f"{source}: a document is neither kept nor removed by a rule"
        if counts.total() != (total := read(data / "summary.json")["sources"][source]["documents_in"]):
            yield f"{source}: {counts.total()} dispositions of {total} documents"


def merkle_leaf(row: dict[str, Any]) -> bytes:
    return canonical({k: str(x) if isinstance(x, float) and not math.isfinite(x) else x for k, x in row.items()})


def merkle_root(leaves: Iterable[bytes]) -> str:
    """RFC 9162, section 2.1: complete subtrees of the left, largest first, joined from the right."""
    subtrees: list[tuple[int, bytes]] = []  # (leaves, hash), of falling sizes
    for leaf in leaves:
        size, node = 1, hashlib.sha256(b"\0" + leaf).digest()
        while subtrees and subtrees[-1][0] == size:
            node = hashlib.sha256(b"\1" + subtrees.pop()[1] + node).digest()
            size *= 2
        subtrees.append((size, node))
    node = b""
    for _, left in reversed(subtrees):
        node = hashlib.sha256(b"\1" + left + node).digest() if node else left
    return node.hex() or hashlib.sha256().hexdigest()


def merkle_roots(root: Path) -> Iterator[str]:
    published, folders = read(root / "dataset/merkle.json"), ("dispositions", "kept", "tokens/documents")
    tables = {f"{name.split('/')[0]}/{p.name}": p for name in folders for p in (root / "dataset" / name).iterdir()}
    yield from (f"merkle.json: {name} has no root, or no table" for name in sorted(set(tables) ^ set(published)))
    for name, folder in sorted(tables.items()):
        paths = parts(folder)
        columns = {"kept": KEPT, "tokens": TOKENS}.get(name.split("/")[0]) or pq.read_schema(paths[0]).names
        leaves = (merkle_leaf(row) for path in paths for row in rows(path, columns))
        size = sum(pq.ParquetFile(path).metadata.num_rows for path in paths)
        if name in published and (published[name]["root"], published[name]["size"]) != (merkle_root(leaves), size):
            yield f"merkle.json: {name} has another root or number of rows"


def order(root: Path) -> Iterator[str]:
    """Segments lie in training documents, where the table of tokens has them; steps rise; parts have their digests."""
    lengths = {}  # by source and part: (ids, tokens) of training documents, in the order of the shard
    for folder in (root / "dataset/tokens/documents").iterdir():
        for path in parts(folder):
            train = pq.read_table(path, columns=["id", "tokens"], filters=[("split", "=", "train")])
            lengths[folder.name, int(path.stem[5:])] = [train[name].combine_chunks() for name in ("id", "tokens")]
    for meta_path in sorted((root / "dataset/order").glob("*/meta.json")):
        meta, last, tokens = read(meta_path), 0, Counter[str]()
        for number, path in enumerate(parts(meta_path.parent)):
            if "parts" in meta and [p["sha256"] for p in meta["parts"]][number : number + 1] != [file_sha256(path)]:
                yield f"order/{meta['phase']}/{path.name} is not the part of its meta.json"
            for row in rows(path):
                if row["step"] < last:
                    yield f"order/{meta['phase']}: step {row['step']} follows step {last}"
                last = row["step"]
                ids, sizes = lengths.get((row["source"], row["part"]), ((), ()))
                inside = row["ordinal"] < len(ids) and ids[row["ordinal"]].as_py() == row["id"]
                if not inside or row["offset"] + row["length"] > sizes[row["ordinal"]].as_py():
                    yield f"order/{meta['phase']}: step {last} reads {row['id']} where no training document is"
                tokens[row["source"]] += row["length"] - 1
        if last != meta["steps"]:
            yield f"order/{meta['phase']} ends with step {last} of {meta['steps']}"
        for source, of_source in meta.get("sources", {}).items():
            if "tokens" in of_source and of_source["tokens"] != tokens[source]:
                yield f"order/{meta['phase']}: {tokens[source]} targets of {source}, stated {of_source['tokens']}"


def ratio(works: dict[str, tuple[float, int]]) -> tuple[float, dict[str, float]]:
    """Ratio of (bits, bytes) of works, and the deviation of each, whose squares add up to the variance of the bits."""
    n, bits, size = len(works), *map(math.fsum, zip(*works.values(), strict=True))
    return bits / size, {w: math.sqrt(n / (n - 1)) * (b - bits / size * s) for w, (b, s) in works.items()}


def scores(root: Path) -> Iterator[str]:
    """Bits per byte, exact match and win rates follow from their tables."""
    for table in sorted((root / "dataset/evaluation").glob("*/documents.parquet")):
        stated, sources, by_task = read(table.with_name("scores.json")), defaultdict[str, Any](dict), defaultdict(list)
        for row in rows(table, ["source", "work", "nll_bits", "bytes"]):
            bits, size = sources[row["source"]].get(row["work"], (0.0, 0))
            sources[row["source"]][row["work"]] = bits + row["nll_bits"], size + row["bytes"]
        for row in rows(table.with_name("items.parquet"), ["task", "score"]):
            by_task[row["task"]].append(row["score"])
        figures = stated["bits_per_byte"] | {"": stated["bits_per_byte_all"]}
        figures |= {f"task {name}": figure for name, figure in stated["accuracy"].items()}
        given = {name: (figure["value"], figure["se"]) for name, figure in figures.items()}
        computed, errors = {}, Counter[str]()
        for source, works in sources.items():
            value, deviations = ratio(works)
            computed[source] = value, math.hypot(*deviations.values()) / sum(size for _, size in works.values())
            errors.update(deviations)  # sources are strata, and a work may be in several
        bits, size = map(math.fsum, zip(*(x for works in sources.values() for x in works.values()), strict=True))
        computed[""] = bits / size, math.hypot(*errors.values()) / size
        for task, marks in by_task.items():
            p = sum(marks) / len(marks)
            computed[f"task {task}"] = p, math.sqrt(p * (1 - p) / len(marks))
        for name in sorted(set(given) | set(computed)):
            if name not in given or name not in computed or not all(map(near, given[name], computed[name])):
                yield f"evaluation/{table.parent.name}/scores.json: {name or 'bits_per_byte_all'} is another figure"
    for table in sorted((root / "dataset/evaluation/preferences").glob("*/pairs.parquet")):
        stated, n = read(table.with_name("scores.json")), pq.ParquetFile(table).metadata.num_rows
        wins, ties = stated["wins"], stated["ties"]
        if wins + ties + stated["losses"] != n or not near(stated["win_rate"]["value"], (wins + ties / 2) / n):
            yield f"evaluation/preferences/{table.parent.name}/scores.json: its win rate is another figure"


def rollouts(root: Path) -> Iterator[str]:
    """Answers have a log-probability for each token, and the reward of their parts; steps follow each other."""
    for path in sorted((root / "dataset/rl").glob("*/rollouts.parquet")):
        last = 0
        for row in rows(path, ["step", "ids", "logprobs", "reward", "parts", "task"]):
            sound = len(row["ids"]) == len(row["logprobs"]) and json.loads(row["parts"])["reward"] == row["reward"]
            if not sound or row["step"] < last:
                yield f"rl/{path.parent.name}: an answer to {row['task']} in step {row['step']} is unsound"
            last = row["step"]


def main(arguments: list[str]) -> int:
    root = Path(arguments[0] if arguments else ".")
    about, tombstone = root / "evidence/release.json", root / "dataset/retracted.json"
    try:
        is_release = len(arguments) < 2 and read(about)["format"] == FORMAT and not tombstone.exists()
    except (OSError, KeyError, TypeError, ValueError):
        is_release = False
    if not is_release:
        print(f"{root} is not a whole release of format {FORMAT}, as it was built", file=sys.stderr)
        return 2
    problems = 0
    for check in (checksums, provenance, statements, documents, merkle_roots, order, scores, rollouts):
        before = problems
        try:
            for problem in check(root):
                problems += 1
                print(f"{check.__name__}: {problem}")
        except Exception as error:  # a forged file can raise anything
            problems += 1
            print(f"{check.__name__}: a file is missing or malformed ({type(error).__name__}: {error})")
        print(f"{check.__name__}: {'sound' if problems == before else f'{problems - before} problems'}")
    return int(problems > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
