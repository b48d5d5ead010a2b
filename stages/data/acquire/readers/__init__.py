"""Readers: produce documents with stable ids from files or from a seed."""

from __future__ import annotations

from pipeline.core.extensions import extend

# {reader: its class}. Importing one is cheap: no datatrove or pyarrow.
READERS = {
    "datatrove": "stages.data.acquire.readers.block:BlockReader",
    "stdlib-docstrings": "stages.data.acquire.readers.python_stdlib:StdlibDocstrings",
    "stdlib-source": "stages.data.acquire.readers.python_stdlib:StdlibSource",
    "jsonl": "stages.data.acquire.readers.row_files:Jsonl",
    "parquet": "stages.data.acquire.readers.row_files:Parquet",
    "packages": "stages.data.acquire.readers.packages:Packages",
    "hub": "stages.data.acquire.readers.hub:Hub",
    "problems": "stages.data.acquire.readers.procedural:Problems",
    "passkeys": "stages.data.acquire.readers.procedural:Passkeys",
    "chat-problems": "stages.data.acquire.readers.procedural:ChatProblems",
    "courtesies": "stages.data.acquire.readers.procedural:Courtesies",
    "generated": "stages.data.acquire.readers.generated:Generated",
    "warc": "stages.data.acquire.readers.web_pages:Warc",
}
extend("readers", READERS)
