"""Time, memory, commits and requests of an upload to the local Hub, by the number of files, with a kill in between.

    .venv/bin/python bench/upload.py                    # 1,000 and 10,000 files, some minutes on one core
    .venv/bin/python bench/upload.py --files 1000

Nine files of ten are tables, which go through LFS, the rest JSON. An upload is killed when two fifths of its commits
are made, another one finishes it, and a third one finds nothing to do. The Hub refuses more than 128 commits an hour,
as the real one does. The last line is one JSON object; its ratio is that of the objects to their uploads, which is 1 if
no finished file was sent again.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from release.hub.local.server import LOCAL_TOKEN, running  # noqa: E402
from release.hub.upload import COMMITS, FILES_PER_COMMIT  # noqa: E402

FOLDER_FILES = 500
UPLOAD = """
import sys
from pathlib import Path
from pipeline.hub.client import RemoteRepository
from release.hub.upload import Destination, Journal
from release.repositories import Repository
folder = Path(sys.argv[1])
remote, journal = RemoteRepository("local/big", "dataset"), Journal(folder.with_suffix(".jsonl"))
destination = Destination(folder, Repository("", "", "dataset"), remote, "v1", journal)
destination.refuse_beyond_limits()
sent = destination.upload(lambda text: None).files_sent
assert not destination.differs("main")
peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
print(sent, int(peak.split()[1]) // 1024)
"""


def make_files(folder: Path, count: int) -> None:
    for number in range(count):
        suffix = "json" if number % 10 == 9 else "parquet"
        path = folder / f"part-{number // FOLDER_FILES:03d}/{number:06d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(f"{number:06d}".encode() * 200)


def upload(folder: Path, endpoint: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": LOCAL_TOKEN, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-P", "-c", UPLOAD, str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def commits(folder: Path) -> int:
    journal = folder.with_suffix(".jsonl")
    return journal.read_text().count('"create_commit"') if journal.exists() else 0


def finish(process: subprocess.Popen[str]) -> tuple[int, int]:
    """(files sent, peak of memory in MB)"""
    out, err = process.communicate()
    assert process.returncode == 0, err
    sent, megabytes = map(int, out.split())
    return sent, megabytes


def measure(count: int, folder: Path) -> dict[str, Any]:
    files, log = folder / "files", folder / "requests"
    make_files(files, count)
    planned = -(-count // max(FILES_PER_COMMIT, -(-count // COMMITS)))
    with running(folder / "hub", "local", LOCAL_TOKEN, "--log", str(log)) as endpoint:
        start = time.monotonic()
        killed = upload(files, endpoint)
        while commits(files) < 2 * planned // 5:
            assert killed.poll() is None, killed.communicate()[1]
            time.sleep(0.01)
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        sent, megabytes = finish(upload(files, endpoint))
        seconds = time.monotonic() - start
        start = time.monotonic()
        repeated, _ = finish(upload(files, endpoint))
        again = time.monotonic() - start
    requests = Counter(line.split("/")[0] + _kind(line) for line in log.read_text().splitlines())
    objects = Counter(line for line in log.read_text().splitlines() if line.startswith("PUT /_lfs/"))
    return {
        "files": count, "seconds": round(seconds, 1), "seconds_without_change": round(again, 1), "megabytes": megabytes,
        "commits": commits(files), "sent_by_the_second": sent, "sent_without_change": repeated, "objects": len(objects),
        "objects_sent_again": sum(objects.values()) - len(objects), "requests": dict(sorted(requests.items())),
    }  # fmt: skip


def _kind(line: str) -> str:
    """What a request is for."""
    for kind in ("/commit/", "/preupload/", "/objects/batch", "/verify", "/_lfs/", "/tree/", "/refs", "/branch/"):
        if kind in line:
            return kind.strip("/")
    return "other"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, nargs="+", default=[1_000, 10_000])
    rows = []
    for count in parser.parse_args().files:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(count, Path(folder)))
            print(json.dumps(rows[-1]), flush=True)
    uploads = sum(row["objects"] + row["objects_sent_again"] for row in rows)
    result = {
        "name": "upload", "ratio": round(sum(row["objects"] for row in rows) / uploads, 4), "target": 1.0,
        "unit": "objects by their uploads, with a kill in between", "sizes": rows,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
