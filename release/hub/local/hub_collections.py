"""Collections: create, read, change, delete, add an item."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from release.hub.local import access
from release.hub.local.store import HubError, current_time, write_json


def _file(request: Request, slug: str) -> Path:
    return access.store(request).collections / (slug.replace("/", "__") + ".json")


def _load(request: Request, write: bool = False) -> dict[str, Any]:
    path = _file(request, request.path_params["slug"])
    namespace = request.path_params["slug"].split("/")[0]
    if write:
        access.writer(request, namespace)
    if not path.exists():
        raise HubError(404, "Collection not found")
    collection: dict[str, Any] = json.loads(path.read_text())
    if collection["private"] and access.caller(request) != namespace:
        raise HubError(404, "Collection not found")
    return collection


def _save(request: Request, collection: dict[str, Any]) -> None:
    collection["lastUpdated"] = current_time()
    write_json(_file(request, collection["slug"]), collection)


async def create(request: Request) -> Response:
    body = await request.json()
    user = access.writer(request, body["namespace"])
    words = re.sub("[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    slug = f"{user}/{words}-{hashlib.sha1(body['title'].encode()).hexdigest()[:24]}"
    if _file(request, slug).exists():  # the client reads `slug` from the conflict
        return JSONResponse({"error": "Collection already exists", "slug": slug}, 409)
    collection = {
        "slug": slug, "title": body["title"], "description": body.get("description"), "owner": {"name": user},
        "items": [], "position": 0, "private": bool(body.get("private")), "theme": "blue", "upvotes": 0,
    }  # fmt: skip
    _save(request, collection)
    return JSONResponse(collection)


async def list_all(request: Request) -> Response:
    """The collections of an owner that the caller may read; the client numbers them itself."""
    owner, user = request.query_params.get("owner"), access.caller(request)
    bodies = [json.loads(path.read_text()) for path in sorted(access.store(request).collections.glob("*.json"))]
    rows = [body for body in bodies if owner in (None, body["owner"]["name"])]
    visible = [body for body in rows if not body["private"] or user == body["owner"]["name"]]
    return JSONResponse([{key: body[key] for key in body if key != "position"} for body in visible])


async def read(request: Request) -> Response:
    return JSONResponse(_load(request))


async def change(request: Request) -> Response:
    collection = _load(request, write=True)
    body = await request.json()
    collection |= {key: body[key] for key in ("title", "description", "private", "theme", "position") if key in body}
    _save(request, collection)
    return JSONResponse({"success": True, "data": collection})


async def remove(request: Request) -> Response:
    collection = _load(request, write=True)
    _file(request, collection["slug"]).unlink()
    return JSONResponse({"success": True})


async def add_item(request: Request) -> Response:
    collection = _load(request, write=True)
    body = await request.json()
    item = body["item"]
    if any(existing["id"] == item["id"] and existing["type"] == item["type"] for existing in collection["items"]):
        raise HubError(409, "the item is already in the collection")
    row_id = hashlib.sha1(json.dumps(item, sort_keys=True).encode()).hexdigest()[:24]
    note = {"html": body["note"], "text": body["note"]} if body.get("note") else None
    collection["items"].append({"_id": row_id, "position": len(collection["items"]), "note": note, **item})
    _save(request, collection)
    return JSONResponse(collection)


async def remove_item(request: Request) -> Response:
    collection = _load(request, write=True)
    items = [item for item in collection["items"] if item["_id"] != request.path_params["item"]]
    if len(items) == len(collection["items"]):
        raise HubError(404, "no such item in the collection")
    collection["items"] = items
    _save(request, collection)
    return JSONResponse({"success": True})
