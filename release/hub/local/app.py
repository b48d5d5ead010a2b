"""The routes of the local Hub, put together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from release.hub.local import handlers
from release.hub.local.store import HubError, HubStore

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# Bytes from which a file goes through LFS.
LFS_BYTES = 10 << 20
# Commits to a repository: the Hub states this number when it refuses one more (braindecode/braindecode issue 947).
COMMITS_PER_HOUR = 128


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def make_app(
    root: Path,
    tokens: Mapping[str, str],
    lfs_bytes: int = LFS_BYTES,
    commits_per_hour: int = COMMITS_PER_HOUR,
    log: Path | None = None,
) -> ASGIApp:
    """Returns the Hub over a folder.

    Args:
        root: The folder that keeps the repositories.
        tokens: The user of each access token.
        lfs_bytes: Files of this size and more, and weights and tables of any size, go through LFS.
        commits_per_hour: The commits that a repository takes within an hour.
        log: Gets a line for each request.
    """
    repo, api = "/{ns}/{name}", "/api/{kind}/{ns}/{name}"
    batch, resolve = ".git/info/lfs/objects/batch", "resolve/{rev}/{path:path}"
    # Routes are tried in this order: a longer path stands before a shorter one that takes any end.
    routes = [
        ("GET", "/health", health),
        ("GET", "/api/whoami-v2", handlers.whoami),
        ("POST", "/api/repos/create", handlers.create),
        ("DELETE", "/api/repos/delete", handlers.delete),
        ("POST", "/api/validate-yaml", handlers.validate_yaml),
        ("POST", "/api/collections", handlers.create_collection),
        ("POST", "/api/collections/{slug:path}/items", handlers.add_item),
        ("GET", "/api/collections/{slug:path}", handlers.read_collection),
        ("GET", api, handlers.info),
        ("GET", f"{api}/revision/{{rev}}", handlers.info),
        ("PUT", f"{api}/settings", handlers.settings),
        ("GET", f"{api}/tree/{{rev}}", handlers.tree),
        ("GET", f"{api}/tree/{{rev}}/{{path:path}}", handlers.tree),
        ("POST", f"{api}/paths-info/{{rev}}", handlers.paths_info),
        ("GET", f"{api}/refs", handlers.refs),
        ("GET", f"{api}/commits/{{rev}}", handlers.commits),
        ("POST", f"{api}/preupload/{{rev}}", handlers.preupload),
        ("POST", f"{api}/commit/{{rev}}", handlers.commit),
        ("POST", f"{api}/super-squash/{{rev}}", handlers.squash),
        ("GET", f"{api}/lfs-files", handlers.list_lfs),
        ("POST", f"{api}/lfs-files/batch", handlers.delete_lfs),
        ("POST", f"{api}/branch/{{rev}}", handlers.create_branch),
        ("POST", f"{api}/tag/{{rev}}", handlers.create_tag),
        ("DELETE", f"{api}/branch/{{rev}}", handlers.delete_ref),
        ("DELETE", f"{api}/tag/{{rev}}", handlers.delete_ref),
        ("POST", f"{repo}{batch}", handlers.lfs_batch),
        # Models have no kind in the addresses of their files.
        ("POST", f"/{{kind}}{repo}{batch}", handlers.lfs_batch),
        ("PUT", "/_lfs/{oid}", handlers.lfs_put),
        ("POST", "/_lfs/{oid}/verify", handlers.lfs_verify),
        ("GET", f"/{{kind}}{repo}/{resolve}", handlers.download),
        ("GET", f"{repo}/{resolve}", handlers.download),
    ]
    app = Starlette(
        routes=[QuotedRoute(path, handler, methods=[method]) for method, path, handler in routes],
        exception_handlers={HubError: handlers.error_response},
    )
    app.state.store, app.state.tokens = HubStore(root), dict(tokens)
    app.state.lfs_bytes, app.state.commits_per_hour = lfs_bytes, commits_per_hour
    return RawPaths(app, log)


class QuotedRoute(Route):
    """A route whose parameters are decoded after the path was split at its slashes.

    A quoted slash belongs to a name, as in the revision `refs%2Fpr%2F1` or the folder `kept%2Fcode`.
    """

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        if match is not Match.NONE:
            child["path_params"] = {name: unquote(value) for name, value in child["path_params"].items()}
        return match, child


class RawPaths:
    """Routes on the path as it was sent, and logs each request: its method and its path."""

    def __init__(self, app: ASGIApp, log: Path | None = None) -> None:
        # Line by line, so that a reader of the log sees each request at once.
        self.app, self.log = app, log.open("a", buffering=1) if log else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            # starlette routes on the decoded path, in which a quoted slash cannot be told from a separator
            raw = scope["raw_path"].decode("ascii").split("?")[0]
            scope = {**scope, "path": raw}
            if self.log is not None:
                self.log.write(f"{scope['method']} {raw}\n")
        await self.app(scope, receive, send)
