"""Dedup: planted duplicates are found and named, like datatrove's clusters; any number of tasks gives the same bytes."""

from __future__ import annotations

import gc
import random
import re
import shutil
import struct
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datatrove.data import Document
from datatrove.pipeline.dedup import MinhashConfig, MinhashDedupBuckets, MinhashDedupCluster, MinhashDedupSignature
from datatrove.utils.hashing import HashConfig

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.parts import part_slice
from pipeline.core.store import Artifact
from stages.data.curate import duplicate_groups, duplicates_stage
from stages.data.curate.settings import MinHash, Partition, SourcePart
from stages.data.curate.words import WORDS
from stages.formats import database
from stages.formats.table import DISPOSITIONS, KEPT, arrow_schema, content_hash, split_of, write_table
from tests.fixtures.dedup_fixtures import STAGES, deduplicate, stage_configs
from tests.fixtures.filter_fixtures import REMOVED, filter_artifact
from tests.fixtures.run_fixtures import RecordingReport

RNG = random.Random(0)
VOCABULARY = ["".join(RNG.choice("abcdefghijklmnop") for _ in range(5)) for _ in range(3000)]

Parts = Sequence[Mapping[str, str | None]]


def new_text(words: int = 80) -> str:
    return " ".join(RNG.choice(VOCABULARY) for _ in range(words))


def near(text: str) -> str:
    """A text that shares all but its last n-gram with the given one."""
    return f"{text} {RNG.choice(VOCABULARY)}"


TEXTS = [new_text() for _ in range(8)]
SOURCES: dict[str, Parts] = {
    "prose": [
        {"first": TEXTS[0], "copy": TEXTS[0], "filtered": None, "other": TEXTS[1]},
        {"near": near(TEXTS[0]), "far": TEXTS[2], "copy of other": TEXTS[1]},
        {"nearer": near(near(TEXTS[0])), "alone": TEXTS[5]},
    ],
    "sums": [{"a": TEXTS[3], "in prose": TEXTS[5], "short": "1 2"}],
    "code": [
        {"in sums": TEXTS[3], "near a copy": near(TEXTS[3]), "short": "a b", "again": "a b"},
        {"only": near(TEXTS[2]), "none": None},
    ],
}  # fmt: skip
KINDS = {"prose": "prose", "code": "code", "sums": "problems"}
DUPLICATES = {
    "prose/copy": ("exact_duplicate", "prose/first"),
    "prose/copy of other": ("exact_duplicate", "prose/other"),
    "prose/near": ("near_duplicate", "prose/first"),
    "prose/nearer": ("near_duplicate", "prose/first"),
    "sums/in prose": ("exact_duplicate", "prose/alone"),
    "code/in sums": ("exact_duplicate", "sums/a"),  # so nothing is near it any more
    "code/again": ("exact_duplicate", "code/short"),
    "code/only": ("near_duplicate", "prose/far"),
}


def config_of(sources: Mapping[str, Parts], minhash: dict[str, Any] | None, heldout: float = 0.2) -> dict[str, Any]:
    names = [
        {"name": name, "kind": KINDS[name], "heldout_fraction": heldout, "parts": len(parts)}
        for name, parts in sources.items()
    ]
    return {"sources": names, "minhash": minhash}


def filtered(folder: Path, sources: Mapping[str, Parts] = SOURCES) -> Artifact:
    return filter_artifact(folder, sources, {"prose": MinHash(), "code": MinHash()})


def digests(artifacts: Mapping[str, Artifact]) -> dict[str, str]:
    return {name: artifact.digest for name, artifact in artifacts.items()}


def dispositions(artifact: Artifact) -> dict[str, dict[str, Any]]:
    files = sorted((artifact / "dispositions").rglob("*.parquet"))
    rows = [row for file in files for row in pq.ParquetFile(file).read().to_pylist()]
    assert len({row["id"] for row in rows}) == len(rows)
    return {row["id"]: row for row in rows}


def test_duplicates_name_the_first_document(tmp_path: Path) -> None:
    artifact = deduplicate(config_of(SOURCES, {}), filtered(tmp_path / "filtered"), tmp_path)["dedup"]
    rows = dispositions(artifact)
    assert set(rows) == {f"{source}/{name}" for source, parts in SOURCES.items() for part in parts for name in part}
    duplicates = {id: (row["rule"], row["duplicate_of"]) for id, row in rows.items() if row["duplicate_of"]}
    assert duplicates == DUPLICATES
    assert {id for id, row in rows.items() if row["rule"] == REMOVED} == {"prose/filtered", "code/none"}
    for id, row in rows.items():
        kept = row["disposition"] == "kept"
        assert kept == (row["rule"] is None) == (row["split"] is not None) == (row["value"] is None), id
        assert row["kept_hash"] == (row["content_hash"] if kept else None)
    assert (rows["prose/copy"]["value"], rows["prose/copy"]["threshold"]) == (1.0, 1.0)
    assert rows["prose/near"]["value"] == 76 / 77 and rows["prose/nearer"]["value"] == 76 / 78
    assert rows["prose/near"]["threshold"] == pytest.approx(0.72, abs=0.01)


def test_a_work_is_held_out_as_a_whole(tmp_path: Path) -> None:
    config = config_of(SOURCES, {}, heldout=0.8)
    for source in config["sources"]:
        source["work"] = r"/(\w)"  # documents of all sources whose names begin with one letter
    artifact = deduplicate(config, filtered(tmp_path / "filtered"), tmp_path)["dedup"]

    splits: dict[str, set[str]] = {}
    for id, row in dispositions(artifact).items():
        if row["split"] is not None:
            splits.setdefault(id.partition("/")[2][0], set()).add(row["split"])
    expected = {letter: {split_of(content_hash(f"work {letter}"), 0.8)} for letter in splits}
    assert splits == expected
    assert {split for found in splits.values() for split in found} == {"train", "heldout"}


def test_a_single_held_out_work_is_refused_before_training(tmp_path: Path) -> None:
    config = config_of(SOURCES, {}, heldout=0.99)
    config["sources"][0]["work"] = "(prose)"
    with pytest.raises(AtomError, match="source prose holds out the single work prose, and an error bar needs two"):
        deduplicate(config, filtered(tmp_path / "filtered"), tmp_path)


def test_kept_documents_and_dispositions_of_each_part_balance(tmp_path: Path) -> None:
    artifact = deduplicate(config_of(SOURCES, {}), filtered(tmp_path / "filtered"), tmp_path)["dedup"]
    rows, summary = dispositions(artifact), artifact.json("summary.json")
    for source, parts in SOURCES.items():
        counts = summary["sources"][source]
        for number, part in enumerate(parts):
            kept = pq.ParquetFile(artifact / f"kept/{source}/part-{number:05d}.parquet").read()
            assert kept.schema.equals(arrow_schema(KEPT))
            decided = pq.ParquetFile(artifact / f"dispositions/{source}/part-{number:05d}.parquet").read()
            assert decided.schema.equals(arrow_schema(DISPOSITIONS))
            assert decided["id"].to_pylist() == [f"{source}/{name}" for name in part], "in the order of input"
            expected = {
                f"{source}/{name}": text for name, text in part.items() if rows[f"{source}/{name}"]["rule"] is None
            }
            assert dict(zip(kept["id"].to_pylist(), kept["text"].to_pylist(), strict=True)) == expected
            assert kept["split"].to_pylist() == [rows[id]["split"] for id in expected]
        assert (
            counts["documents_in"]
            == sum(map(len, parts))
            == sum(counts["kept"].values()) + sum(counts["removed"].values())
        )
    assert {row["split"] for row in rows.values()} == {"train", "heldout", None}
    assert sum(1 for _ in pq.ParquetFile(artifact / "kept/prose/part-00002.parquet").read()["id"]) == 1


def test_any_number_of_tasks_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates_stage, "PARTS_PER_RANGE", 2)  # three ranges of each hash
    monkeypatch.setattr(duplicate_groups, "BATCH", 2)
    artifact, config = filtered(tmp_path / "filtered"), config_of(SOURCES, {})
    alone = deduplicate(config, artifact, tmp_path / "alone")
    for tasks in (3, 8):
        for name, settings in stage_configs(config).items():
            stage, work = STAGES[name], tmp_path / f"tasks-{tasks}" / name
            setup = stage.config.model_validate(settings)
            work.mkdir(parents=True)
            count = stage.shards(setup)
            assert count == (3 * 15 if name == "duplicates" else 6) and stage.run_shard is not None
            for task in reversed(range(tasks)):
                for shard in range(task, count, tasks):
                    stage.run_shard(setup, alone, work, shard)
        with monkeypatch.context() as context:
            for nothing_left in (
                "duplicate_groups.write_stars",
                "part_removal.write_representatives",
                "part_removal.PartRemoval",
            ):
                context.setattr(f"stages.data.curate.{nothing_left}", None)
            artifacts = deduplicate(config, artifact, tmp_path / f"tasks-{tasks}")
        assert digests(artifacts) == digests(alone)


def test_a_frequent_hash_takes_no_more_memory(tmp_path: Path) -> None:
    """In a corpus where most documents have one text, and most others share a band with it."""
    count, rng = 200_000, np.random.default_rng(0)
    texts = np.where(rng.random(count) < 0.8, 7, rng.integers(0, count, count)).astype(np.uint64)
    bands = np.where(texts % 10 < 9, 5, texts).astype(np.uint64)
    columns = [texts << np.uint64(40), texts, bands << np.uint64(40)]
    parts = [SourcePart(0, "prose", part) for part in range(2)]
    for part in parts:
        rows = part_slice(count, part.part, 2)
        table = pa.table([column[rows] for column in columns], names=["hash_high", "hash_low", "band_00"])
        write_table(part.file(tmp_path), table)
    partition = {exact: Partition("hash_high" if exact else "band_00", 0, 1) for exact in (True, False)}

    def find(exact: bool, folder: Path, memory: str) -> set[tuple[int, int]]:
        folder.mkdir()
        with database.connect(tmp_path, memory) as connection:
            written = duplicate_groups.write_stars(connection, folder, tmp_path, parts, partition[exact])
        assert [path.name for path in folder.iterdir()] == [duplicate_groups.STARS]
        stars = pq.read_table(folder / duplicate_groups.STARS).to_pylist()
        assert written == len(stars)
        return {(row["address"], row["first"]) for row in stars}

    addresses = np.concatenate([part.first + np.arange(count // 2) for part in parts])
    first_of_text, first_of_band, expected = dict[int, int](), dict[int, int](), {True: set(), False: set()}
    for address, text, band in zip(addresses.tolist(), texts.tolist(), bands.tolist(), strict=True):
        if (first := first_of_text.setdefault(text, address)) != address:
            expected[True].add((address, first))
        elif (first := first_of_band.setdefault(band, address)) != address:
            expected[False].add((address, first))
    for exact in (True, False):
        for memory in (duplicates_stage.MEMORY, "30MB"):
            assert find(exact, tmp_path / f"{memory}-{exact}", memory) == expected[exact]


def test_killed_and_damaged_pieces_are_made_again(tmp_path: Path) -> None:
    artifact, config = filtered(tmp_path / "filtered"), config_of(SOURCES, {})
    expected = digests(deduplicate(config, artifact, tmp_path))
    shutil.rmtree(tmp_path / "out")
    for damaged in (
        "dedup/prose-00001/kept/prose/part-00001.parquet",
        "duplicates/near/removed/near/first.i64",
        "representatives/block-00002/representatives/block-00002/records",
    ):
        path = tmp_path / damaged
        path.write_bytes(path.read_bytes()[:-1])
    shutil.rmtree(tmp_path / "dedup/code-00000")
    (tmp_path / "dedup/.code-00000.1").mkdir()  # the draft of a task that was killed
    (tmp_path / "duplicates/stars/band_03-00000-of-00001/part.json").unlink()
    assert digests(deduplicate(config, artifact, tmp_path)) == expected


def test_rewriting_a_part_closes_its_files(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    warnings.simplefilter("always")
    artifact = deduplicate(config_of(SOURCES, {}), filtered(tmp_path / "filtered"), tmp_path)["dedup"]
    gc.collect()
    assert any(row["rule"] == "near_duplicate" for row in dispositions(artifact).values())
    assert [str(each.message) for each in recwarn if "records" in str(each.message)] == []


def test_a_part_that_is_removed_while_it_is_joined_is_one_sentence(tmp_path: Path) -> None:
    class Remover(RecordingReport):
        def progress(self, done: int, total: int, unit: str = "steps", **figures: float) -> None:
            if done == total:
                shutil.rmtree(tmp_path / "work/prose-00001")

    artifact, config = filtered(tmp_path / "filtered"), config_of(SOURCES, {})
    artifacts, stage = deduplicate(config, artifact, tmp_path / "first"), STAGES["dedup"]
    setup = stage.config.model_validate(stage_configs(config)["dedup"])
    (tmp_path / "out").mkdir()
    with pytest.raises(AtomError, match="work/prose-00001 was removed or damaged before it was joined; run again"):
        stage.run(setup, artifacts, tmp_path / "work", tmp_path / "out", Remover())


@pytest.mark.parametrize(
    "damage, sentence",
    [
        ("cut", "part-00001.parquet cannot be read as Parquet"),
        ("missing", "part-00001.parquet is missing; run the stage that makes it again"),
        ("of another part", "part-00001.parquet does not hold the documents that .* keeps; run filter again"),
        ("hashes of another part", "part-00001.parquet do not hold 3 rows each; run filter again"),
    ],
)  # fmt: skip
def test_a_corrupt_part_is_named_in_one_sentence(tmp_path: Path, damage: str, sentence: str) -> None:
    artifact = filtered(tmp_path / "filtered")
    kept, hashes = (artifact / f"{folder}/prose/part-00001.parquet" for folder in ("kept", "hashes"))
    {
        "cut": lambda: hashes.write_bytes(hashes.read_bytes()[:-9]),
        "missing": kept.unlink,
        "of another part": lambda: shutil.copyfile(artifact / "kept/prose/part-00000.parquet", kept),
        "hashes of another part": lambda: shutil.copyfile(artifact / "hashes/prose/part-00002.parquet", hashes),
    }[damage]()
    with pytest.raises(AtomError, match=sentence):
        deduplicate(config_of(SOURCES, {}), artifact, tmp_path)


def test_counts_that_do_not_balance_are_refused(tmp_path: Path) -> None:
    artifact = filtered(tmp_path / "filtered")
    path = artifact / "dispositions/sums/part-00000.parquet"
    table = pq.ParquetFile(path).read()
    undecided = [{**row, "disposition": "removed", "rule": None} for row in table.to_pylist()[2:]]
    pq.write_table(
        table.from_pylist([*table.to_pylist(), {**undecided[0], "disposition": ""}], schema=table.schema), path
    )
    with pytest.raises(
        AtomError, match="source sums does not balance: 4 in, 2 kept .2 written., 1 removed, 1 without a disposition"
    ):
        deduplicate(config_of(SOURCES, {}), artifact, tmp_path)


def test_no_source_is_searched_for_near_duplicates(tmp_path: Path) -> None:
    artifact = filter_artifact(tmp_path / "filtered", SOURCES, {})
    for number, minhash in enumerate((None, {"kinds": ["chat"]})):
        config = config_of(SOURCES, minhash)
        rows = dispositions(deduplicate(config, artifact, tmp_path / str(number))["dedup"])
        assert {row["rule"] for row in rows.values()} == {None, REMOVED, "exact_duplicate"}
        search = duplicates_stage.STAGE
        assert search.shards(search.config.model_validate(stage_configs(config)["duplicates"])) == 1


def test_a_source_that_is_mostly_duplicates_stops_the_run_unless_acknowledged(tmp_path: Path) -> None:
    text = new_text()
    sources: dict[str, Parts] = {
        "prose": [{f"page {n}": near(text) for n in range(120)}],
        "code": [{f"file {n}": text if n else new_text() for n in range(19)}],  # too few for an alarm
    }
    artifact, config = filtered(tmp_path / "filtered", sources), config_of(sources, {})

    def run(name: str, **acknowledged: float) -> RecordingReport:
        config["sources"][0]["acknowledged_removals"] = acknowledged
        report = RecordingReport()
        deduplicate(config, artifact, tmp_path / name, report)
        return report

    sentence = (
        "source prose: deduplication removes 119 of 120 documents, a larger share than 0.5; look at what it removes and "
        "change it, or acknowledge it in the data recipe by acknowledged_removals: {deduplication: 1} of that source"
    )
    with pytest.raises(AtomError, match=f"^{re.escape(sentence)}$"):
        run("first")
    with pytest.raises(AtomError, match="removes 119 of 120 documents, a larger share than 0.9; look"):
        run("second", deduplication=0.9)
    report = run("third", deduplication=1.0)
    assert [note for note in report.notes if note.startswith("alarm")] == [
        "alarm: prose: deduplication removes 119 of 120 documents, which the data recipe acknowledges up to 1"
    ]
    assert report.done == (2, 2), "progress is in parts"


def planted_corpus(count: int) -> dict[str, str]:
    """Texts of which some are near others, some through a chain of texts that are near one another."""
    rng, texts = random.Random(1), [new_text(120) for _ in range(count // 2)]
    while len(texts) < count:
        words = rng.choice(texts).split()
        for _ in range(rng.choice([1, 3, 8, 20])):
            words[rng.randrange(len(words))] = rng.choice(VOCABULARY)
        texts.append(" ".join(words))
    rng.shuffle(texts)
    return {str(n): text for n, text in enumerate(texts)}


def test_clusters_are_those_of_datatrove(tmp_path: Path) -> None:
    """The same groups of documents as its stages find, of which each tool keeps one."""
    texts = planted_corpus(1000)
    config = MinhashConfig(seed=0, hash_config=HashConfig(precision=64))
    folders = [str(tmp_path / name) for name in ("signatures", "buckets", "clusters")]
    for _ in (
        MinhashDedupSignature(folders[0], config=config, language=WORDS).run(
            (Document(text, id) for id, text in texts.items())
        )
        or ()
    ):
        pass
    for bucket in range(config.num_buckets):
        MinhashDedupBuckets(folders[0], folders[1], config=config).run(None, bucket, config.num_buckets)
    MinhashDedupCluster(folders[1], folders[2], config=config, save_cluster_id=True).run(None, 0, 1)
    expected: dict[int, set[str]] = defaultdict(set)
    for row, cluster in struct.iter_unpack("<2I", (tmp_path / "clusters/000000.clusters").read_bytes()):
        expected[cluster].add(str(row))

    parts = [dict(list(texts.items())[start : start + 300]) for start in range(0, 1000, 300)]
    sources = {"prose": parts}
    artifact = deduplicate(config_of(sources, {}), filtered(tmp_path / "filtered", sources), tmp_path)["dedup"]
    clusters: dict[str, set[str]] = defaultdict(set)
    for id, row in dispositions(artifact).items():
        if row["rule"]:
            kept = row["duplicate_of"].removeprefix("prose/")
            assert int(kept) < int(id.removeprefix("prose/")), "the first one is kept"
            clusters[kept] |= {kept, id.removeprefix("prose/")}
    assert sorted(map(sorted, clusters.values())) == sorted(map(sorted, expected.values()))
    assert 100 < sum(map(len, expected.values())) - len(expected) < 500
    removed = len((tmp_path / "clusters/000000.remove").read_bytes()) // 4
    assert removed == sum(1 for row in dispositions(artifact).values() if row["rule"])


def test_a_full_disk_in_a_reduction_is_one_sentence(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    space = ["unshare", "--user", "--map-root-user", "--mount"]
    if subprocess.run([*space, "true"], capture_output=True).returncode:
        pytest.skip("this kernel lets nobody make a mount namespace, which the full disk is made with")
    code = (
        "import sys; from pathlib import Path\n"
        "from stages.formats.database import connect\n"
        "from pipeline.core.errors import MachineError\n"
        "try:\n"
        "    with connect(Path(sys.argv[1]), '30MB') as database:\n"
        "        database.execute('create table t as select hash(range) as h from range(20000000) order by h')\n"
        "except MachineError as error:\n"
        "    print(error)\n"
    )
    script = f'mount -t tmpfs -o size=3m none {disk} && exec "{sys.executable}" -c "$0" {disk}'
    process = subprocess.run([*space, "sh", "-c", script, code], capture_output=True, text=True)
    assert process.stdout == (
        f"a reduction needs more than 30MB of memory and than the free space for its temporary files; free space at {disk} and run again\n"
    ), process.stdout + process.stderr


def test_a_reduction_that_fails_names_its_folder(tmp_path: Path) -> None:
    sentence = f"a reduction at {tmp_path} failed .*nowhere.*; remove that folder and run again"
    with pytest.raises(AtomError, match=sentence), database.connect(tmp_path) as connection:
        connection.execute("SELECT * FROM nowhere")
    assert not list(tmp_path.iterdir()), "no temporary file is left"
    with pytest.raises(MachineError, match="free space at"), database.connect(tmp_path, "2MB") as connection:
        connection.execute("SET temp_directory = ''")
        connection.execute("CREATE TABLE t AS SELECT hash(range) AS h FROM range(9000000) ORDER BY h")


def test_partitions_cover_all_hashes_once() -> None:
    for count in (1, 3, 7):
        bounds = [Partition("hash_high", n, count).bounds() for n in range(count)]
        assert bounds[0][0] == 0 and bounds[-1][1] == 2**64 - 1
        assert all(high + 1 == low for (_, high), (low, _) in pairwise(bounds))
    last = SourcePart(999, "x", 99_999)
    assert last.end <= 2**63 and SourcePart(1, "x", 0).first == 2**53 > SourcePart(0, "x", 99_999).end


def test_no_documents_at_all(tmp_path: Path) -> None:
    sources: dict[str, Parts] = {"prose": [{}, {}]}
    artifact = deduplicate(config_of(sources, {}), filtered(tmp_path / "filtered", sources), tmp_path)["dedup"]
    assert artifact.json("summary.json")["total"]["documents_in"] == 0 and not dispositions(artifact)
