"""The handlers of the routes: users, repositories with their files, refs and history, downloads, uploads, squashing.

A private repository does not exist for users who may not read it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import uuid
from dataclasses import replace
from pathlib import Path
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response

from release.hub.local.store import LFS_SUFFIXES, Commit, File, HubError, HubStore, Repo, current_time, write_json

# The YAML block at the head of a README.
METADATA = re.compile(r"\A---\r?\n(.*?)\r?\n---\s*(?:\n|\Z)", re.DOTALL)


def store_of(request: Request) -> HubStore:
    """Returns the storage of the Hub that received the request."""
    hub_store: HubStore = request.app.state.store
    return hub_store


def base_url(request: Request) -> str:
    """Returns the address of this Hub, without a slash at its end."""
    return str(request.base_url).rstrip("/")


async def create_collection(request: Request) -> Response:
    body = await request.json()
    user = writer(request, body["namespace"])
    words = re.sub("[^a-z0-9]+", "-", body["title"].lower()).strip("-")
    # As on the Hub: the words of the title and 24 digits, here the same for the same title.
    slug = f"{user}/{words}-{hashlib.sha1(body['title'].encode()).hexdigest()[:24]}"
    if _collection_file(request, slug).exists():
        # The client reads `slug` from the conflict.
        return JSONResponse({"error": "Collection already exists", "slug": slug}, 409)
    stated = {name: body.get(name) for name in ("title", "description", "private")}
    rest = {"owner": {"name": user}, "items": [], "position": 0, "theme": "blue", "upvotes": 0}
    return _save_collection(request, {"slug": slug, **stated, **rest})


async def read_collection(request: Request) -> Response:
    return JSONResponse(json.loads(_collection_file(request, request.path_params["slug"]).read_bytes()))


async def add_item(request: Request) -> Response:
    path, item = _collection_file(request, request.path_params["slug"]), (await request.json())["item"]
    collection = json.loads(path.read_bytes())
    writer(request, collection["owner"]["name"])
    if any(row["id"] == item["id"] and row["type"] == item["type"] for row in collection["items"]):
        raise HubError(409, "the item is already in the collection")
    number = len(collection["items"])
    collection["items"].append({"_id": f"{number:024x}", "position": number, "note": None, **item})
    return _save_collection(request, collection)


def _collection_file(request: Request, slug: str) -> Path:
    return store_of(request).collections / (slug.replace("/", "__") + ".json")


def _save_collection(request: Request, collection: dict[str, Any]) -> Response:
    write_json(_collection_file(request, collection["slug"]), collection | {"lastUpdated": current_time()})
    return JSONResponse(collection | {"lastUpdated": current_time()})


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
    repo = store_of(request).view(*_place(request))
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
    repo = store_of(request).load(*_place(request))
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


def url(request: Request, repo: Repo) -> str:
    """Returns the address of a repository's page."""
    return f"{base_url(request)}/{'' if repo.kind == 'model' else repo.kind + 's/'}{repo.id}"


async def whoami(request: Request) -> Response:
    user = caller(request)
    if user is None:
        raise HubError(401, "Invalid username or password.")
    auth = {"type": "access_token", "accessToken": {"displayName": "local", "role": "write"}}
    return JSONResponse({"type": "user", "id": user, "name": user, "fullname": user, "orgs": [], "auth": auth})


async def create(request: Request) -> Response:
    body = await request.json()
    kind, repo_id, user = _named(request, body)
    repo = store_of(request).load(kind, repo_id)
    if repo is not None:
        # The client reads `url` from the conflict too.
        return JSONResponse({"error": "You already created this repo", "url": url(request, repo)}, 409)
    if kind == "space" and not body.get("sdk"):
        raise HubError(400, '"sdk" is required for a Space')

    repo = store_of(request).create(kind, repo_id, body.get("visibility") == "private", user)
    return JSONResponse({"url": url(request, repo), "name": repo_id, "id": repo_id})


async def delete(request: Request) -> Response:
    kind, repo_id, _ = _named(request, await request.json())
    repo = store_of(request).load(kind, repo_id)
    if repo is None:
        raise HubError(404, "Repository not found", "RepoNotFound")
    store_of(request).delete(repo)
    return JSONResponse({})


def _named(request: Request, body: dict[str, Any]) -> tuple[str, str, str]:
    """Returns the kind and the id of the repository that a body names, and the user, who must own it."""
    namespace = body.get("organization") or caller(request) or ""
    user = writer(request, namespace)
    return body.get("type") or "model", f"{namespace}/{body['name']}", user


async def settings(request: Request) -> Response:
    """Changes the visibility."""
    repo, _ = await writable(request)
    body = await request.json()
    if "visibility" in body:
        repo.private = body["visibility"] == "private"
        store_of(request).save(repo)
    return JSONResponse({"private": repo.private})


async def info(request: Request) -> Response:
    repo = readable(request)
    sha = repo.resolve(revision(request))
    commit, with_sizes = repo.commits[sha], request.query_params.get("blobs")
    card: dict[str, Any] = {}
    if readme := commit.files.get("README.md"):
        card = metadata(store_of(request).blob(readme.blob).read_text("utf-8", "replace"))[0] or {}
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
    repo = readable(request)
    return repo.commits[repo.resolve(revision(request))].files


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
    repo = readable(request)

    def rows(names: dict[str, str], kind: str) -> list[dict[str, str]]:
        return [{"name": name, "ref": f"refs/{kind}/{name}", "targetCommit": sha} for name, sha in names.items()]

    lists: dict[str, Any] = {"branches": rows(repo.branches, "heads"), "tags": rows(repo.tags, "tags")}
    return JSONResponse({**lists, "converts": [], "pullRequests": []})


async def commits(request: Request) -> Response:
    """Lists the history of a revision, the newest commit first."""
    repo = readable(request)
    sha: str | None = repo.resolve(revision(request))
    rows = []
    while sha:
        commit = repo.commits[sha]
        author = [{"user": commit.author}]
        rows.append({"id": sha, "title": commit.title, "message": commit.body, "date": commit.date, "authors": author})
        sha = commit.parent
    return JSONResponse(rows)


async def download(request: Request) -> Response:
    """Answers HEAD and GET of a file; starlette's FileResponse answers byte ranges."""
    repo = readable(request)
    sha = repo.resolve(revision(request))
    file = repo.commits[sha].files.get(request.path_params["path"])
    if file is None:
        raise HubError(404, "Entry not found", "EntryNotFound")
    headers = {"X-Repo-Commit": sha, "Accept-Ranges": "bytes", "ETag": f'"{file.etag}"'}
    if file.lfs:
        # The client compares LFS files by these headers, and other files by the ETag.
        headers |= {"X-Linked-Etag": f'"{file.blob}"', "X-Linked-Size": str(file.size)}
    blob = store_of(request).blob(file.blob)
    return FileResponse(blob, headers=headers, media_type="application/octet-stream")


async def squash(request: Request) -> Response:
    """Replaces the history of a branch by one commit with its files."""
    repo, user = await writable(request)
    branch = revision(request)
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
    repo, _ = await writable(request)
    return JSONResponse([{"fileOid": sha, "oid": sha, **row} for sha, row in sorted(repo.lfs.items())])


async def delete_lfs(request: Request) -> Response:
    """Deletes objects, and with `rewriteHistory` the files of all commits that refer to them."""
    repo, _ = await writable(request)
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
    store = store_of(request)
    store.save(repo)
    store.drop_blobs(blobs_before)


async def preupload(request: Request) -> Response:
    """States which files use LFS, and which exist already, so that equal files are not sent again."""
    repo, _ = await writable(request)
    files = repo.commits[repo.resolve(revision(request))].files
    rows = []
    for requested in (await request.json())["files"]:
        path = requested["path"]
        lfs = path.endswith(LFS_SUFFIXES) or requested["size"] >= request.app.state.lfs_bytes
        oid = files[path].etag if path in files else None
        rows.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return JSONResponse({"files": rows})


async def lfs_batch(request: Request) -> Response:
    """States the upload address of each object that does not exist already."""
    await writable(request)
    rows = []
    for requested in (await request.json())["objects"]:
        oid = requested["oid"]
        row: dict[str, Any] = {"oid": oid, "size": requested["size"]}
        if not store_of(request).blob(oid).exists():
            target = f"{base_url(request)}/_lfs/{oid}"
            # For an object without actions, the client sends nothing.
            row["actions"] = {"upload": {"href": target}, "verify": {"href": f"{target}/verify"}}
        rows.append(row)
    return JSONResponse({"transfer": "basic", "objects": rows}, media_type="application/vnd.git-lfs+json")


async def lfs_put(request: Request) -> Response:
    """Receives an object."""
    oid = _oid(request)
    # Two files of one commit may be equal and are then sent at the same time: each upload writes a file of its own.
    upload = store_of(request).blobs / f"{oid}.{uuid.uuid4().hex}.upload"
    with open(upload, "wb") as f:
        async for chunk in request.stream():
            f.write(chunk)
    await run_in_threadpool(store_of(request).accept, upload, oid)
    return Response()


async def lfs_verify(request: Request) -> Response:
    body = await request.json()
    blob = store_of(request).blob(_oid(request))
    if not blob.exists() or blob.stat().st_size != body["size"]:
        raise HubError(404, "the object is missing or has another size")
    return JSONResponse({})


def _oid(request: Request) -> str:
    oid = str(request.path_params["oid"])
    # The oid becomes the name of a file, so it must not be a path.
    if len(oid) != 64 or set(oid) - set("0123456789abcdef"):
        raise HubError(400, "an object is named by its SHA-256")
    return oid


async def commit(request: Request) -> Response:
    """Adds a commit, from newline-delimited JSON: a header, then one operation per line.

    Raises:
        HubError: 412 if the branch has another commit than the stated parent.
    """
    repo, user = await writable(request)
    branch = revision(request)
    # The commit of the branch before this one.
    parent = repo.resolve(branch)
    if branch not in repo.branches:
        raise HubError(400, f"{branch} is not a branch", "RevisionNotFound")
    _refuse_too_many_commits(repo, request.app.state.commits_per_hour)
    files, header, store = dict(repo.commits[parent].files), {}, store_of(request)
    for line in (await request.body()).splitlines():
        if not line.strip():
            continue
        operation = json.loads(line)
        key, value = operation["key"], operation["value"]
        if key == "header":
            header = value
        elif key == "file":
            files[value["path"]] = store.text_file(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            files[value["path"]] = store.lfs_file(value["oid"])
        elif key == "deletedFile":
            files.pop(value["path"], None)
        else:
            raise HubError(400, f"operation {key} is not supported here")
    # The client states the commit that it has seen, so that it overwrites no later one.
    if header.get("parentCommit") not in (None, parent):
        raise HubError(412, "A commit has happened since. Please refresh and try again.")

    title, body = header.get("summary", ""), header.get("description", "")
    sha = repo.add(branch, Commit(parent, title, body, user, current_time(), files))
    store.save(repo)
    commit_url = f"{url(request, repo)}/commit/{sha}"
    return JSONResponse({"success": True, "commitOid": sha, "commitUrl": commit_url, "hookOutput": ""})


def _refuse_too_many_commits(repo: Repo, most: int) -> None:
    """Raises HubError 429, as the Hub does, if the repository had so many commits within an hour."""
    hour_ago = current_time(seconds_ago=3600)
    if sum(commit.date > hour_ago for commit in repo.commits.values()) >= most:
        raise HubError(
            429,
            f"You have exceeded the rate limit for repository commits ({most} per hour). You can retry this action in "
            "about 1 hour.",
            headers={"Retry-After": "3600"},
        )


async def create_branch(request: Request) -> Response:
    repo, _ = await writable(request)
    body = json.loads(await request.body() or b"{}")
    start = repo.resolve(body.get("startingPoint") or "main")
    return _new_ref(request, repo, repo.branches, revision(request), start)


async def create_tag(request: Request) -> Response:
    repo, _ = await writable(request)
    name = (await request.json())["tag"]
    return _new_ref(request, repo, repo.tags, name, repo.resolve(revision(request)))


def _new_ref(request: Request, repo: Repo, refs: dict[str, str], name: str, sha: str) -> Response:
    if name in refs:
        raise HubError(409, f"{name} already exists")
    refs[name] = sha
    store_of(request).save(repo)
    return JSONResponse({})


async def delete_ref(request: Request) -> Response:
    repo, _ = await writable(request)
    # One handler serves both kinds of refs, which the path tells apart.
    refs = repo.branches if "/branch/" in request.url.path else repo.tags
    if refs.pop(request.path_params["rev"], None) is None:
        raise HubError(404, "no such branch or tag", "RevisionNotFound")
    store_of(request).save(repo)
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    """Checks a README's metadata; the client requests this before uploading one."""
    data, message = metadata((await request.json())["content"])
    if data is None:
        return JSONResponse({"errors": [{"message": message}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})
