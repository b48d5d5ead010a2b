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
from typing import Any

from pipeline.errors import AtomError

PUBLIC_HUB = "https://huggingface.co"
BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same is asked again."""
ATTEMPTS = 6
MOST_SECONDS = 60.0


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
    return huggingface_hub


class Patient:
    """The client's calls, each asked again where the Hub says that it is busy: the client itself does so for uploads
    only. Every call that is made here may be made twice."""

    def __init__(self, client: Any) -> None:
        self.client = client

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.client, name)

        def patient(*arguments: Any, **options: Any) -> Any:
            for attempt in range(ATTEMPTS):
                try:
                    found = call(*arguments, **options)
                    return list(found) if inspect.isgenerator(found) else found  # which asks when it is read
                except (load().errors.HfHubHTTPError, load().errors.LocalEntryNotFoundError) as error:
                    # a download that was answered by an error says that nothing is here, and why
                    why = error.__cause__ if isinstance(error, load().errors.LocalEntryNotFoundError) else error
                    if _status(why) not in BUSY or attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(_wait(why, attempt))
                except json.JSONDecodeError:  # of a server's failure; the client reads some answers before their status
                    if attempt == ATTEMPTS - 1:
                        raise
                    time.sleep(2.0**attempt)
            raise AssertionError("the last attempt returns or raises")

        return patient


def _wait(error: Any, attempt: int) -> float:
    """Seconds: what the Hub asks for, or 1, 2, 4, … ; a minute at most."""
    asked = str(error.response.headers.get("Retry-After", ""))
    return min(float(asked) if asked.isdigit() else 2.0**attempt, MOST_SECONDS)


def api() -> Any:
    """A client of HF_ENDPOINT with HF_TOKEN."""
    return Patient(load().HfApi(endpoint=endpoint(), token=os.environ.get("HF_TOKEN") or None))


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Turns the client's failures while doing `what` into one AtomError."""
    errors = load().errors
    # huggingface_hub 2 stands on httpx2, version 1 on httpx
    http: Any = importlib.import_module("httpx2" if importlib.util.find_spec("httpx2") else "httpx")
    try:
        yield
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
        status, said = _status(error), str(getattr(error, "server_message", None) or error).splitlines()[0]
        if status == 401:
            raise AtomError(
                f"{what}: {endpoint()} refuses the token; set HF_TOKEN to a valid one with write access"
            ) from None
        if status == 403:
            raise AtomError(f"{what}: the token may not write there ({said}); use a namespace that is yours") from None
        raise AtomError(f"{what}: {endpoint()} answers {status}: {said}") from None
    except errors.LocalEntryNotFoundError as error:
        raise AtomError(f"{what}: {endpoint()} cannot be read: {str(error).splitlines()[0]}; try again") from None
    except json.JSONDecodeError:
        raise AtomError(
            f"{what}: {endpoint()} answers what no Hub does, perhaps a proxy before it; try again"
        ) from None
    except errors.LocalTokenNotFoundError:
        raise AtomError(f"{what}: no token; set HF_TOKEN to one with write access") from None
    except errors.HFValidationError as error:
        raise AtomError(f"{what}: {str(error).splitlines()[0]}") from None
    except (http.TransportError, ConnectionError, errors.OfflineModeIsEnabled) as error:
        raise AtomError(f"{what}: {endpoint()} cannot be reached ({type(error).__name__}); check HF_ENDPOINT") from None


def _status(error: Any) -> int | None:
    response = getattr(error, "response", None)
    return getattr(response, "status_code", None)
