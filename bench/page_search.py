"""The search of a release's page: time, memory and size of its index, and the time of a query in Chromium over HTTP.

    python bench/page_search.py --documents 10000
    python bench/page_search.py --documents 100000 --page runs/releases/atom-tiny-0.1.0/site

Writes documents of random words with Zipf's distribution, 150 on average, in parts of 5,000, and indexes them in a
process of its own, whose largest memory counts. With --page, the index replaces that of a copy of this page, which a
local server then gives to Chromium: its first paint, and each query until its hits are on the page. Nothing is in the
browser's cache at first; each query is then repeated. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

QUERIES = ("w1", "w1 w2", "w7 w19 w40", "w150000", "w12345", "w3 w99", "random 77", "w2 w3 w5 w8", "w900", "absent")
"""Of the commonest words, rare ones, several, a document's id, and a word that no document has."""
DRIVER = """<script>
onload = () => setTimeout(async () => {
  const paints = Object.fromEntries(performance.getEntriesByType("paint").map((e) => [e.name, e.startTime]));
  const rows = [];
  for (const query of QUERIES) {
    const row = [query];
    for (let turn = 0; turn < 2; turn++) {
      const begin = performance.now();
      await search(query);
      await new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)));
      row.push(performance.now() - begin);
    }
    rows.push([...row, (await atomSearch(query)).length]);
  }
  await fetch("/result", { method: "POST", body: JSON.stringify({ paints, rows }) });
}, 1500);
</script></body>"""
SECONDS = 300
PART, WORDS, VOCABULARY = 5_000, 150, 200_000
INDEX = """
import sys, time
from pathlib import Path
from release.web_page import search_index
from release.web_page.script_parts import PartWriter

def highest():  # getrusage counts what the parent had before exec
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith("VmHWM"))

import pyarrow.parquet, numpy
before = highest()
start = time.process_time()
search_index.write(Path(sys.argv[1]), PartWriter(Path(sys.argv[1]) / "site"))
print(time.process_time() - start, highest(), before)
"""


def write_documents(release: Path, count: int) -> None:
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    from pipeline.core.store import sha256_bytes

    draw = np.random.default_rng(1)
    for part in range(-(-count // PART)):
        rows: list[dict[str, Any]] = []
        for number in range(part * PART, min(count, (part + 1) * PART)):
            words = np.minimum(draw.zipf(1.3, draw.integers(20, 2 * WORDS - 20)), VOCABULARY)
            text = " ".join(f"w{word}" for word in words.tolist())
            row = {"id": f"random/{number}", "text": text, "source": "random", "license": "CC0-1.0", "origin": "here"}
            rows.append(row | {"content_hash": sha256_bytes(text.encode()), "split": "train"})
        for folder in ("kept", "dispositions", "tokens/documents"):
            path = release / "dataset" / folder / "random" / f"part-{part:05}.parquet"
            path.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.Table.from_pylist(rows if folder == "kept" else [{"id": ""}]), path, compression="zstd")


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, and keeps what the page posts in `server.result`."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(204)
        self.end_headers()
        self.server.result = json.loads(body)  # type: ignore[attr-defined]
        self.server.posted.set()  # type: ignore[attr-defined]

    def log_message(self, *arguments: object) -> None:
        """Requests are not logged."""


def browse(page: Path, index: Path, folder: Path) -> dict[str, Any]:
    """What Chromium measures of a copy of `page` with another index. Exits if there is no Chromium or no answer."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        sys.exit("bench/page_search.py: --page needs Chromium; apt-get install chromium")
    site = folder / "served"
    shutil.copytree(page, site, ignore=shutil.ignore_patterns("search"))
    shutil.copytree(index / "search", site / "search")
    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", (page / "index.html").read_text())
    (site / "index.html").write_text(text.replace("</body>", DRIVER.replace("QUERIES", json.dumps(QUERIES))))
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site)))
    server.posted = threading.Event()  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    command = [chromium, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    browser = subprocess.Popen(
        [*command, f"http://127.0.0.1:{server.server_port}/index.html"], stderr=subprocess.DEVNULL
    )
    try:
        if not server.posted.wait(SECONDS):  # type: ignore[attr-defined]
            sys.exit(f"bench/page_search.py: Chromium did not answer within {SECONDS} s")
    finally:
        browser.terminate()
        browser.wait()
        server.shutdown()
    return dict(server.result)  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000)
    parser.add_argument(
        "--page", type=Path, metavar="FOLDER", help="the folder site of a release, to measure it in Chromium"
    )
    arguments = parser.parse_args()
    count = arguments.documents
    with tempfile.TemporaryDirectory() as folder:
        release = Path(folder)
        write_documents(release, count)
        command = [sys.executable, "-P", "-c", INDEX, folder]
        process = subprocess.run(command, capture_output=True, text=True, check=True)
        seconds, memory, before = map(float, process.stdout.split())
        sizes = [path.stat().st_size for path in (release / "site").rglob("*.js")]
        measured = browse(arguments.page, release / "site", release) if arguments.page else None
    print(f"{count} documents: {seconds:.1f} s of the processor, {memory:.0f} MiB (before: {before:.0f} MiB)")
    print(f"{len(sizes)} parts, {sum(sizes) / 1e6:.1f} MB, the largest {max(sizes) / 1e3:.0f} kB")
    figures = {"documents": count, "seconds": seconds, "memory_mib": memory, "bytes": sum(sizes), "parts": len(sizes)}
    if measured:
        print(f"first paint after {measured['paints']['first-contentful-paint']:.0f} ms")
        for query, first, again, hits in measured["rows"]:
            print(f"{query!r:<14} {first:6.0f} ms, again {again:6.0f} ms, {hits} documents")
        times = [row[1] for row in measured["rows"]]
        figures |= {"first_paint_ms": measured["paints"]["first-contentful-paint"]}
        figures |= {"query_ms_median": statistics.median(times), "query_ms_largest": max(times)}
    print(json.dumps({"name": "page_search", **figures}))


if __name__ == "__main__":
    main()
