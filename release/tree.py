"""Lists the files of an untrusted folder within limits, without following links or opening files."""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

DEPTH = 32
"""The maximum number of folders around a file."""
ENTRIES = 20_000
"""The maximum number of entries below a folder, apart from those that its checksum files allow (`scan`)."""
NAMED = 100
"""The maximum number of refusals that are named individually."""
SPARSE_BYTES = 64 << 20
"""The total size that sparse files may always have."""
WITHOUT_MODES = frozenset(
    {
        "9p",
        "cifs",
        "drvfs",
        "exfat",
        "fuseblk",
        "iso9660",
        "msdos",
        "ntfs",
        "ntfs3",
        "prl_fs",
        "smb3",
        "udf",
        "vboxsf",
        "vfat",
        "vmhgfs",
        "fuse.vmhgfs-fuse",
    }
)
"""File systems that show every file as executable, or with the mode of the mount."""
CACHED = re.compile(r"(models|datasets)--.+")
"""Names of the folders of repositories in the cache of the Hub's client."""
CLIENTS = re.compile(
    r"\.cache/huggingface/(CACHEDIR\.TAG|\.gitignore(\.lock)?|trees/[0-9a-f]+\.json|"
    r"(download|upload)/.+\.(metadata|lock|incomplete))"
)
"""Files that the Hub's client creates in a download folder."""
CLIENTS_BYTES = 16 << 20
"""The maximum size of such a file."""


@dataclass
class Tree:
    """The files of a folder.

    Attributes:
        files: {path: its status} of the files that may be read.
        refused: A sentence for each other entry, at most NAMED.
        others: The number of entries that have no sentence because there are more than NAMED.
        overflow: Whether there are too many entries to list all.
    """

    files: dict[str, os.stat_result] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)
    others: int = 0
    overflow: bool = False

    def refuse(self, text: str) -> None:
        if len(self.refused) < NAMED:
            self.refused.append(text)
        else:
            self.others += 1


def walk(folder: Path, max_entries: int | None = None) -> Iterator[tuple[str, os.stat_result | OSError]]:
    """Yields (relative path, status) of the entries below a folder; an OSError in place of a status that is unreadable.

    Folders are descended into and not yielded, unless they are unreadable or deeper than DEPTH. If there are more than
    `max_entries` entries, "." comes last, with an OSError of E2BIG.
    """
    entry_count = 0
    pending = [""]
    while pending:
        directory = pending.pop()
        try:
            entries = os.scandir(folder / directory)
        except OSError as error:
            yield directory or ".", error
            continue
        with entries:
            for entry in entries:
                entry_count += 1
                # A folder of millions of names would fill the memory.
                if max_entries is not None and entry_count > max_entries:
                    text = f"has more than {max_entries} entries, far more than its checksums name"
                    yield ".", OSError(errno.E2BIG, text)
                    return
                path = f"{directory}/{entry.name}".lstrip("/")
                try:
                    # The status of a link itself; `_blob` looks where links of the Hub's cache lead.
                    status = entry.stat(follow_symlinks=False)
                except OSError as error:
                    yield path, error
                    continue
                if stat.S_ISDIR(status.st_mode) and path.count("/") < DEPTH:
                    pending.append(path)
                else:
                    yield path, status


def scan(folder: Path, listed_count: int) -> Tree:
    """Returns the files of a folder that may be read.

    `listed_count` is the number of files that its checksum files name.
    """
    tree = Tree()
    path_of_name: dict[str, str] = {}
    # Beside the listed files there are folders, signatures and what the Hub's client adds.
    for path, status in walk(folder, ENTRIES + 4 * listed_count):
        if isinstance(status, OSError):
            if status.errno == errno.E2BIG:
                return Tree(refused=[f"{path} {status.strerror}"], overflow=True)
            tree.refuse(f"{path} cannot be read: {status.strerror}")
        elif reason := _refusal(path, status, path_of_name):
            tree.refuse(f"{path} {reason}")
        elif not stat.S_ISLNK(status.st_mode):
            tree.files[path] = status
        elif (blob := _blob(folder, path)) is not None:
            tree.files[path] = blob
        else:
            tree.refuse(f"{path} is a link, not a regular file")
    return tree


def _refusal(path: str, status: os.stat_result, path_of_name: dict[str, str]) -> str:
    """Returns the reason why a path may not be read; "" if it may."""
    try:
        # Names are bytes on Linux, and what is no UTF-8 cannot be printed, listed or compared.
        path.encode()
    except UnicodeEncodeError:
        return "has a name that is no UTF-8"
    if not path.isprintable():
        return "has a name with characters that cannot be printed"
    # On a file system without case, or for a reader, two such names are one.
    if (similar_path := path_of_name.setdefault(unicodedata.normalize("NFKC", path).casefold(), path)) != path:
        return f"has a name that looks like that of {similar_path}"
    is_clients = CLIENTS.fullmatch(path) and stat.S_ISREG(status.st_mode) and status.st_size <= CLIENTS_BYTES
    if ".cache" in path.split("/") and not is_clients:
        return "lies in .cache, where a release keeps nothing and the Hub's client leaves no such file"
    if stat.S_ISDIR(status.st_mode):
        return f"lies more than {DEPTH} folders deep"
    if not (stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode)):
        return f"is {_KINDS.get(stat.S_IFMT(status.st_mode), 'a special file')}, not a regular file"
    return ""


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


def is_sparse(status: os.stat_result) -> bool:
    """Returns True if almost nothing of a file is on the disk; compressing file systems do not reach that ratio."""
    return disk_bytes(status) * 64 < status.st_size


def real_bytes(files: Iterable[os.stat_result]) -> int:
    """Returns the bytes of files on the disk: holes do not count, and a file with several names counts once."""
    return sum({inode(status): min(status.st_size, disk_bytes(status)) for status in files}.values())


def disk_bytes(status: os.stat_result) -> int:
    """Returns the bytes that a file has on the disk."""
    # The unit of `st_blocks` is 512 bytes on every file system.
    return status.st_blocks * 512


def inode(status: os.stat_result) -> tuple[int, int]:
    """Returns the device and the number of a file, which are equal for all names of one file."""
    return status.st_dev, status.st_ino


def is_foreign_link(folder: Path, path: str) -> bool:
    """Returns True if a path is a link, or leads through one, except for links of the Hub client's cache.

    No link is followed.
    """
    parts = path.split("/")
    if any((folder / "/".join(parts[:depth])).is_symlink() for depth in range(1, len(parts))):
        return True
    return (folder / path).is_symlink() and _blob(folder, path) is None


def _blob(folder: Path, path: str) -> os.stat_result | None:
    """Returns the status of the file that a link of the Hub client's cache leads to; None for any other link.

    In the cache, `<repository>/snapshots/<commit>/<path>` links to `<repository>/blobs/<digest>`.
    """
    snapshot = folder.resolve()
    repository = snapshot.parent.parent
    # Not `resolve`, which would follow further links.
    target = Path(os.path.normpath((snapshot / path).parent / os.readlink(folder / path)))
    if snapshot.parent.name != "snapshots" or CACHED.fullmatch(repository.name) is None:
        return None
    if target.parent != repository / "blobs" or target.parent.is_symlink():
        return None
    try:
        status = target.lstat()
    except OSError:
        return None
    return status if stat.S_ISREG(status.st_mode) else None


def keeps_modes(folder: Path, mounts: str | None = None) -> bool:
    """Returns True if the file system of a folder records executable modes, or is of an unknown kind.

    `mounts` is the text of /proc/self/mountinfo.
    """
    try:
        text = Path("/proc/self/mountinfo").read_text(errors="surrogateescape") if mounts is None else mounts
    except OSError:
        return True
    real_path = os.path.realpath(folder)
    # The file system of a folder is mounted at the longest mount point around it.
    longest, kind = -1, ""
    for line in text.splitlines():
        mount, _, filesystem = line.partition(" - ")
        # The kernel writes spaces and backslashes of a path as octal numbers.
        mount_point = re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), mount.split(" ")[4])
        # A later mount covers an earlier one at the same point, hence `>=`.
        if len(mount_point) >= longest and f"{real_path}/".startswith(mount_point.rstrip("/") + "/"):
            longest, kind = len(mount_point), filesystem.split(" ")[0]
    return kind not in WITHOUT_MODES
