"""Access to the `huggingface_hub` client, which no other module imports.

The import is late, calls are repeated and print nothing, and each error becomes one sentence. `RemoteRepository` has
the content of a repository as the Hub lists it.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from pipeline.core.errors import AtomError, MachineError
from pipeline.core.text import printable
from pipeline.hub.limits import Slot

PUBLIC_HUB = "https://huggingface.co"
# Status codes after which a call is repeated.
RETRIED_STATUSES = (429, 500, 502, 503, 504)
# The number of attempts. Without Retry-After, the waits between them take half a minute together.
ATTEMPTS = 6
# The number of attempts in a row if the Hub does not answer at all, or cuts its answer.
UNREACHABLE_ATTEMPTS = 3
# The number of files that are downloaded at the same time.
DOWNLOADS = 8
# The longest wait between two attempts: all of them outlast the five minutes for which the Hub counts requests.
MAX_RETRY_SECONDS = 61.0
# The longest time without a byte; the client itself would wait for ever. A Hub may need some to process an upload.
SILENT_SECONDS = 60.0


class Changed(AtomError):
    """Somebody else changed or deleted on the Hub what was to be read or changed."""


def endpoint() -> str:
    """Returns HF_ENDPOINT, or the public Hub."""
    return os.environ.get("HF_ENDPOINT", PUBLIC_HUB).rstrip("/")


def load() -> Any:
    """Returns the module `huggingface_hub`, set up before its import: no telemetry, and Xet for the real Hub only."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    is_other_hub = endpoint() != PUBLIC_HUB
    if is_other_hub:
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    import huggingface_hub
    import huggingface_hub.errors
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Another library may have imported it first; the constants from the import are looked up at each call, so they are
    # set as well.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if is_other_hub:
        constants.HF_HUB_DISABLE_XET = True
    _set_timeout(huggingface_hub)
    return huggingface_hub


@lru_cache(maxsize=1)
def _set_timeout(hub_module: Any) -> None:
    """Ends the requests of every client that the module creates from now on after `SILENT_SECONDS` without a byte."""
    from huggingface_hub.utils import _http as client_http

    def make_client() -> Any:
        client = client_http.default_client_factory()
        client.timeout = SILENT_SECONDS
        return client

    hub_module.set_client_factory(make_client)


def _http() -> Any:
    """Returns the HTTP library of the client: huggingface_hub 2 uses httpx2, version 1 uses httpx."""
    return importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


class RetryingClient:
    """The client's calls, each repeated if the Hub is busy or does not answer: the client itself repeats uploads only.

    Every call here may be made twice. Raises what the client raises.
    """

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        return self._retrying(getattr(self.client, name))

    def download_files(self, repo: str, kind: str, commit: str, paths: Sequence[str], folder: Path) -> None:
        """Downloads files of a commit into a folder, some at the same time; the first error ends all.

        `snapshot_download` would list the repository again, and make paths of what that second listing states.
        """

        def download(path: str) -> None:
            self.client.hf_hub_download(repo, path, repo_type=kind, revision=commit, local_dir=folder)

        def download_all() -> None:
            with ThreadPoolExecutor(DOWNLOADS) as pool:
                try:
                    list(pool.map(download, paths))
                except BaseException:
                    # Files whose download has not begun are left out.
                    pool.shutdown(wait=False, cancel_futures=True)
                    raise

        self._retrying(download_all)()

    def download(self, repo: str, kind: str, commit: str, path: str, size: int, folder: Path, slot: Slot) -> Path:
        """Downloads a file of a commit into a folder, at the rates of a slot.

        The client itself repeats a request that is throttled, and resumes an answer that is cut.
        """

        class Bar(load().utils.tqdm):  # type: ignore[misc]
            """Is told of each chunk before the next one is read, so it can wait."""

            def update(self, n: float | None = 1) -> bool | None:
                slot.received(max(0, int(n or 0)))  # less than 0 if the client begins anew
                return super().update(n)  # type: ignore[no-any-return]

        def download() -> Any:
            slot.request(2)  # for what the Hub says of the file, and for the file
            bar = Bar if bounded else None
            return self.client.hf_hub_download(
                repo, path, repo_type=kind, revision=commit, local_dir=folder, tqdm_class=bar
            )

        # Xet opens connections of its own, whose rate nothing here bounds, but it alone reads the largest files.
        bounded = bool(slot.limits.bytes_per_second) and size <= FILE_BYTES
        with without_xet(bounded):
            return Path(self._retrying(download)())

    def read_range(
        self, repo: str, kind: str, commit: str, path: str, span: range, deadline: float, slot: Slot
    ) -> bytes:
        """Returns a range of the bytes of a file of a commit, at the rates of a slot; no others are requested.

        Raises OSError if the Hub sends others, and MachineError after the deadline, a time of `time.monotonic`
        to which the waits of the slot are added.
        """
        hub = load()
        url = hub.hf_hub_url(repo, path, repo_type=kind, revision=commit, endpoint=self.client.endpoint)
        # A proxy that compressed the bytes would send others than the range has.
        headers = {"Range": f"bytes={span.start}-{span.stop - 1}", "Accept-Encoding": "identity"}
        headers |= hub.utils.build_hf_headers(token=self.client.token)

        def read() -> bytes:
            data = bytearray()
            slot.request()
            with hub.utils.get_session().stream("GET", url, headers=headers) as response:
                hub.utils.hf_raise_for_status(response)
                if response.status_code != 206:
                    raise OSError("a whole file in place of a range of its bytes")
                for chunk in response.iter_raw():
                    slot.received(len(chunk))
                    data += chunk
                    if len(data) > len(span):
                        break
                    if time.monotonic() - slot.waited > deadline:
                        raise MachineError(f"{endpoint()} is too slow; run the same command again to go on")
            if len(data) != len(span):
                raise OSError(f"{len(data)} bytes in place of {len(span)}")
            return bytes(data)

        return bytes(self._retrying(read)())

    def _retrying(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function that makes a call, up to ATTEMPTS times."""

        def retrying(*arguments: Any, **options: Any) -> Any:
            unanswered = 0  # attempts in a row
            for attempt in range(ATTEMPTS - 1):
                try:
                    return _answer(call, *arguments, **options)
                except Exception as error:
                    unanswered = unanswered + 1 if _is_unanswered(error) else 0
                    if (seconds := _pause(error, attempt)) is None or unanswered == UNREACHABLE_ATTEMPTS:
                        raise
                time.sleep(seconds)
            return _answer(call, *arguments, **options)

        return retrying


def _answer(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Makes a call; returns the rows of a listing as a list.

    Raises the error of an upload itself, not the RuntimeError in which the client wraps it.
    """
    try:
        answer = call(*arguments, **options)
        return list(answer) if inspect.isgenerator(answer) else answer  # each page of a listing is a request
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _cause(error: Exception) -> BaseException | None:
    """Returns why a call failed: the client raises LocalEntryNotFoundError for a failed download."""
    return error.__cause__ if isinstance(error, load().errors.LocalEntryNotFoundError) else error


def _is_unanswered(error: Exception) -> bool:
    return isinstance(_cause(error), _http().TransportError)


def _pause(error: Exception, attempt: int) -> float | None:
    """Returns the seconds until a failed call is repeated; None if it is not repeated.

    The seconds are those of the Hub's Retry-After or RateLimit, or else 1, 2, 4, … by the number of the attempt.
    """
    # A failing server sends it: the client reads some answers before it checks their status.
    if isinstance(error, json.JSONDecodeError):
        return 2.0**attempt

    cause = _cause(error)
    if _status(cause) not in RETRIED_STATUSES and not _is_unanswered(error):
        return None

    seconds, response = 2.0**attempt, getattr(cause, "response", None)
    headers = {} if response is None else response.headers
    if (retry_after := str(headers.get("Retry-After", ""))).isdecimal():
        seconds = float(retry_after)
    elif _status(cause) == 429 and (limit := load().utils.parse_ratelimit_headers(headers)):
        seconds = limit.reset_in_seconds + 1.0
    return min(seconds, MAX_RETRY_SECONDS)


def api() -> Any:
    """Returns a client of HF_ENDPOINT with HF_TOKEN."""
    return RetryingClient(load().HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or None))


@contextmanager
def online() -> Iterator[None]:
    """Lets the client use the network in a stage, whose environment turns downloads off."""
    load()
    from huggingface_hub import constants

    offline, constants.HF_HUB_OFFLINE = constants.HF_HUB_OFFLINE, False
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = offline


@contextmanager
def without_xet(disabled: bool) -> Iterator[None]:
    """Lets the client read files by plain HTTP."""
    load()
    from huggingface_hub import constants

    before = constants.HF_HUB_DISABLE_XET
    constants.HF_HUB_DISABLE_XET = before or disabled
    try:
        yield
    finally:
        constants.HF_HUB_DISABLE_XET = before


@contextmanager
def translate_errors(action: str) -> Iterator[None]:
    """Turns the client's errors during `action` into one AtomError.

    It is a MachineError if another attempt may succeed.
    """
    try:
        yield
    except Exception as error:
        if (translated := _translated(error)) is None:
            raise
        raise type(translated)(f"{action}: {translated}") from None


def _translated(error: Exception) -> AtomError | None:
    """Returns the AtomError for an error of the client; None for an error of something else."""
    errors, http, hub = load().errors, _http(), endpoint()
    if isinstance(error, errors.RepositoryNotFoundError):
        if _status(error) == 401 and os.environ.get("HF_TOKEN"):
            return AtomError(f"{hub} refuses the token in HF_TOKEN or hides this repository from it")
        return AtomError(f"{hub} has no such repository, or it is private or gated and HF_TOKEN may not read it")
    if isinstance(error, errors.RevisionNotFoundError):
        return Changed("the repository has no such revision")
    if isinstance(error, errors.HfHubHTTPError):
        return _translated_status(_status(error), _first_line(getattr(error, "server_message", None) or error))

    # The rest by their class alone. In this order, since some are kinds of others.
    unreachable = (http.HTTPError, http.InvalidURL, ConnectionError, errors.OfflineModeIsEnabled)
    rows: tuple[tuple[Any, type[AtomError], str], ...] = (
        (errors.LocalEntryNotFoundError, MachineError, "{hub} cannot be read: {text}; try again"),
        (json.JSONDecodeError, MachineError, "{hub} sends a malformed answer, perhaps from a proxy; try again"),
        (errors.LocalTokenNotFoundError, AtomError, "no token; set HF_TOKEN to one with write access"),
        (errors.HFValidationError, AtomError, "{text}"),
        (http.TimeoutException, MachineError, "{hub} does not answer; try again later, or check HF_ENDPOINT"),
        (http.TooManyRedirects, AtomError, "{hub} redirects in a circle; check HF_ENDPOINT"),
        (http.RemoteProtocolError, MachineError, "{hub} interrupts or corrupts its answer: {text}"),
        (unreachable, MachineError, "{hub} cannot be reached ({kind}); check HF_ENDPOINT"),
        (OSError, MachineError, "{hub} sends other bytes than it announced: {text}"),
    )
    for kinds, translation, sentence in rows:
        if isinstance(error, kinds):
            if kinds is OSError and error.errno is not None:
                return None  # the disk's
            fields = {"hub": hub, "text": _first_line(error), "kind": type(error).__name__}
            return translation(sentence.format(**fields))
    return None


def _translated_status(status: int | None, message: str) -> AtomError:
    """Returns the AtomError for an answer of the Hub with an error status."""
    if status == 401:
        return AtomError(f"{endpoint()} refuses the token; set HF_TOKEN to a valid one with write access")
    if status == 403:
        return AtomError(f"the token may not write there ({message}); use a namespace that is yours")
    if status == 412:
        return Changed("somebody else has changed it meanwhile")
    kind = MachineError if status in RETRIED_STATUSES else AtomError
    return kind(f"{endpoint()} answers {status}: {message}")


def _first_line(error: object) -> str:
    """Returns the first line of a message, safe to print."""
    return printable((str(error).splitlines() or [""])[0])


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)


# The largest file that the Hub's client reads without Xet (`MAX_HTTP_DOWNLOAD_SIZE` of huggingface_hub 2.4). The Hub
# itself recommends files below 200 GB and stores none above 500 GB (`docs/hub/storage-limits.md` of
# github.com/huggingface/hub-docs, read at commit 003e04e94a59).
FILE_BYTES = 50 * 10**9
# The most files of a folder.
FOLDER_FILES = 10_000
# The most files of a repository. A recommendation: the Hub refuses no repository for its files.
REPOSITORY_FILES = 100_000
# The longest part of a path and the longest path of a repository. File systems take 255 bytes and 4,096, of which the
# client needs some for its own files beside them.
PART_BYTES, PATH_BYTES = 240, 1000


@dataclass(frozen=True)
class Refs:
    """{name: commit} of the branches and tags of a repository."""

    branches: dict[str, str]
    tags: dict[str, str]


@dataclass(frozen=True)
class RemoteFile:
    """A file of a revision."""

    # Its git blob id, or its SHA-256 if it is an LFS file.
    id: str
    # In bytes.
    size: int


@dataclass(frozen=True)
class RemoteRepository:
    """A repository at HF_ENDPOINT, read with HF_TOKEN.

    Every method raises what the client raises: call it inside `translate_errors`.
    """

    # NAMESPACE/NAME.
    id: str
    # Model, dataset or space.
    kind: str

    def exists(self) -> bool:
        return bool(api().repo_exists(self.id, repo_type=self.kind))

    def is_private(self) -> bool:
        return bool(api().repo_info(self.id, repo_type=self.kind).private)

    def refs(self) -> Refs:
        refs = api().list_repo_refs(self.id, repo_type=self.kind)
        branches, tags = ({ref.name: ref.target_commit for ref in kind} for kind in (refs.branches, refs.tags))
        return Refs(branches, tags)

    def first_commit(self) -> str:
        return str(api().list_repo_commits(self.id, repo_type=self.kind)[-1].commit_id)

    def commit(self, revision: str) -> str:
        """Returns the commit of a branch, a tag, or a commit."""
        return str(api().repo_info(self.id, repo_type=self.kind, revision=revision).sha)

    def files(self, revision: str) -> dict[str, RemoteFile]:
        """Returns {path: file} of a revision."""
        entries = api().list_repo_tree(self.id, recursive=True, revision=revision, repo_type=self.kind)
        return {
            entry.path: RemoteFile(entry.lfs.sha256 if entry.lfs else entry.blob_id, entry.size)
            for entry in entries
            # Entries without a blob are folders.
            if hasattr(entry, "blob_id")
        }


class RangedFile:
    """A file of a dataset, of which only those bytes are requested that are read; pyarrow takes it for an open file.

    Reading raises AtomError: what `translate_errors` makes of an error, and one beyond the limits.

    Attributes:
        left: Bytes that may still be read.
        title: The beginning of an error.
    """

    closed = False

    def __init__(
        self, repo: str, commit: str, path: str, size: int, deadline: float, most_bytes: int, slot: Slot
    ) -> None:
        """Requests nothing yet.

        Args:
            repo: The dataset repository.
            commit: The commit.
            path: The path of the file.
            size: Its bytes.
            deadline: The time of `time.monotonic` after which nothing is read.
            most_bytes: The most bytes that are read.
            slot: The slot that bounds its requests.
        """
        self.repo, self.commit, self.path, self.size = repo, commit, path, size
        self.deadline, self.left, self.position, self.slot = deadline, most_bytes, 0, slot
        self.title = f"reading {printable(path)} of {repo}@{commit[:12]}"

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.position, os.SEEK_END: self.size}[whence]
        return self.position

    def tell(self) -> int:
        return self.position

    def read(self, count: int) -> bytes:
        span = range(self.position, max(self.position, min(self.position + count, self.size)))
        self.left -= len(span)
        if self.left < 0:
            raise AtomError(f"{self.title}: a sample needs too many bytes of it; its rows are too long")
        if time.monotonic() - self.slot.waited > self.deadline:
            raise MachineError(f"{self.title}: no time is left; run the same command again to go on")
        self.position = span.stop
        with translate_errors(self.title):
            if not span:
                return b""
            file = self.repo, "dataset", self.commit, self.path
            return bytes(api().read_range(*file, span, self.deadline, self.slot))


def is_unsafe(path: str) -> bool:
    """Returns True if a path of a repository must not be written to a disk.

    Such a path leads outside its folder or into the client's own files, or is too long for a file system.
    """
    if not path.isprintable() or "\\" in path or len(path.encode()) > PATH_BYTES:
        return True
    parts = path.split("/")
    # The client keeps its own files in .cache, and git those of a checkout in .git.
    reserved = ("", ".", "..", ".cache", ".git")
    return any(part in reserved or len(part.encode()) > PART_BYTES for part in parts)


def unsafe_path(paths: Iterable[str]) -> str | None:
    """Returns the first path of a repository that must not be written to a disk; None without one.

    Such a path `is_unsafe`, or is both a file and the folder of another file.
    """
    sorted_paths = sorted(paths)
    if unsafe := next(filter(is_unsafe, sorted_paths), None):
        return unsafe
    folders = {str(parent) for path in sorted_paths for parent in PurePosixPath(path).parents}
    return next((path for path in sorted_paths if path in folders), None)
