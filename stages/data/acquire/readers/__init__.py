"""Readers: produce documents with stable ids from files or from a seed."""

from __future__ import annotations

READERS = {
    "datatrove": "stages.data.acquire.readers.block",
    "stdlib-docstrings": "stages.data.acquire.readers.stdlib_docstrings",
    "stdlib-source": "stages.data.acquire.readers.stdlib_source",
    "jsonl": "stages.data.acquire.readers.jsonl",
    "parquet": "stages.data.acquire.readers.parquet",
    "packages": "stages.data.acquire.readers.packages",
    "hub": "stages.data.acquire.readers.hub",
    "problems": "stages.data.acquire.readers.problems",
    "passkeys": "stages.data.acquire.readers.passkeys",
    "chat-problems": "stages.data.acquire.readers.chat_problems",
    "courtesies": "stages.data.acquire.readers.courtesies",
    "generated": "stages.data.acquire.readers.generated",
    "warc": "stages.data.acquire.readers.warc",
    "html": "stages.data.acquire.readers.html_pages",
}
"""{reader: module whose READER is its class}. Importing one is cheap: no datatrove or pyarrow."""
