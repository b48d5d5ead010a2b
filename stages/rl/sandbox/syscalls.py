"""The system calls that a program may make, and the seccomp filter (classic BPF) that refuses all others.

Runs inside (see inside.py). This is an allow list, because a deny list has unknown holes: a hint on a file of the host
(fcntl F_SET_RW_HINT), the state of its pages in memory (mincore), a lock on it, a watch on it (inotify), a priority of
a process group or a key outlive a program or reach a parallel one.

The filter applies to the warm process, and therefore to all its forks; installing it for each program would take longer
than most programs. So it allows the calls that prepare a program: unshare, mount, capset, UP. The kernel refuses these
to a program, which has no capability.
"""

from __future__ import annotations

import struct

# The kernel's number of each machine, and its column of CALLS.
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

EPERM, ENOSYS, ENOPROTOOPT = 1, 38, 92
# Calls from here on have one number on all machines. Libraries try them and fall back if they are missing.
NEW = 424

# name:x86_64:aarch64
CALLS = """
read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 pwrite64:18:68 preadv:295:69 pwritev:296:70 lseek:8:62
open:2:- openat:257:56 creat:85:- close:3:57 close_range:436:436 dup:32:23 dup2:33:- dup3:292:24 pipe:22:- pipe2:293:59
fcntl:72:25 ioctl:16:29 sendfile:40:71 copy_file_range:326:285 fsync:74:82 fdatasync:75:83 ftruncate:77:46
truncate:76:45 fallocate:285:47
stat:4:- fstat:5:80 lstat:6:- newfstatat:262:79 statx:332:291 access:21:- faccessat:269:48 faccessat2:439:439
readlink:89:- readlinkat:267:78 getdents:78:- getdents64:217:61 getcwd:79:17 chdir:80:49 fchdir:81:50 mkdir:83:-
mkdirat:258:34 rmdir:84:- unlink:87:- unlinkat:263:35 rename:82:- renameat:264:38 renameat2:316:276 link:86:-
linkat:265:37 symlink:88:- symlinkat:266:36 mknod:133:- mknodat:259:33 chmod:90:- fchmod:91:52 fchmodat:268:53
chown:92:- fchown:93:55 lchown:94:- fchownat:260:54 umask:95:166 utime:132:- utimes:235:- futimesat:261:-
utimensat:280:88 getxattr:191:8 lgetxattr:192:9 fgetxattr:193:10 listxattr:194:11 llistxattr:195:12 flistxattr:196:13
mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214 msync:26:227
clone:56:220 fork:57:- vfork:58:- execve:59:221 exit:60:93 exit_group:231:94 wait4:61:260 waitid:247:95 kill:62:129
tkill:200:130 tgkill:234:131 pidfd_open:434:434 pidfd_send_signal:424:424 set_tid_address:218:96
set_robust_list:273:99 rseq:334:293 arch_prctl:158:- prctl:157:167 gettid:186:178 getpid:39:172 getppid:110:173
getpgrp:111:- getpgid:121:155 setpgid:109:154 getsid:124:156 setsid:112:157 getuid:102:174 geteuid:107:175
getgid:104:176 getegid:108:177 getresuid:118:148 getresgid:120:150 getgroups:115:158 capget:125:90 getrlimit:97:163
setrlimit:160:164 prlimit64:302:261 getrusage:98:165 times:100:153 getpriority:140:141 sched_yield:24:124
sched_getaffinity:204:123 sched_getparam:143:121 sched_getscheduler:145:120 sched_get_priority_max:146:125
sched_get_priority_min:147:126 getcpu:309:168 uname:63:160 getrandom:318:278 futex:202:98
rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 rt_sigpending:127:136 rt_sigsuspend:130:133
rt_sigtimedwait:128:137 sigaltstack:131:132 restart_syscall:219:128 pause:34:- alarm:37:- getitimer:36:102
setitimer:38:103 timer_create:222:107 timer_settime:223:110 timer_gettime:224:108 timer_getoverrun:225:109
timer_delete:226:111 nanosleep:35:101 clock_nanosleep:230:115 clock_gettime:228:113 clock_getres:229:114
gettimeofday:96:169 time:201:-
poll:7:- ppoll:271:73 select:23:- pselect6:270:72 epoll_create:213:- epoll_create1:291:20 epoll_ctl:233:21
epoll_wait:232:- epoll_pwait:281:22 eventfd:284:- eventfd2:290:19
socket:41:198 socketpair:53:199 bind:49:200 listen:50:201 accept:43:202 accept4:288:242 connect:42:203
getsockname:51:204 getpeername:52:205 sendto:44:206 recvfrom:45:207 recvmsg:47:212 shutdown:48:210 setsockopt:54:208
getsockopt:55:209
unshare:272:97 mount:165:40 capset:126:91
"""

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
    rows = [entry.split(":") for entry in CALLS.split()]
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
