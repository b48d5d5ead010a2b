"""Routes that change a repository: which way to upload a file, LFS objects, commits, branches, tags, card checks."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import uuid
from typing import Any

from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from release.hub.local import access
from release.hub.local.repos import url
from release.hub.local.store import LFS_SUFFIXES, Commit, HubError, Repo, current_time


async def preupload(request: Request) -> Response:
    """States which files use LFS, and which exist already, so that equal files are not sent again."""
    repo, _ = await access.writable(request)
    files = repo.commits[repo.resolve(access.revision(request))].files
    rows = []
    for requested in (await request.json())["files"]:
        path = requested["path"]
        lfs = path.endswith(LFS_SUFFIXES) or requested["size"] >= request.app.state.lfs_bytes
        oid = files[path].etag if path in files else None
        rows.append({"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid})
    return JSONResponse({"files": rows})


async def lfs_batch(request: Request) -> Response:
    """States the upload address of each object that does not exist already.

    Objects above the part size have one for each part.
    """
    await access.writable(request)
    body, part = await request.json(), request.app.state.part_bytes
    rows, multipart = [], False
    for requested in body["objects"]:
        oid, size = requested["oid"], requested["size"]
        row: dict[str, Any] = {"oid": oid, "size": size}
        if not access.store(request).blob(oid).exists():
            target = f"{access.base_url(request)}/_lfs/{oid}"
            upload: dict[str, Any] = {"href": target}
            if size > part and "multipart" in body.get("transfers", []):
                # The client sends part n to the address under the key of n in five digits, then completes the object.
                multipart, count = True, -(-size // part)
                upload["href"] = f"{target}/complete?parts={count}"
                upload["header"] = {"chunk_size": str(part)}
                upload["header"] |= {f"{n:05d}": f"{target}/part/{n}" for n in range(1, count + 1)}
            # For an object without actions, the client sends nothing.
            row["actions"] = {"upload": upload, "verify": {"href": f"{target}/verify"}}
        rows.append(row)
    transfer = "multipart" if multipart else "basic"
    return JSONResponse({"transfer": transfer, "objects": rows}, media_type="application/vnd.git-lfs+json")


async def lfs_put(request: Request) -> Response:
    """Receives a whole object, or one part of it."""
    oid, part = _oid(request), request.path_params.get("part")
    # Two files of one commit may be equal and are then sent at the same time: each upload writes a file of its own.
    upload = access.store(request).blobs / f"{oid}.{uuid.uuid4().hex}.upload"
    md5 = hashlib.md5(usedforsecurity=False)
    with open(upload, "wb") as f:
        async for chunk in request.stream():
            f.write(chunk)
            md5.update(chunk)
    if part is None:
        await run_in_threadpool(access.store(request).accept, upload, oid)
    else:
        os.replace(upload, access.store(request).blobs / f"{oid}.part{int(part)}")
    # The client sends the ETags of all parts back when it completes the object.
    return Response(headers={"ETag": f'"{md5.hexdigest()}"'})


async def lfs_complete(request: Request) -> Response:
    oid, count = _oid(request), int(request.query_params["parts"])
    parts = [access.store(request).blobs / f"{oid}.part{n}" for n in range(1, count + 1)]
    if not access.store(request).blob(oid).exists():
        await run_in_threadpool(access.store(request).join, parts, oid)
    return JSONResponse({"success": True})


async def lfs_verify(request: Request) -> Response:
    body = await request.json()
    blob = access.store(request).blob(_oid(request))
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
    repo, user = await access.writable(request)
    branch = access.revision(request)
    # The commit of the branch before this one.
    parent = repo.resolve(branch)
    if branch not in repo.branches:
        raise HubError(400, f"{branch} is not a branch", "RevisionNotFound")
    _refuse_too_many_commits(repo, request.app.state.commits_per_hour)
    files, header, store = dict(repo.commits[parent].files), {}, access.store(request)
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
        elif key == "deletedFolder":
            start = value["path"].rstrip("/") + "/"
            files = {path: file for path, file in files.items() if not path.startswith(start)}
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
    repo, _ = await access.writable(request)
    body = json.loads(await request.body() or b"{}")
    start = repo.resolve(body.get("startingPoint") or "main")
    return _new_ref(request, repo, repo.branches, access.revision(request), start)


async def create_tag(request: Request) -> Response:
    repo, _ = await access.writable(request)
    name = (await request.json())["tag"]
    return _new_ref(request, repo, repo.tags, name, repo.resolve(access.revision(request)))


def _new_ref(request: Request, repo: Repo, refs: dict[str, str], name: str, sha: str) -> Response:
    if name in refs:
        raise HubError(409, f"{name} already exists")
    refs[name] = sha
    access.store(request).save(repo)
    return JSONResponse({})


async def delete_ref(request: Request) -> Response:
    repo, _ = await access.writable(request)
    # One handler serves both kinds of refs, which the path tells apart.
    refs = repo.branches if "/branch/" in request.url.path else repo.tags
    if refs.pop(request.path_params["rev"], None) is None:
        raise HubError(404, "no such branch or tag", "RevisionNotFound")
    access.store(request).save(repo)
    return JSONResponse({})


async def validate_yaml(request: Request) -> Response:
    """Checks a README's metadata; the client requests this before uploading one."""
    data, message = access.metadata((await request.json())["content"])
    if data is None:
        return JSONResponse({"errors": [{"message": message}], "warnings": []}, 400)
    return JSONResponse({"errors": [], "warnings": []})
