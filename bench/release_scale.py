"""Memory and time of reading a release by the number of its documents: facts, Merkle roots, checks, traces.

    .venv/bin/python bench/release_scale.py            # 30,000 and 100,000 documents, some minutes on one core
    .venv/bin/python bench/release_scale.py --full     # 100,000, 300,000 and 1,000,000

The corpora are fabricated in parts of 10,000 short documents. Each task runs in a process of its own; its peak of
resident memory counts all libraries. The slope is that of a line through the last two sizes, in bytes a document. The
last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from tests.fixtures.corpus_fixtures import make_corpus  # noqa: E402

PART = 10_000
MEGABYTES, SLOPE = 1500, 16
"""The maximum memory at 3,000,000 documents, and bytes of memory for each document."""
TASKS = {
    "facts": "from release.facts.data_facts import read_data_facts; read_data_facts(data)",
    "roots": "from release import merkle; merkle.roots(data)",
    "proof": "from release import merkle; merkle.prove(data, id)",
    "licenses": "assert not documents.licenses(Release(data, 'dataset')).problems",
    "dispositions": "assert not documents.dispositions(Release(data, 'dataset')).problems",
    "content hashes": "assert not documents.content_hashes(Release(data, 'dataset')).problems",
    "secrets": "from release.checks import source_code; source_code.scan_files(data, files_below(data), [])",
    "document": "tracing.trace_document(data, id)",
    "removal": "tracing.trace_removal(data, id)",
    "step": "assert tracing.trace_step(data, 'pretrain', 7).segments[0].license",
    "text": "assert len(tracing.trace_text(data, id).matches) == 1",
}
PRELUDE = """
import json, sys, time
from pathlib import Path
from pipeline.core.errors import AtomError
from release import tracing
from release.checks import documents
from release.opened_release import Release
from release.repositories import files_below
data, id = Path(sys.argv[1]), sys.argv[2]
start = time.process_time()
{task}
seconds = time.process_time() - start
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(json.dumps([seconds, int(peak.split()[1]) / 1024]))
"""


def measure(data: Path, task: str) -> tuple[float, float]:
    """CPU seconds and the peak of memory in MB of a task in a process of its own."""
    import pyarrow.parquet as pq

    table = sorted((data / "kept/web").iterdir())[-1]
    id = pq.read_table(table, columns=["id"])["id"][-1].as_py()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    code = PRELUDE.format(task=TASKS[task])
    process = subprocess.run(
        [sys.executable, "-P", "-c", code, str(data), id], env=environment, capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    seconds, megabytes = json.loads(process.stdout.splitlines()[-1])
    return seconds, megabytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    sizes = [100_000, 300_000, 1_000_000] if parser.parse_args().full else [30_000, 100_000]
    figures: dict[str, list[tuple[float, float]]] = {task: [] for task in TASKS}
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / "dataset"
            make_corpus(data, size, max(2, size // PART))
            for task in TASKS:
                figures[task].append(measure(data, task))
    print(f"{'':18}" + "".join(f"{size:>22,}" for size in sizes) + f"{'slope, B a document':>22}")
    slopes = {}
    for task, rows in figures.items():
        slopes[task] = (rows[-1][1] - rows[-2][1]) * 2**20 / (sizes[-1] - sizes[-2])
        cells = "".join(f"{seconds:>12.1f} s{megabytes:>6.0f} MB" for seconds, megabytes in rows)
        print(f"{task:18}{cells}{slopes[task]:>22.1f}")
    peaks = {task: rows[-1][1] + max(slopes[task], 0) * (3e6 - sizes[-1]) / 2**20 for task, rows in figures.items()}
    worst = min(MEGABYTES / max(peaks.values()), SLOPE / max(1e-9, *slopes.values()))
    result: dict[str, Any] = {
        "name": "release_scale", "ratio": round(worst, 3), "target": 1.0,
        "unit": "smallest of limit by measured, of memory at 3,000,000 documents and of its slope",
        "documents": sizes, "megabytes": {task: [round(row[1]) for row in rows] for task, rows in figures.items()},
        "slopes": {task: round(slope, 1) for task, slope in slopes.items()},
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
