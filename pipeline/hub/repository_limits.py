"""What a repository of the Hub takes: file sizes, and files in a folder and in a repository.

Source: `docs/hub/storage-limits.md` of github.com/huggingface/hub-docs, read at commit 003e04e94a59.
"""

FILE_BYTES = 50 * 10**9
"""The largest file that the Hub's client reads without Xet (`MAX_HTTP_DOWNLOAD_SIZE` of huggingface_hub 2.4). The Hub
itself recommends files below 200 GB and stores none above 500 GB."""
FOLDER_FILES = 10_000
REPOSITORY_FILES = 100_000
"""A recommendation: the Hub refuses no repository for its files."""
