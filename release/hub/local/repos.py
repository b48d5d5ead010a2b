"""Routes about repositories: users, creation and deletion, visibility, files, refs, history, downloads, squashing."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from release.hub.local import access
from release.hub.local.store import Commit, File, HubError, Repo, current_time


def url(request: Request, repo: Repo) -> str:
    """Returns the address of a repository's page."""
    return f"{access.base_url(request)}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"


async def whoami(request: Request) -> Response:
    user = access.caller(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})


async def create(request: Request) -> Response:
    body = await request.json()
    kind, repo_id, user = _named(request, body)
    repo = access.store(request).load(kind, repo_id)
    if repo is not None:
        # The client reads `url` from the conflict too.
        return JSONResponse({"error": "You already created this repo", "url": url(request, repo)}, 409)
    if kind == "space" and not body.get("sdk"):
        raise HubError(400, '"sdk" is required for a Space')

    repo = access.store(request).create(kind, repo_id, _is_private(body), user)
    return JSONResponse({"url": url(request, repo), "name": repo_id, "id": repo_id})


async def delete(request: Request) -> Response:
    kind, repo_id, _ = _named(request, await request.json())
    repo = access.store(request).load(kind, repo_id)
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    access.store(request).delete(repo)
    return JSONResponse({})


def _named(request: Request, body: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the kind and the id of the repository that a body names, and the user, who must own it."""
    namespace = body.get("organization") or access.caller(request) or ""
    user = access.writer(request, namespace)
    return body.get("type") or "model", f"{namespace}/{body['name']}", user


def _is_private(body: dict[str, Any]) -> bool:
    # Older clients send `private`, newer ones `visibility`.
    return body.get("visibility") == "private" or bool(body.get("private"))


async def settings(request: Request) -> Response:
    """Changes the visibility."""
    repo, _ = await access.writable(request)
    body = await request.json()
    if "visibility" in body or "private" in body:
        repo.private = _is_private(body)
        access.store(request).save(repo)
    return JSONResponse({"private": repo.private})


async def info(request: Request) -> Response:
    repo = access.readable(request)
    sha = repo.resolve(access.revision(request))
    commit, with_sizes = repo.commits[sha], request.query_params.get("blobs")
    card: dict[str, Any] = {}
    if readme := commit.files.get("README.md"):
        card = access.metadata(access.store(request).blob(readme.blob).read_text("utf-8", "replace"))[0] or {}
    siblings = []
    for path, file in sorted(commit.files.items()):
        sizes = {"size": file.size, "blobId": file.oid, **_lfs(file, "sha256")} if with_sizes else {}
        siblings.append({"rfilename": path, **sizes})
    return JSONResponse(
        {
            # The Hub's ids have 24 digits. Nothing looks one up here.
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


def _entry(path: str, file: File) -> dict[str, Any]:
    return {"type": "file", "path": path, "oid": file.oid, "size": file.size, **_lfs(file, "oid")}


def _directory(path: str) -> dict[str, Any]:
    return {"type": "directory", "path": path, "oid": hashlib.sha1(path.encode()).hexdigest(), "size": 0}


def _files(request: Request) -> dict[str, File]:
    """Returns the files of the revision of the path."""
    repo = access.readable(request)
    return repo.commits[repo.resolve(access.revision(request))].files


async def tree(request: Request) -> Response:
    """Lists a folder: its files and folders, or with `recursive` everything below it."""
    folder = request.path_params.get("path", "").strip("/")
    start = f"{folder}/" if folder else ""
    recursive = request.query_params.get("recursive", "").lower() in ("1", "true")
    rows: dict[str, dict[str, Any]] = {}
    for path, file in sorted(_files(request).items()):
        if not path.startswith(start):
            continue
        parts = path[len(start) :].split("/")
        deepest = len(parts) - 1 if recursive else min(1, len(parts) - 1)
        for depth in range(1, deepest + 1):
            parent = start + "/".join(parts[:depth])
            # A repository has no folders of its own: they follow from the paths of files.
            rows.setdefault(parent, _directory(parent))
        if recursive or len(parts) == 1:
            rows[path] = _entry(path, file)
    if folder and not rows:
        raise HubError(404, f"{folder} does not exist at this revision", "EntryNotFound")
    return JSONResponse(list(rows.values()))


async def paths_info(request: Request) -> Response:
    """Describes the requested files and folders; those that do not exist are left out."""
    files = _files(request)
    rows = []
    for path in map(str, (await request.form()).getlist("paths")):
        if path in files:
            rows.append(_entry(path, files[path]))
        elif any(name.startswith(path.rstrip("/") + "/") for name in files):
            rows.append(_directory(path))
    return JSONResponse(rows)


async def refs(request: Request) -> Response:
    repo = access.readable(request)

    def rows(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    lists: dict[str, Any] = {"branches": rows(repo.branches, "heads"), "tags": rows(repo.tags, "tags")}
    return JSONResponse({**lists, "converts": [], "pullRequests": []})


async def commits(request: Request) -> Response:
    """Lists the history of a revision, the newest commit first."""
    repo = access.readable(request)
    sha: str | None = repo.resolve(access.revision(request))
    rows = []
    while sha:
        commit = repo.commits[sha]
        author = [{"user": commit.author}]
        rows.append({"id": sha, "title": commit.title, "message": commit.body, "date": commit.date, "authors": author})
        sha = commit.parent
    return JSONResponse(rows)


async def download(request: Request) -> Response:
    """Answers HEAD and GET of a file; starlette's FileResponse answers byte ranges."""
    repo = access.readable(request)
    sha = repo.resolve(access.revision(request))
    file = repo.commits[sha].files.get(request.path_params["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
    if file.lfs:
        # The client compares LFS files by these headers, and other files by the ETag.
        headers |= {"X-Linked-Etag": f'"{file.blob}"', "X-Linked-Size": str(file.size)}
    blob = access.store(request).blob(file.blob)
    return FileResponse(blob, headers=headers, media_type="application/octet-stream")


async def squash(request: Request) -> Response:
    """Replaces the history of a branch by one commit with its files."""
    repo, user = await access.writable(request)
    branch = access.revision(request)
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")

    title = str((await request.json()).get("message", ""))
    # Asked before the change: afterwards, the bytes that nothing refers to are deleted.
    blobs_before = _blobs(repo)
    files = repo.commits[repo.branches[branch]].files
    repo.add(branch, Commit(None, title, "", user, current_time(), files))
    # LFS objects of the old commits stay until they are deleted, as on the Hub: `repo.lfs` still lists them.
    repo.drop_unreachable()
    _save(request, repo, blobs_before)
    return JSONResponse({})


async def list_lfs(request: Request) -> Response:
    repo, _ = await access.writable(request)
    return JSONResponse([{"fileOid": sha, "oid": sha, **row} for sha, row in sorted(repo.lfs.items())])


async def delete_lfs(request: Request) -> Response:
    """Deletes objects, and with `rewriteHistory` the files of all commits that refer to them."""
    repo, _ = await access.writable(request)
    deletions = (await request.json())["deletions"]
    deleted, blobs_before = set(deletions["sha"]), _blobs(repo)
    repo.lfs = {sha: row for sha, row in repo.lfs.items() if sha not in deleted}
    if deletions.get("rewriteHistory"):
        for sha, commit in repo.commits.items():
            left = {path: file for path, file in commit.files.items() if not (file.lfs and file.blob in deleted)}
            repo.commits[sha] = replace(commit, files=left)
    _save(request, repo, blobs_before)
    return JSONResponse({})


def _blobs(repo: Repo) -> set[str]:
    return {file.blob for commit in repo.commits.values() for file in commit.files.values()} | set(repo.lfs)


def _save(request: Request, repo: Repo, blobs_before: set[str]) -> None:
    """Saves the repository, and deletes the bytes that nothing refers to any more."""
    store = access.store(request)
    store.save(repo)
    store.drop_blobs(blobs_before)
