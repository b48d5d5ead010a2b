"""Users and their permissions. A private repository does not exist for users who may not read it."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from release.hub.local.store import HubError, HubStore, Repo


def store(request: Request) -> HubStore:
    hub_store: HubStore = request.app.state.store
    return hub_store


def base_url(request: Request) -> str:
    return str(request.base_url).rstrip("/")


def caller(request: Request) -> str | None:
    """The user of the bearer token, None for anonymous calls. Raises HubError 401 for an unknown token."""
    header = request.headers.get("authorization")
    if header is None:
        return None
    user: str | None = request.app.state.tokens.get(header.removeprefix("Bearer "))
    if user is None:
        raise HubError(401, "Invalid credentials in Authorization header")
    return user


def writer(request: Request, namespace: str) -> str:
    """The user, if the token may write to `namespace`. Raises HubError 401 or 403."""
    user = caller(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    if user != namespace:
        raise HubError(403, f"You don't have the rights to write under the namespace {namespace}")
    return user


def kind_of(request: Request) -> str:
    kind = request.path_params.get("kind", "models").removesuffix("s")
    if kind not in ("model", "dataset", "space"):
        raise HubError(404, "no such kind of repository")
    return str(kind)


def readable(request: Request) -> Repo:
    """The repository of the path, which the caller may not change. Raises HubError 401 (anonymous) or 404 (known
    caller), as the Hub does."""
    user = caller(request)
    repo = store(request).view(kind_of(request), _repo_id(request))
    if repo is None or (repo.private and user != repo.namespace):
        if user is None:
            raise HubError(401, "Invalid username or password.", "RepoNotFound")
        raise HubError(404, "Repository not found", "RepoNotFound")
    return repo


async def writable(request: Request) -> tuple[Repo, str]:
    """The repository of the path and the user, if the caller may write to it.

    The body is received before: then the handler waits for nothing until it saves, and no other request is lost.
    """
    await request.body()
    user = writer(request, readable(request).namespace)
    repo = store(request).load(kind_of(request), _repo_id(request))
    assert repo is not None, "it is readable"
    return repo, user


def _repo_id(request: Request) -> str:
    return f"{request.path_params['ns']}/{request.path_params['name']}"


def revision(request: Request) -> str:
    return str(request.path_params.get("rev", "main"))


async def error_response(request: Request, error: Exception) -> Response:
    """Errors carry the two headers that the client reads."""
    assert isinstance(error, HubError)
    headers = {"X-Error-Message": error.message, **error.headers}
    if error.code:
        headers["X-Error-Code"] = error.code
    if request.method == "HEAD":
        return Response(status_code=error.status, headers=headers)
    return JSONResponse({"error": error.message}, error.status, headers=headers)
