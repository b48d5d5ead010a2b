"""The routes of the local Hub, put together."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

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
        Route("/health", health),
        Route("/api/whoami-v2", repos.whoami),
        Route("/api/repos/create", repos.create, methods=write),
        Route("/api/repos/delete", repos.delete, methods=["DELETE"]),
        Route("/api/validate-yaml", uploads.validate_yaml, methods=write),
        Route("/api/collections", hub_collections.create, methods=write),
        Route("/api/collections", hub_collections.list_all),
        Route("/api/collections/{slug:path}/items", hub_collections.add_item, methods=write),
        Route("/api/collections/{slug:path}/items/{item}", hub_collections.remove_item, methods=["DELETE"]),
        Route("/api/collections/{slug:path}", hub_collections.read),
        Route("/api/collections/{slug:path}", hub_collections.change, methods=["PATCH"]),
        Route("/api/collections/{slug:path}", hub_collections.remove, methods=["DELETE"]),
        Route(api, repos.info),
        Route(f"{api}/revision/{{rev}}", repos.info),
        Route(f"{api}/settings", repos.settings, methods=["PUT"]),
        Route(f"{api}/tree/{{rev}}", repos.tree),
        Route(f"{api}/tree/{{rev}}/{{path:path}}", repos.tree),
        Route(f"{api}/paths-info/{{rev}}", repos.paths_info, methods=write),
        Route(f"{api}/refs", repos.refs),
        Route(f"{api}/commits/{{rev}}", repos.commits),
        Route(f"{api}/preupload/{{rev}}", uploads.preupload, methods=write),
        Route(f"{api}/commit/{{rev}}", uploads.commit, methods=write),
        Route(f"{api}/super-squash/{{rev}}", history.squash, methods=write),
        Route(f"{api}/lfs-files", history.list_lfs),
        Route(f"{api}/lfs-files/batch", history.delete_lfs, methods=write),
        Route(f"{api}/branch/{{rev}}", uploads.create_branch, methods=write),
        Route(f"{api}/tag/{{rev}}", uploads.create_tag, methods=write),
        Route(f"{api}/branch/{{rev}}", uploads.delete_ref, methods=["DELETE"]),
        Route(f"{api}/tag/{{rev}}", uploads.delete_ref, methods=["DELETE"]),
        Route(f"/{repo}{batch}", uploads.lfs_batch, methods=write),
        Route(f"/{{kind}}/{repo}{batch}", uploads.lfs_batch, methods=write),
        Route("/static/{ns}/{name}/{path:path}", repos.static_site),
        Route("/_lfs/{oid}", uploads.lfs_put, methods=["PUT"]),
        Route("/_lfs/{oid}/part/{part}", uploads.lfs_put, methods=["PUT"]),
        Route("/_lfs/{oid}/complete", uploads.lfs_complete, methods=write),
        Route("/_lfs/{oid}/verify", uploads.lfs_verify, methods=write),
        Route(f"/{{kind}}/{repo}/resolve/{{rev}}/{{path:path}}", repos.download),
        Route(f"/{repo}/resolve/{{rev}}/{{path:path}}", repos.download),
    ]
    app = Starlette(routes=routes, exception_handlers={HubError: access.error_response})
    app.state.store, app.state.tokens = HubStore(root), dict(tokens)
    app.state.lfs_bytes, app.state.part_bytes = lfs_bytes, part_bytes
    app.state.commits_per_hour = commits_per_hour
    return KeepQuotedSlash(app, log)


class KeepQuotedSlash:
    """Routes on the raw path with `%2F` kept, because a revision such as `refs%2Fpr%2F1` is one path segment, and logs
    each request: its method and its path."""

    def __init__(self, app: ASGIApp, log: Path | None = None) -> None:
        self.app, self.log = app, log.open("a", buffering=1) if log else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            raw = scope["raw_path"].decode("ascii").split("?")[0]
            scope = {**scope, "path": unquote(re.sub("%2f", "%252F", raw, flags=re.IGNORECASE))}
            if self.log is not None:
                self.log.write(f"{scope['method']} {raw}\n")
        await self.app(scope, receive, send)
