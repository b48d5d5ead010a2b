"""Readers: produce documents with stable ids from files or from a seed."""

from __future__ import annotations

READERS = {
    "datatrove": "stages.data.readers.block",
    "stdlib-docstrings": "stages.data.readers.stdlib_docstrings",
    "stdlib-source": "stages.data.readers.stdlib_source",
    "jsonl": "stages.data.readers.jsonl",
    "parquet": "stages.data.readers.parquet",
    "packages": "stages.data.readers.packages",
    "hub": "stages.data.readers.hub",
    "problems": "stages.data.readers.problems",
    "passkeys": "stages.data.readers.passkeys",
    "chat-problems": "stages.data.readers.chat_problems",
    "courtesies": "stages.data.readers.courtesies",
    "generated": "stages.data.readers.generated",
    "warc": "stages.data.readers.warc",
    "html": "stages.data.readers.html_pages",
}
"""{reader: module whose READER is its class}. Importing one is cheap: no datatrove or pyarrow."""
