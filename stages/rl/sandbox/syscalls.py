"""The system calls that a program may make, and the seccomp filter (classic BPF) that refuses all others.

Runs inside (see inside.py). This is an allow list, because a deny list has unknown holes: a hint on a file of the host
(fcntl F_SET_RW_HINT), the state of its pages in memory (mincore), a lock on it, a watch on it (inotify), a priority of
a process group or a key outlive a program or reach a parallel one.

The filter applies to the warm process, and therefore to all its forks; installing it for each program would take longer
than most programs. So it allows the calls that prepare a program: unshare, mount, capset, UP. The kernel refuses these
to a program, which has no capability.
"""

from __future__ import annotations

import os
import struct

# The kernel's number of each machine, and its column of TABLE.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

EPERM, ENOSYS, ENOPROTOOPT = 1, 38, 92
# Calls from here on have one number on all machines. Libraries try them and fall back if they are missing.
NEW = 424
# The calls that are allowed, with their numbers.
TABLE = os.path.join(os.path.dirname(__file__), "syscalls.txt")

ALL = 0xFFFFFFFF
# The namespaces of each program: CLONE_NEWPID, CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWNET.
NEW_NAMESPACES = 0x20000000 | 0x00020000 | 0x08000000 | 0x40000000
# SIOCSIFFLAGS, which starts a network device.
UP = 0x8914
SOCKETS = [(0, ALL, {1, 2}), (1, 0xF, {1, 2, 5}), (2, ALL, {0, 6, 17})]  # AF_UNIX, AF_INET; nothing loads a module
# The calls with a restricted argument: (index, mask, allowed values).
ARGUMENTS: dict[str, list[tuple[int, int, set[int]]]] = {
    "socket": SOCKETS,
    "socketpair": SOCKETS,
    # No new namespace. clone3 keeps its flags in memory, where no filter looks, and is not in the list.
    "clone": [(0, 0x7E020080, {0})],
    # Copies and flags of descriptors, and a pipe's size. No locks, leases, owners, hints, watches, no larger pipe.
    "fcntl": [(1, ALL, {0, 1, 2, 3, 4, 1030, 1032})],
    # Terminal test, number of readable bytes, non-blocking, close on exec.
    "ioctl": [(1, ALL, {0x5401, 0x802C542A, 0x5413, 0x541B, 0x5421, 0x5450, 0x5451, UP})],
    # No byte out of band (MSG_OOB): a channel with one is readable without data to read.
    "sendto": [(3, 1, {0})],
    "unshare": [(0, ALL, {NEW_NAMESPACES})],
    "prctl": [(0, ALL, {15, 16, 39})],  # a thread's name, whether rights can be gained
    # Not the advice that moves other processes' pages (MADV_COLD, MADV_PAGEOUT) or compares them (MADV_MERGEABLE).
    "madvise": [(2, ALL, {0, 1, 2, 3, 4, 8, 14, 15})],
}

# By level, the options of a socket that may be set. With others (IP_MINTTL) a connection outlives its program: sent
# data waits in the kernel for minutes, for a peer that has exited.
OPTIONS = {
    # REUSEADDR, BROADCAST, SNDBUF, RCVBUF, KEEPALIVE, LINGER, REUSEPORT, PASSCRED, RCVTIMEO, SNDTIMEO
    1: {2, 6, 7, 8, 9, 13, 15, 16, 20, 21},
    6: {1, 3, 4, 5, 6, 12, 18},  # TCP: NODELAY CORK KEEPIDLE KEEPINTVL KEEPCNT QUICKACK USER_TIMEOUT
    41: {26},  # IPv6: V6ONLY
}


def numbers(machine: str) -> dict[str, int]:
    """Returns the allowed calls of a machine, by name.

    Raises:
        KeyError: The machine is not in the table.
    """
    column = MACHINES[machine][1]
    with open(TABLE) as file:
        rows = [line.split() for line in file if not line.startswith("#")]
    return {name: int(number) for name, *columns in rows if (number := columns[column]) != "-"}


def filter_of(machine: str) -> bytes:
    """Returns the filter's instructions, 8 bytes each.

    Raises:
        KeyError: The machine is not in the table.
    """
    # Instructions of classic BPF: load a word, apply a mask, jump if equal, jump if not less, return.
    load, mask, equal, at_least, give = 0x20, 0x54, 0x15, 0x35, 0x06
    # Actions of seccomp. The number of an error is added to `refuse`.
    allow, kill, refuse = 0x7FFF0000, 0x80000000, 0x00050000
    # Offsets in the kernel's record of a call: 0 is its number, 4 the machine, 16 the first argument of eight bytes.
    code = [(load, 0, 0, 4), (equal, 1, 0, MACHINES[machine][0]), (give, 0, 0, kill), (load, 0, 0, 0)]
    code += [(at_least, 0, 1, 0x40000000), (give, 0, 0, refuse | EPERM)]  # x32's numbers, which name the same calls
    for name, number in numbers(machine).items():
        body = []
        for place, bits, values in ARGUMENTS.get(name, []):
            body += [(load, 0, 0, 16 + 8 * place), (mask, 0, 0, bits)]
            # A match jumps over the other values and the refusal.
            body += [(equal, len(values) - n, 0, value) for n, value in enumerate(sorted(values))]
            body += [(give, 0, 0, refuse | EPERM)]
        if name == "setsockopt":
            for level, options in OPTIONS.items():
                body += [(load, 0, 0, 16 + 8), (equal, 0, len(options) + 3, level), (load, 0, 0, 16 + 16)]
                body += [(equal, len(options) - n, 0, option) for n, option in enumerate(sorted(options))]
                body += [(give, 0, 0, refuse | ENOPROTOOPT), (give, 0, 0, allow)]
            body += [(give, 0, 0, refuse | ENOPROTOOPT)]
        code += [(equal, 0, len(body) + 1, number), *body, (give, 0, 0, allow)]
    code += [(at_least, 0, 1, NEW), (give, 0, 0, refuse | ENOSYS), (give, 0, 0, refuse | EPERM)]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in code)
