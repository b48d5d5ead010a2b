"""Routes about repositories: who am I, create, delete, visibility, information, tree, refs, history, download."""

from __future__ import annotations

import hashlib
import mimetypes
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from release.hub.local import access
from release.hub.local.cardmeta import metadata
from release.hub.local.store import File, HubError, Repo


def url(request: Request, repo: Repo) -> str:
    return f"{access.base_url(request)}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"


async def whoami(request: Request) -> Response:
    user = access.caller(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})


async def create(request: Request) -> Response:
    body = await request.json()
    namespace = body.get("organization") or access.caller(request) or ""
    user = access.writer(request, namespace)
    kind, repo_id = body.get("type") or "model", f"{namespace}/{body['name']}"
    repo = access.store(request).load(kind, repo_id)
    if repo is not None:  # the client reads `url` from the conflict too
        return JSONResponse({"error": "You already created this repo", "url": url(request, repo)}, 409)
    if kind == "space" and not body.get("sdk"):
        raise HubError(400, '"sdk" is required for a Space')
    private = body.get("visibility") == "private" or bool(body.get("private"))
    repo = access.store(request).create(kind, repo_id, private, user)
    return JSONResponse({"url": url(request, repo), "name": repo_id, "id": repo_id})


async def delete(request: Request) -> Response:
    body = await request.json()
    namespace = body.get("organization") or access.caller(request) or ""
    access.writer(request, namespace)
    repo = access.store(request).load(body.get("type") or "model", f"{namespace}/{body['name']}")
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    access.store(request).delete(repo)
    return JSONResponse({})


async def settings(request: Request) -> Response:
    """Visibility: what `update_repo_settings` sends."""
    repo, _ = await access.writable(request)
    body = await request.json()
    if "visibility" in body or "private" in body:
        repo.private = body.get("visibility") == "private" or bool(body.get("private"))
        access.store(request).save(repo)
    return JSONResponse({"private": repo.private})


async def info(request: Request) -> Response:
    repo = access.readable(request)
    sha = repo.resolve(access.revision(request))
    commit, blobs = repo.commits[sha], request.query_params.get("blobs")
    card: dict[str, Any] = {}
    if readme := commit.files.get("README.md"):
        card = metadata(access.store(request).blob(readme.blob).read_text("utf-8", "replace"))[0] or {}
    siblings = [{"rfilename": path, **(_sizes(file) if blobs else {})} for path, file in sorted(commit.files.items())]
    return JSONResponse(
        {
            "_id": hashlib.sha1(repo.id.encode()).hexdigest()[:24],
            "id": repo.id,
            "modelId": repo.id,
            "author": repo.namespace,
            "sha": sha,
            "createdAt": repo.created,
            "lastModified": commit.date,
            "private": repo.private,
            "gated": False,
            "disabled": False,
            "downloads": 0,
            "likes": 0,
            "tags": card.get("tags") or [],
            "cardData": card,
            "siblings": siblings,
        }
    )


def _lfs(file: File, key: str) -> dict[str, Any]:
    return {"lfs": {key: file.blob, "size": file.size, "pointerSize": 134}} if file.lfs else {}


def _sizes(file: File) -> dict[str, Any]:
    return {"size": file.size, "blobId": file.oid, **_lfs(file, "sha256")}


def _entry(path: str, file: File) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": file.oid, "size": file.size, **_lfs(file, "oid")}


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


async def tree(request: Request) -> Response:
    repo = access.readable(request)
    files = repo.commits[repo.resolve(access.revision(request))].files
    folder = request.path_params.get("path", "").strip("/")
    start = folder + "/" if folder else ""
    recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
    rows: dict[str, dict[str, Any]] = {}
    for path, file in sorted(files.items()):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        for depth in range(1, len(parts) if recursive else min(2, len(parts))):
            parent = start + "/".join(parts[:depth])
            rows.setdefault(parent, _directory(parent))
        if recursive or len(parts) == 1:
            rows[path] = _entry(path, file)
    if folder and not rows:
        raise HubError(404, f"{folder} does not exist at this revision", "EntryNotFound")
    return JSONResponse(list(rows.values()))


async def paths_info(request: Request) -> Response:
    repo = access.readable(request)
    files = repo.commits[repo.resolve(access.revision(request))].files
    if "json" in request.headers.get("content-type", ""):
        requested = (await request.json()).get("paths", [])
    else:
        requested = (await request.form()).getlist("paths")
    paths = [requested] if isinstance(requested, str) else [str(path) for path in requested]
    entries = [_entry(path, files[path]) for path in paths if path in files]
    folders = [p for p in paths if p not in files and any(f.startswith(p.rstrip("/") + "/") for f in files)]
    return JSONResponse(entries + [_directory(path) for path in folders])


async def refs(request: Request) -> Response:
    repo = access.readable(request)

    def rows(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": n, "ref": f"refs/{kind}/{n}", "targetCommit": sha} for n, sha in names.items()]

    lists: dict[str, Any] = {"branches": rows(repo.branches, "heads"), "tags": rows(repo.tags, "tags")}
    return JSONResponse({**lists, "converts": [], "pullRequests": []})


async def commits(request: Request) -> Response:
    repo = access.readable(request)
    sha: str | None = repo.resolve(access.revision(request))
    rows = []
    while sha:
        commit = repo.commits[sha]
        author = [{"user": commit.author}]
        rows.append({"id": sha, "title": commit.title, "message": commit.body, "date": commit.date, "authors": author})
        sha = commit.parent
    return JSONResponse(rows)


async def static_site(request: Request) -> Response:
    """A file of a static Space, as the Hub serves it at `NAMESPACE-NAME.static.hf.space`."""
    repo = access.store(request).view("space", "{ns}/{name}".format(**request.path_params))
    path = request.path_params["path"] or "index.html"
    if repo is None or repo.private or path not in (files := repo.commits[repo.branches["main"]].files):
        raise HubError(404, "no such file in a public static Space", "EntryNotFound")
    kind = mimetypes.guess_type(path)[0] or "application/octet-stream"
    headers = {"X-Content-Type-Options": "nosniff"}
    return FileResponse(access.store(request).blob(files[path].blob), headers=headers, media_type=kind)


async def download(request: Request) -> Response:
    """HEAD and GET of a file; starlette's FileResponse answers byte ranges."""
    repo = access.readable(request)
    sha = repo.resolve(access.revision(request))
    file = repo.commits[sha].files.get(request.path_params["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
    if file.lfs:
        headers |= {"X-Linked-Etag": f'"{file.blob}"', "X-Linked-Size": str(file.size)}
    blob = access.store(request).blob(file.blob)
    return FileResponse(blob, headers=headers, media_type="application/octet-stream")
