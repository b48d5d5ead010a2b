"""The reader `packages`: from archives to documents with the licenses of their files, and to an order."""

from __future__ import annotations

import random
import shutil
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

from pipeline.core.errors import AtomError, RecipeError
from pipeline.core.store import Artifact, sha256_file
from release.assembly.assemble import write_attribution
from stages.data.acquire import acquire_stage
from stages.data.acquire.licenses.expressions import UNMAPPED
from stages.data.acquire.packages import fetch
from stages.data.acquire.packages.fetch import read_lock
from stages.data.acquire.sources import Source, resolve_tree_digest
from stages.data.recipe import load
from stages.formats.file_digests import tree_digest
from stages.formats.table import KEPT, content_hash, order_files, part_files, write_rows
from tests.fixtures import ROOT
from tests.fixtures.block_fixtures import PII
from tests.fixtures.package_fixtures import COPYRIGHT, Files, deb_of, lock_folder, member, sdist_of
from tests.fixtures.recipe_fixtures import SMOKE
from tests.fixtures.run_fixtures import at_length, atom

GARDEN: Files = {
    "usr/share/doc/garden/copyright": COPYRIGHT,
    "usr/share/doc/garden/README": "How to garden.\n",
    "usr/share/doc/garden/examples/plan.html": "<body><nav>Menu</nav><p>A plan.</p></body>",
    "usr/share/doc/garden/vendor/seeds.txt": "Seeds of others.\n",
    "usr/share/doc/garden/vendor/tagged.txt": "SPDX-License-Identifier: ISC\nSeeds.\n",
    "usr/share/doc/garden/binary.txt": b"\0\1\2",
    "usr/share/doc/garden/empty.txt": " \n",
    "usr/lib/python3/dist-packages/garden/plot.py": "SIZE = 3\n",
}
PLOT: Files = {
    "PKG-INFO": "Metadata-Version: 2.4\nName: plot\nVersion: 1.0\nLicense-Expression: Apache-2.0\n\n",
    "README.md": "# Plot\n",
    "src/plot.py": "import garden\n",
    "src/vendor/LICENSE": "A license of others.\n",
    "src/vendor/dig.py": "import spade\n",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "packages"
    folder.mkdir()
    (folder / "garden_1.0_all.deb").write_bytes(deb_of(GARDEN))
    (folder / "plot-1.0.tar.gz").write_bytes(sdist_of("plot-1.0", PLOT))
    return folder


def config(folder: Path, content: str = "documentation", parts: int = 1) -> dict[str, Any]:
    reader = {"reader": "packages", "path": str(folder), "lock": str(lock_folder(folder)), "content": content}
    source = {
        "name": "notes", "kind": "code" if content == "code" else "prose", "license": "LicenseRef-by-document",
        "license_evidence": "copyright files", "origin": "a test", "reader": reader, "parts": parts,
    }  # fmt: skip
    return {"source": {**source, "tree_digest": resolve_tree_digest(Source.model_validate(source))}, "seed": 0}


def rows(artifact: Artifact, table: str = "documents") -> list[dict[str, Any]]:
    return [row for path in part_files(artifact.path, table) for row in pq.read_table(path).to_pylist()]


def test_documents_have_the_licenses_of_their_files(folder: Path, run_stage: Any) -> None:
    artifact = run_stage(acquire_stage.STAGE, config(folder), {})
    doc = "notes/garden_1.0_all.deb/usr/share/doc/garden"
    assert {row["id"]: (row["text"], row["license"]) for row in rows(artifact)} == {
        f"{doc}/README": ("How to garden.\n", "GPL-2.0-or-later"),
        f"{doc}/examples/plan.html": ("A plan.\n", "MIT"),
        f"{doc}/vendor/tagged.txt": ("SPDX-License-Identifier: ISC\nSeeds.\n", "ISC"),
        "notes/plot-1.0.tar.gz/plot-1.0/README.md": ("# Plot\n", "Apache-2.0"),
    }
    failed = {row["id"]: row["reason"] for row in rows(artifact, "failed")}
    assert set(failed) == {f"{doc}/vendor/seeds.txt"}
    assert "binary.txt" in str(artifact.json("source.json")["files_skipped"])
    assert (
        failed[f"{doc}/vendor/seeds.txt"].startswith("license: ") and "as-you-like" in failed[f"{doc}/vendor/seeds.txt"]
    )
    (origin,) = (row["origin"] for row in rows(artifact) if row["id"].endswith("README"))
    assert origin == "a test#pool/garden_1.0_all.deb:usr/share/doc/garden/README"
    bases = {row["license"]: row["found"] for row in artifact.json("source.json")["licenses"]}
    assert {license: how for license, how in bases.items() if "unmapped" not in license} == dict.fromkeys(
        ("GPL-2.0-or-later", "MIT", "ISC", "Apache-2.0"), "file"
    )


def test_code_of_packages(folder: Path, run_stage: Any) -> None:
    artifact = run_stage(acquire_stage.STAGE, config(folder, "code"), {})
    assert Counter(row["license"] for row in rows(artifact)) == Counter(("GPL-2.0-or-later", "Apache-2.0"))
    (failed,) = rows(artifact, "failed")
    assert "its folder has a license file of its own, src/vendor/LICENSE" in failed["reason"]


def test_parts_give_the_same_documents(folder: Path, run_stage: Any) -> None:
    whole, parts = (rows(run_stage(acquire_stage.STAGE, config(folder, parts=parts), {})) for parts in (1, 2))
    assert whole == parts


def test_the_notices_of_packages_with_such_documents_reach_the_release_once(
    folder: Path, tmp_path: Path, run_stage: Any
) -> None:
    license = {"LICENSE": "The terms.\n"}
    (folder / "plot-1.0.tar.gz").write_bytes(sdist_of("plot-1.0", {**PLOT, **license, "NOTICE.txt": "By P.\n"}))
    (folder / "spade-1.0.tar.gz").write_bytes(sdist_of("spade-1.0", {**PLOT, **license, "notice.py": "x = 1\n"}))
    free = {"PKG-INFO": "License-Expression: CC0-1.0\n\n", "README.md": "# Free\n", "LICENSE": "No terms.\n"}
    (folder / "free-1.0.tar.gz").write_bytes(sdist_of("free-1.0", free))
    dataset, tables = tmp_path / "dataset", list[list[Path]]()
    for parts in (1, 2):
        artifact = run_stage(acquire_stage.STAGE, config(folder, parts=parts), {})
        for path in part_files(artifact.path, "documents"):
            kept = [{**row, "split": "train"} for row in pq.read_table(path).to_pylist()]
            write_rows(dataset / "kept/notes" / path.name, KEPT, kept)
        tables.append(
            [path for path in write_attribution(dataset, {"notes": artifact.path}) if "notices" in path.parts]
        )
    assert [len(paths) for paths in tables] == [1, 2], "by part"
    assert {row["package"] for row in rows(artifact, "notices")} == {path.name for path in folder.iterdir()}
    notices = [row for path in tables[1] for row in pq.read_table(path).to_pylist()]
    assert [(row["package"], row["path"], row["text"]) for row in notices] == [
        ("garden_1.0_all.deb", "usr/share/doc/garden/copyright", COPYRIGHT),
        ("plot-1.0.tar.gz", "plot-1.0/src/vendor/LICENSE", "A license of others.\n"),
        ("plot-1.0.tar.gz", "plot-1.0/LICENSE", "The terms.\n"),
        ("plot-1.0.tar.gz", "plot-1.0/NOTICE.txt", "By P.\n"),
        ("spade-1.0.tar.gz", "spade-1.0/src/vendor/LICENSE", ""),
        ("spade-1.0.tar.gz", "spade-1.0/LICENSE", ""),
    ]
    assert notices[-1]["sha256"] == notices[2]["sha256"] == content_hash("The terms.\n")


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({"usr/share/doc/garden/README": "How."}, "the package has no copyright file of its own"),
        (
            {"usr/share/doc/garden/copyright": "GPL, see there.", "usr/share/doc/garden/README": "How."},
            "usr/share/doc/garden/copyright is not machine-readable",
        ),
        (
            {
                "1": member("./usr/share/doc/garden/copyright", tarfile.SYMTYPE, "../other/copyright"),
                "usr/share/doc/garden/README": "How.",
            },
            "the package has no copyright file of its own",
        ),
    ],
)
def test_without_a_license_that_can_be_read(folder: Path, run_stage: Any, files: Files, reason: str) -> None:
    (folder / "garden_1.0_all.deb").write_bytes(deb_of(files))
    artifact = run_stage(acquire_stage.STAGE, config(folder), {})
    assert [row["reason"] for row in rows(artifact, "failed") if reason in row["reason"]], rows(artifact, "failed")
    assert len(rows(artifact)) == 1


def test_a_hostile_package_does_not_stop_the_others(folder: Path, run_stage: Any) -> None:
    hostile: Files = {
        "usr/share/doc/a/copyright": COPYRIGHT,
        "usr/share/doc/a/big.txt": bytes(100_000_000),
        "../up.txt": "up",
        "1": member("./usr/share/doc/a/link.txt", tarfile.SYMTYPE, "/etc/passwd"),
        "usr/share/doc/a/twice.txt": "SPDX-License-Identifier: MIT",
        "./usr/share/doc/a/twice.txt": "SPDX-License-Identifier: ISC",
        "2": member("./usr/share/doc/a/cut.txt", tarfile.REGTYPE, size=10_000_000),
    }
    (folder / "hostile_1.0_all.deb").write_bytes(deb_of(hostile, "zst"))
    whole = (folder / "garden_1.0_all.deb").read_bytes()
    (folder / "short_1.0_all.deb").write_bytes(whole[: len(whole) // 2])
    (folder / "none-1.0.tar.gz").write_bytes(b"none")
    artifact = run_stage(acquire_stage.STAGE, config(folder), {})
    assert len(rows(artifact)) == 5
    reasons = {row["id"].removeprefix("notes/"): row["reason"] for row in rows(artifact, "failed")}
    assert "it has 100000000 bytes" in reasons["hostile_1.0_all.deb/usr/share/doc/a/big.txt"]
    assert reasons["hostile_1.0_all.deb#3"] == "the package has usr/share/doc/a/twice.txt twice"
    assert "its path leaves the package" in reasons["hostile_1.0_all.deb/../up.txt"]
    assert {name for name in reasons if name.endswith((".deb", ".gz"))} == {
        "hostile_1.0_all.deb", "short_1.0_all.deb", "none-1.0.tar.gz",
    }  # fmt: skip


def test_a_lock_file_decides_what_is_read(folder: Path, run_stage: Any) -> None:
    settings = config(folder)
    (folder / "late_1.0_all.deb").write_bytes(deb_of(GARDEN))
    assert len(rows(run_stage(acquire_stage.STAGE, settings, {}))) == 4
    (folder / "garden_1.0_all.deb").write_bytes(deb_of(PLOT))
    with pytest.raises(AtomError, match=r"garden_1\.0_all\.deb is not the file that .*packages\.lock\.yaml pins"):
        run_stage(acquire_stage.STAGE, settings, {})
    (folder / "garden_1.0_all.deb").unlink()
    with pytest.raises(RecipeError, match=r"no package garden_1\.0_all\.deb at .*; fetch them by"):
        run_stage(acquire_stage.STAGE, settings, {})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("packages: []\n", "packages"),
        ("packages:\n  - {file: ../a.deb}\n", "file name of a .deb or .tar.gz"),
        ("- a\n", "must be a mapping"),
        ("packages: {\n", "line"),
    ],
)
def test_a_damaged_lock_file_is_one_sentence(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.lock.yaml").write_text(text)
    with pytest.raises(RecipeError) as error:
        read_lock(tmp_path / "a.lock.yaml")
    assert words in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(RecipeError, match="there is no lock file"):
        read_lock(tmp_path / "none.yaml")


def test_fetching_what_is_there_and_what_is_nowhere(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lock = lock_folder(folder)
    assert fetch.main(["locked", str(lock), str(folder)]) == 0
    (folder / "plot-1.0.tar.gz").write_bytes(b"other")
    assert fetch.main(["locked", str(lock), str(folder)]) == 2
    assert "has another SHA-256" in capsys.readouterr().err
    names, new = folder.with_name("names.txt"), folder.with_name("new.lock.yaml")
    names.write_text("no-such-package-anywhere\n")
    assert fetch.main(["debian", str(names), str(folder), str(new)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and not new.exists()


def test_pip_fetches_into_a_folder_named_from_where_one_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By pip itself, from a folder instead of an index. The package builds itself, so that pip needs nothing else."""
    backend = (
        "import pathlib\n"
        "def prepare_metadata_for_build_wheel(folder, config_settings=None):\n"
        "    info = pathlib.Path(folder, 'plot-1.0.dist-info')\n"
        "    info.mkdir()\n"
        "    (info / 'METADATA').write_text('Metadata-Version: 2.1\\nName: plot\\nVersion: 1.0\\n')\n"
        "    return info.name\n"
    )
    project = "[build-system]\nrequires = []\nbuild-backend = 'backend'\nbackend-path = ['.']\n"
    index = tmp_path / "index"
    index.mkdir()
    (index / "plot-1.0.tar.gz").write_bytes(
        sdist_of("plot-1.0", {**PLOT, "backend.py": backend, "pyproject.toml": project})
    )
    for name, value in {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(index)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    Path("corpora").mkdir()
    package = fetch.python_package("plot==1.0", Path("corpora"))
    assert (package.file, package.sha256) == ("plot-1.0.tar.gz", sha256_file(index / "plot-1.0.tar.gz"))
    assert [path.name for path in Path("corpora").iterdir()] == [package.file]


def test_the_packaged_recipe_is_pinned_to_its_lock_files() -> None:
    sources = [source for source in load("packages").sources if source.reader.reader == "packages"]
    assert len(sources) == 4
    for source in sources:
        packages = read_lock(Path(source.reader.lock)).packages  # type: ignore[attr-defined]
        assert source.tree_digest == tree_digest((package.file, package.sha256) for package in packages)
        assert source.parts <= len(packages)


def with_sources(folder: Path, sources: list[dict[str, Any]], mix: dict[str, float]) -> str:
    """A copy of the smoke recipe with other sources of text and code."""
    data = yaml.safe_load((ROOT / "data_recipes/smoke.yaml").read_text())
    names = {"docstrings", "code"}
    data["sources"] = sources + [source for source in data["sources"] if source["name"] not in names]
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    body = yaml.safe_load(SMOKE.read_text())
    body["data"] = "data.yaml"
    for phase in body.values():
        if isinstance(phase, dict) and "mix" in phase:
            phase["mix"] = mix if phase is body["pretrain"] else _without(phase["mix"], names)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(body))
    return str(folder / "recipe.yaml")


def _without(mix: dict[str, float], names: set[str]) -> dict[str, float]:
    rest = {name: share for name, share in mix.items() if name not in names}
    return {name: share / sum(rest.values()) for name, share in rest.items()}


def order_of(home: Path) -> Counter[str]:
    """The documents of each source in the order of pre-training."""
    (artifact,) = [
        a for f in (home / "artifacts").iterdir() if (a := Artifact.open(f)).key.startswith("order-pretrain")
    ]
    counts = Counter[str]()
    for path in order_files(artifact.path):
        counts.update(pq.read_table(path, columns=["source"])["source"].to_pylist())
    return counts


@at_length("packages", 25)
def test_packages_reach_the_order(folder: Path, tmp_path: Path) -> None:
    """Packages of a few hundred documents, by the command line, to the order of pre-training."""
    drawn, words = (
        random.Random(0),
        [
            "the",
            "garden",
            "grows",
            "with",
            "water",
            "light",
            "seeds",
            "paths",
            "and",
            "many",
            "hands",
            "in",
            "every",
            "season",
            "of",
            "a",
            "year",
        ],
    )

    def page() -> str:
        return ". ".join(" ".join(drawn.choices(words, k=12)).capitalize() for _ in range(20)) + ".\n"

    manual = {f"usr/share/doc/manual/{n}.txt": page() for n in range(200)}
    (folder / "manual_2.0_all.deb").write_bytes(deb_of({"usr/share/doc/manual/copyright": COPYRIGHT, **manual}, "zst"))
    code = {
        f"src/m{n}.py": f"def f{n}(x):\n    total = x + {n}\n    return total * {n}\n\n\nprint(f{n}(1))\n"
        for n in range(150)
    }
    (folder / "modules-1.0.tar.gz").write_bytes(sdist_of("modules-1.0", {"PKG-INFO": PLOT["PKG-INFO"], **code}))
    pages = config(folder)["source"] | {"name": "manuals", "parts": 2, "steps": [PII]}
    modules = config(folder, "code")["source"] | {
        "name": "modules", "steps": [PII], "acknowledged_removals": {"deduplication": 1.0}
    }  # fmt: skip
    recipe = with_sources(tmp_path, [pages, modules], {"manuals": 0.6, "modules": 0.3, "sums": 0.1})
    home = tmp_path / "home"
    atom(home, "run", recipe, "--until", "order-pretrain")
    assert {"manuals", "modules", "sums"} == set(order_of(home))


@at_length("packages", 5000)
@pytest.mark.timeout(5400)
def test_the_packaged_recipe_reaches_the_order(tmp_path: Path) -> None:
    """What the lock files pin, or where the archives have newer versions only, those; fetched once, in runs/packages.
    What a run has sealed stays there until one passes."""
    sources = yaml.safe_load((ROOT / "data_recipes/packages.yaml").read_text())["sources"]
    sources = [source for source in sources if source["reader"]["reader"] == "packages"]
    for kind in ("debian", "pypi"):
        folder, lock = ROOT / "runs/packages" / kind, ROOT / f"data_recipes/{kind}.lock.yaml"
        try:
            fetch.fetch("locked", lock, folder, lock)
        except AtomError:
            names, newer = tmp_path / f"{kind}.txt", tmp_path / f"{kind}.lock.yaml"
            names.write_text("\n".join(package.name for package in read_lock(lock).packages))
            fetch.fetch(kind, names, folder, newer)
            lock = newer
        for source in sources:
            if source["reader"]["lock"] == f"{kind}.lock.yaml":
                source["reader"] |= {"path": str(folder), "lock": str(lock)}
                source["tree_digest"] = "auto"
    mix = {"manuals": 0.5, "programs": 0.3, "python_manuals": 0.1, "python_programs": 0.1}
    home = ROOT / "runs/packages/home"
    atom(home, "run", with_sources(tmp_path, sources, mix), "--until", "order-pretrain", timeout=5000)
    counts = {source["name"]: licenses_of(home, source["name"]) for source in sources}
    assert sum(counts.values(), Counter())["documents"] >= 100_000, counts
    assert all(count["unmapped"] < count["documents"] for count in counts.values()), counts
    assert set(order_of(home)) == set(mix)
    shutil.rmtree(home)


def licenses_of(home: Path, source: str) -> Counter[str]:
    """The number of documents of a source that have a license, and of those whose license is unmapped."""
    (artifact,) = (
        a for f in (home / "artifacts").iterdir() if (a := Artifact.open(f)).key.startswith(f"acquire-{source}-")
    )
    counts = Counter[str]()
    for row in artifact.json("source.json")["licenses"]:
        counts["unmapped" if row["license"] == UNMAPPED else "documents"] += row["documents"]
    print(source, counts)
    return counts
