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

from release.hub.local import access, history, hub_collections, repos, uploads
from release.hub.local.store import HubError, HubStore

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

LFS_BYTES = 10 << 20
PART_BYTES = 64 << 20
COMMITS_PER_HOUR = 128
"""Of a repository: the Hub states it when it refuses a further one (braindecode/braindecode issue 947)."""


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


def make_app(
    root: Path,
    tokens: Mapping[str, str],
    lfs_bytes: int = LFS_BYTES,
    part_bytes: int = PART_BYTES,
    commits_per_hour: int = COMMITS_PER_HOUR,
    log: Path | None = None,
) -> ASGIApp:
    """The Hub over the folder `root`; `tokens` maps each access token to its user.

    Files of `lfs_bytes` and more, and weights and tables of any size, go through LFS; objects above `part_bytes`
    are uploaded in parts of that size. A repository takes `commits_per_hour`. log: gets a line for each request.
    """
    repo, api = "{ns}/{name}", "/api/{kind}/{ns}/{name}"
    write, batch = ["POST"], ".git/info/lfs/objects/batch"
    routes = [
        QuotedRoute("/health", health),
        QuotedRoute("/api/whoami-v2", repos.whoami),
        QuotedRoute("/api/repos/create", repos.create, methods=write),
        QuotedRoute("/api/repos/delete", repos.delete, methods=["DELETE"]),
        QuotedRoute("/api/validate-yaml", uploads.validate_yaml, methods=write),
        QuotedRoute("/api/collections", hub_collections.create, methods=write),
        QuotedRoute("/api/collections", hub_collections.list_all),
        QuotedRoute("/api/collections/{slug:path}/items", hub_collections.add_item, methods=write),
        QuotedRoute("/api/collections/{slug:path}/items/{item}", hub_collections.remove_item, methods=["DELETE"]),
        QuotedRoute("/api/collections/{slug:path}", hub_collections.read),
        QuotedRoute("/api/collections/{slug:path}", hub_collections.change, methods=["PATCH"]),
        QuotedRoute("/api/collections/{slug:path}", hub_collections.remove, methods=["DELETE"]),
        QuotedRoute(api, repos.info),
        QuotedRoute(f"{api}/revision/{{rev}}", repos.info),
        QuotedRoute(f"{api}/settings", repos.settings, methods=["PUT"]),
        QuotedRoute(f"{api}/tree/{{rev}}", repos.tree),
        QuotedRoute(f"{api}/tree/{{rev}}/{{path:path}}", repos.tree),
        QuotedRoute(f"{api}/paths-info/{{rev}}", repos.paths_info, methods=write),
        QuotedRoute(f"{api}/refs", repos.refs),
        QuotedRoute(f"{api}/commits/{{rev}}", repos.commits),
        QuotedRoute(f"{api}/preupload/{{rev}}", uploads.preupload, methods=write),
        QuotedRoute(f"{api}/commit/{{rev}}", uploads.commit, methods=write),
        QuotedRoute(f"{api}/super-squash/{{rev}}", history.squash, methods=write),
        QuotedRoute(f"{api}/lfs-files", history.list_lfs),
        QuotedRoute(f"{api}/lfs-files/batch", history.delete_lfs, methods=write),
        QuotedRoute(f"{api}/branch/{{rev}}", uploads.create_branch, methods=write),
        QuotedRoute(f"{api}/tag/{{rev}}", uploads.create_tag, methods=write),
        QuotedRoute(f"{api}/branch/{{rev}}", uploads.delete_ref, methods=["DELETE"]),
        QuotedRoute(f"{api}/tag/{{rev}}", uploads.delete_ref, methods=["DELETE"]),
        QuotedRoute(f"/{repo}{batch}", uploads.lfs_batch, methods=write),
        QuotedRoute(f"/{{kind}}/{repo}{batch}", uploads.lfs_batch, methods=write),
        QuotedRoute("/static/{ns}/{name}/{path:path}", repos.static_site),
        QuotedRoute("/_lfs/{oid}", uploads.lfs_put, methods=["PUT"]),
        QuotedRoute("/_lfs/{oid}/part/{part}", uploads.lfs_put, methods=["PUT"]),
        QuotedRoute("/_lfs/{oid}/complete", uploads.lfs_complete, methods=write),
        QuotedRoute("/_lfs/{oid}/verify", uploads.lfs_verify, methods=write),
        QuotedRoute(f"/{{kind}}/{repo}/resolve/{{rev}}/{{path:path}}", repos.download),
        QuotedRoute(f"/{repo}/resolve/{{rev}}/{{path:path}}", repos.download),
    ]
    app = Starlette(routes=routes, exception_handlers={HubError: access.error_response})
    app.state.store, app.state.tokens = HubStore(root), dict(tokens)
    app.state.lfs_bytes, app.state.part_bytes = lfs_bytes, part_bytes
    app.state.commits_per_hour = commits_per_hour
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
        self.app, self.log = app, log.open("a", buffering=1) if log else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode("ascii").split("?")[0]
            scope = {**scope, "path": raw}
            if self.log is not None:
                self.log.write(f"{scope['method']} {raw}\n")
        await self.app(scope, receive, send)
