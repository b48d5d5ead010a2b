"""The routes of the local Hub, put together, and those of collections."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Match, Route

from release.hub.local import access, repos, uploads
from release.hub.local.store import HubError, HubStore, current_time, write_json

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# Bytes from which a file goes through LFS, and bytes of a part of a larger upload.
LFS_BYTES = 10 << 20
PART_BYTES = 64 << 20
# Commits to a repository: the Hub states this number when it refuses one more (braindecode/braindecode issue 947).
COMMITS_PER_HOUR = 128


async def health(request: Request) -> Response:
    return JSONResponse({"status": "ok"})


async def create_collection(request: Request) -> Response:
    body = await request.json()
    user = access.writer(request, body["namespace"])
    words = re.sub("[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    # As on the Hub: the words of the title and 24 digits, the same for the same title.
    slug = f"{user}/{words}-{hashlib.sha1(body['title'].encode()).hexdigest()[:24]}"
    if _collection_file(request, slug).exists():
        # The client reads `slug` from the conflict.
        return JSONResponse({"error": "Collection already exists", "slug": slug}, 409)

    collection = {
        "slug": slug,
        "title": body["title"],
        "description": body.get("description"),
        "owner": {"name": user},
        "items": [],
        "position": 0,
        "private": bool(body.get("private")),
        "theme": "blue",
        "upvotes": 0,
    }
    return _saved(request, collection)


async def list_collections(request: Request) -> Response:
    """Lists the collections of an owner that the caller may read."""
    owner, user = request.query_params.get("owner"), access.caller(request)
    rows = []
    for path in sorted(access.store(request).collections.glob("*.json")):
        collection = json.loads(path.read_text())
        name = collection["owner"]["name"]
        if owner in (None, name) and (not collection["private"] or user == name):
            del collection["position"]  # the client numbers them itself
            rows.append(collection)
    return JSONResponse(rows)


async def read_collection(request: Request) -> Response:
    collection = _collection(request)
    if collection["private"] and access.caller(request) != collection["owner"]["name"]:
        raise HubError(404, "Collection not found")
    return JSONResponse(collection)


async def change_collection(request: Request) -> Response:
    collection, body = _own_collection(request), await request.json()
    for key in ("title", "description", "private", "theme", "position"):
        if key in body:
            collection[key] = body[key]
    _saved(request, collection)
    return JSONResponse({"success": True, "data": collection})


async def add_item(request: Request) -> Response:
    collection, body = _own_collection(request), await request.json()
    item, items = body["item"], collection["items"]
    if any(row["id"] == item["id"] and row["type"] == item["type"] for row in items):
        raise HubError(409, "the item is already in the collection")

    row_id = hashlib.sha1(json.dumps(item, sort_keys=True).encode()).hexdigest()[:24]
    note = {"html": body["note"], "text": body["note"]} if body.get("note") else None
    items.append({"_id": row_id, "position": len(items), "note": note, **item})
    return _saved(request, collection)


async def remove_item(request: Request) -> Response:
    collection = _own_collection(request)
    left = [row for row in collection["items"] if row["_id"] != request.path_params["item"]]
    if len(left) == len(collection["items"]):
        raise HubError(404, "no such item in the collection")
    return _saved(request, collection | {"items": left})


def _collection_file(request: Request, slug: str) -> Path:
    return access.store(request).collections / (slug.replace("/", "__") + ".json")


def _collection(request: Request) -> dict[str, Any]:
    path = _collection_file(request, request.path_params["slug"])
    if not path.exists():
        raise HubError(404, "Collection not found")
    collection: dict[str, Any] = json.loads(path.read_text())
    return collection


def _own_collection(request: Request) -> dict[str, Any]:
    """Returns the collection of the path, if the caller may change it."""
    access.writer(request, request.path_params["slug"].split("/")[0])
    return _collection(request)


def _saved(request: Request, collection: dict[str, Any]) -> Response:
    collection["lastUpdated"] = current_time()
    write_json(_collection_file(request, collection["slug"]), collection)
    return JSONResponse(collection)


def make_app(
    root: Path,
    tokens: Mapping[str, str],
    lfs_bytes: int = LFS_BYTES,
    part_bytes: int = PART_BYTES,
    commits_per_hour: int = COMMITS_PER_HOUR,
    log: Path | None = None,
) -> ASGIApp:
    """Returns the Hub over a folder.

    Args:
        root: The folder that keeps the repositories.
        tokens: The user of each access token.
        lfs_bytes: Files of this size and more, and weights and tables of any size, go through LFS.
        part_bytes: Larger objects are uploaded in parts of this size.
        commits_per_hour: The commits that a repository takes within an hour.
        log: Gets a line for each request.
    """
    repo, api, collection = "/{ns}/{name}", "/api/{kind}/{ns}/{name}", "/api/collections/{slug:path}"
    batch, resolve = ".git/info/lfs/objects/batch", "resolve/{rev}/{path:path}"
    # Routes are tried in this order: a longer path stands before a shorter one that takes any end.
    routes = [
        ("GET", "/health", health),
        ("GET", "/api/whoami-v2", repos.whoami),
        ("POST", "/api/repos/create", repos.create),
        ("DELETE", "/api/repos/delete", repos.delete),
        ("POST", "/api/validate-yaml", uploads.validate_yaml),
        ("POST", "/api/collections", create_collection),
        ("GET", "/api/collections", list_collections),
        ("POST", f"{collection}/items", add_item),
        ("DELETE", f"{collection}/items/{{item}}", remove_item),
        ("GET", collection, read_collection),
        ("PATCH", collection, change_collection),
        ("GET", api, repos.info),
        ("GET", f"{api}/revision/{{rev}}", repos.info),
        ("PUT", f"{api}/settings", repos.settings),
        ("GET", f"{api}/tree/{{rev}}", repos.tree),
        ("GET", f"{api}/tree/{{rev}}/{{path:path}}", repos.tree),
        ("POST", f"{api}/paths-info/{{rev}}", repos.paths_info),
        ("GET", f"{api}/refs", repos.refs),
        ("GET", f"{api}/commits/{{rev}}", repos.commits),
        ("POST", f"{api}/preupload/{{rev}}", uploads.preupload),
        ("POST", f"{api}/commit/{{rev}}", uploads.commit),
        ("POST", f"{api}/super-squash/{{rev}}", repos.squash),
        ("GET", f"{api}/lfs-files", repos.list_lfs),
        ("POST", f"{api}/lfs-files/batch", repos.delete_lfs),
        ("POST", f"{api}/branch/{{rev}}", uploads.create_branch),
        ("POST", f"{api}/tag/{{rev}}", uploads.create_tag),
        ("DELETE", f"{api}/branch/{{rev}}", uploads.delete_ref),
        ("DELETE", f"{api}/tag/{{rev}}", uploads.delete_ref),
        ("POST", f"{repo}{batch}", uploads.lfs_batch),
        # Models have no kind in the addresses of their files.
        ("POST", f"/{{kind}}{repo}{batch}", uploads.lfs_batch),
        ("PUT", "/_lfs/{oid}", uploads.lfs_put),
        ("PUT", "/_lfs/{oid}/part/{part}", uploads.lfs_put),
        ("POST", "/_lfs/{oid}/complete", uploads.lfs_complete),
        ("POST", "/_lfs/{oid}/verify", uploads.lfs_verify),
        ("GET", f"/{{kind}}{repo}/{resolve}", repos.download),
        ("GET", f"{repo}/{resolve}", repos.download),
    ]
    app = Starlette(
        routes=[QuotedRoute(path, handler, methods=[method]) for method, path, handler in routes],
        exception_handlers={HubError: access.error_response},
    )
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
