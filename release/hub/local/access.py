"""Reads the user, the repository and its revision from a request, and the metadata from a card.

A private repository does not exist for users who may not read it.
"""

from __future__ import annotations

import re
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from release.hub.local.store import HubError, HubStore, Repo

# The YAML block at the head of a README.
METADATA = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)


def store(request: Request) -> HubStore:
    """Returns the storage of the Hub that received the request."""
    hub_store: HubStore = request.app.state.store
    return hub_store


def base_url(request: Request) -> str:
    """Returns the address of this Hub, without a slash at its end."""
    return str(request.base_url).rstrip("/")


def caller(request: Request) -> str | None:
    """Returns the user of the bearer token; None for anonymous calls. Raises HubError 401 for an unknown token."""
    header = request.headers.get("authorization")
    if header is None:
        return None

    user: str | None = request.app.state.tokens.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def writer(request: Request, namespace: str) -> str:
    """Returns the user, if the token may write to `namespace`. Raises HubError 401 or 403."""
    user = caller(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user != namespace:
        raise HubError(403, f"You don't have the rights to write under the namespace {namespace}")
    return user


def readable(request: Request) -> Repo:
    """Returns the repository of the path, for a caller that changes nothing.

    Raises:
        HubError: 401 for anonymous calls, 404 for known callers, as on the Hub.
    """
    user = caller(request)
    repo = store(request).view(*_place(request))
    if repo is None or (repo.private and user != repo.namespace):
        # The client tells "does not exist" from "not for you" by this code, and the Hub never says which it is.
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repo


async def writable(request: Request) -> tuple[Repo, str]:
    """Returns the repository of the path and the user, if the caller may write to it."""
    # The body is received first: then the handler awaits nothing until it saves, and no other request is lost.
    await request.body()
    user = writer(request, readable(request).namespace)
    repo = store(request).load(*_place(request))
    assert repo is not None, "it is readable"
    return repo, user


def _place(request: Request) -> tuple[str, str]:
    """Returns the kind and the id of the repository of the path."""
    kind = request.path_params.get("kind", "models").removesuffix("s")
    if kind not in ("model", "dataset", "space"):
        raise HubError(404, "no such kind of repository")
    return kind, f"{request.path_params['ns']}/{request.path_params['name']}"


def revision(request: Request) -> str:
    """Returns the revision of the path; the main branch by default."""
    return str(request.path_params.get("rev", "main"))


async def error_response(request: Request, error: Exception) -> Response:
    """Answers with an error, in the two headers that the client reads."""
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": error.message, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    # An answer to HEAD has no body.
    if request.method == "HEAD":
        return Response(status_code=error.status, headers=headers)
    return JSONResponse({"error": error.message}, error.status, headers=headers)


def metadata(text: str) -> tuple[dict[str, Any] | None, str]:
    """Returns the metadata of a README and "", or None and the error. A README without a block has empty metadata."""
    import yaml

    block = METADATA.match(text)
    if block is None:
        return {}, ""
    try:
        data = yaml.safe_load(block[1]) or {}
    except yaml.YAMLError as error:
        return None, f"the metadata is not YAML: {error}"
    return (data, "") if isinstance(data, dict) else (None, "the metadata is not a mapping")
