"""Routes that rewrite what a repository has had: squash a branch, list and delete LFS objects."""

from __future__ import annotations

from dataclasses import replace

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from release.hub.local import access
from release.hub.local.store import Commit, HubError, Repo, current_time


async def squash(request: Request) -> Response:
    """Replaces the history of a branch by one commit with its files. LFS objects of the old commits stay until they are
    deleted, as on the Hub."""
    repo, user = await access.writable(request)
    branch = access.revision(request)
    if branch not in repo.branches:
        raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
    title = str((await request.json()).get("message", ""))
    before = _blobs(repo)
    files = repo.commits[repo.branches[branch]].files
    repo.add(branch, Commit(None, title, "", user, current_time(), files))
    repo.drop_unreachable()
    _save(request, repo, before)
    return JSONResponse({})


async def list_lfs(request: Request) -> Response:
    repo, _ = await access.writable(request)
    rows = [
        {"fileOid": sha, "oid": sha, "filename": row["filename"], "size": row["size"], "pushedAt": row["pushedAt"]}
        for sha, row in sorted(repo.lfs.items())
    ]
    return JSONResponse(rows)


async def delete_lfs(request: Request) -> Response:
    """Deletes objects, and with `rewriteHistory` the files of all commits that refer to them."""
    repo, _ = await access.writable(request)
    deletions = (await request.json())["deletions"]
    deleted, before = set(deletions["sha"]), _blobs(repo)
    repo.lfs = {sha: row for sha, row in repo.lfs.items() if sha not in deleted}
    if deletions.get("rewriteHistory"):
        repo.commits = {
            sha: replace(commit, files={p: f for p, f in commit.files.items() if not (f.lfs and f.blob in deleted)})
            for sha, commit in repo.commits.items()
        }
    _save(request, repo, before)
    return JSONResponse({})


def _blobs(repo: Repo) -> set[str]:
    return {file.blob for commit in repo.commits.values() for file in commit.files.values()} | set(repo.lfs)


def _save(request: Request, repo: Repo, before: set[str]) -> None:
    """Saves the repository, and deletes the bytes that nothing refers to any more."""
    store = access.store(request)
    store.save(repo)
    store.drop_blobs(before)
