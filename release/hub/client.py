"""The one door to the real `huggingface_hub` client: imported late, quiet, and with its errors told in one sentence."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from itertools import islice
from typing import Any

from pipeline.core.errors import AtomError
from release.hub import limits
from release.hub.limits import PUBLIC_HUB, HubLimit
from release.untrusted import printable

BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same is asked again."""
ATTEMPTS = 6
UNREACHABLE_ATTEMPTS = 3
"""Where no answer comes at all."""
MOST_SECONDS = 60.0
LISTED = 1_000_000
"""Files, branches or commits that a Hub may list."""
ODD = (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError)
"""What the client raises where JSON is of another shape than a Hub's, and so do we where we read what it returns."""


class OddAnswer(Exception):
    """An answer of another shape than a Hub's; its text says what came of reading it."""


def endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", PUBLIC_HUB).rstrip("/")


def load() -> Any:
    """The module `huggingface_hub`, set up before its import: no telemetry, and Xet for the real Hub only."""
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    plain = endpoint() != PUBLIC_HUB
    if plain:
        os.environ["HF_HUB_DISABLE_XET"] = "1"
    import huggingface_hub
    import huggingface_hub.errors
    from huggingface_hub import constants
    from huggingface_hub.utils.tqdm import disable_progress_bars

    # Another library may have imported it first; what is read at import is looked up at each call, so it is set too.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
        disable_progress_bars()
    if plain:
        constants.HF_HUB_DISABLE_XET = True
    _limit_client(huggingface_hub)
    return huggingface_hub


@lru_cache(maxsize=1)
def _limit_client(hub: Any) -> None:
    """Every client that the module makes from now on keeps to our limits."""
    from huggingface_hub.utils import _http

    hub.set_client_factory(lambda: limits.install(_http.default_client_factory(), endpoint()))


def _http() -> Any:
    """huggingface_hub 2 stands on httpx2, version 1 on httpx."""
    return importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")


class Patient:
    """The client's calls, each asked again where the Hub says that it is busy or does not answer: the client itself
    does so for uploads only. Every call that is made here may be made twice."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.client, name)

        def patient(*arguments: Any, **options: Any) -> Any:
            inspect.signature(call).bind(*arguments, **options)  # raises TypeError for a call of ours that is wrong
            errors, transport = load().errors, _http().TransportError
            for attempt in range(ATTEMPTS):
                limits.begin_call(again=attempt > 0)
                try:
                    with parsing():
                        answer = _unwrapped(call, *arguments, **options)
                        if not inspect.isgenerator(answer):
                            return answer
                        rows = list(islice(answer, LISTED + 1))  # which asks when it is read
                    if len(rows) > LISTED:
                        raise HubLimit(f"lists more than {LISTED} entries")
                    return rows
                except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, transport) as error:
                    # a download that was answered by an error says that nothing is here, and why
                    why = error.__cause__ if isinstance(error, errors.LocalEntryNotFoundError) else error
                    last = UNREACHABLE_ATTEMPTS if isinstance(why, transport) else ATTEMPTS
                    if not (isinstance(why, transport) or _status(why) in BUSY) or attempt >= last - 1:
                        raise
                    time.sleep(_wait(why, attempt))
                except json.JSONDecodeError:  # of a server's failure; the client reads some answers before their status
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(2.0**attempt)
            raise AssertionError("the last attempt returns or raises")

        return patient


@contextmanager
def parsing() -> Iterator[None]:
    """Where answers of the Hub are read: raises OddAnswer for one of another shape."""
    errors = load().errors
    try:
        yield
    except (json.JSONDecodeError, errors.HFValidationError, errors.HfHubHTTPError, errors.LocalEntryNotFoundError):
        raise
    except ODD as error:
        raise OddAnswer(f"{type(error).__name__}: {_first_line(error)}") from error


def _unwrapped(call: Any, *arguments: Any, **options: Any) -> Any:
    """Calls. What went wrong with an upload is raised itself, not the RuntimeError in which the client wraps it."""
    try:
        return call(*arguments, **options)
    except RuntimeError as error:
        if error.__cause__ is None:
            raise
        raise error.__cause__ from None


def _wait(error: Any, attempt: int) -> float:
    """Seconds: what the Hub asks for, or 1, 2, 4, … ; a minute at most."""
    response = getattr(error, "response", None)
    asked = str(response.headers.get("Retry-After", "")) if response is not None else ""
    return min(float(asked) if asked.isdigit() else 2.0**attempt, MOST_SECONDS)


def api() -> Any:
    """A client of HF_ENDPOINT with HF_TOKEN."""
    return Patient(load().HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or None))


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns the client's failures while doing `what`, and what `parsing` raises, into one AtomError."""
    errors, http = load().errors, _http()
    try:
        yield
    except HubLimit as error:
        raise AtomError(f"{what}: {endpoint()} {printable(str(error))}") from None
    except errors.RepositoryNotFoundError as error:
        status = _status(error)
        if status == 401 and os.environ.get("HF_TOKEN"):
            raise AtomError(
                f"{what}: {endpoint()} refuses the token in HF_TOKEN or hides this repository from it"
            ) from None
        raise AtomError(
            f"{what}: {endpoint()} has no such repository, or it is private and HF_TOKEN may not read it"
        ) from None
    except errors.RevisionNotFoundError:
        raise AtomError(f"{what}: the repository has no such revision") from None
    except errors.HfHubHTTPError as error:
        status, message = _status(error), _first_line(getattr(error, "server_message", None) or error)
        if status == 401:
            raise AtomError(
                f"{what}: {endpoint()} refuses the token; set HF_TOKEN to a valid one with write access"
            ) from None
        if status == 403:
            raise AtomError(
                f"{what}: the token may not write there ({message}); use a namespace that is yours"
            ) from None
        raise AtomError(f"{what}: {endpoint()} answers {status}: {message}") from None
    except errors.LocalEntryNotFoundError as error:
        raise AtomError(f"{what}: {endpoint()} cannot be read: {_first_line(error)}; try again") from None
    except json.JSONDecodeError:
        raise AtomError(
            f"{what}: {endpoint()} answers what no Hub does, perhaps a proxy before it; try again"
        ) from None
    except errors.LocalTokenNotFoundError:
        raise AtomError(f"{what}: no token; set HF_TOKEN to one with write access") from None
    except errors.HFValidationError as error:
        raise AtomError(f"{what}: {_first_line(error)}") from None
    except http.TimeoutException:
        raise AtomError(f"{what}: {endpoint()} does not answer; try again later, or check HF_ENDPOINT") from None
    except http.TooManyRedirects:
        raise AtomError(f"{what}: {endpoint()} sends us in circles; check HF_ENDPOINT") from None
    except http.RemoteProtocolError as error:
        raise AtomError(f"{what}: {endpoint()} breaks off or garbles its answer: {_first_line(error)}") from None
    except (http.HTTPError, http.InvalidURL, ConnectionError, errors.OfflineModeIsEnabled) as error:
        raise AtomError(f"{what}: {endpoint()} cannot be reached ({type(error).__name__}); check HF_ENDPOINT") from None
    except OddAnswer as error:
        raise AtomError(f"{what}: {endpoint()} answers what no Hub does ({error}); check HF_ENDPOINT") from None
    except OSError as error:
        if error.errno is not None:  # the disk's
            raise
        raise AtomError(f"{what}: {endpoint()} sends other bytes than it announced: {_first_line(error)}") from None


def _first_line(error: object) -> str:
    """What an error or a server says, in one line that is safe to print."""
    return printable((str(error).splitlines() or [""])[0])


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)
