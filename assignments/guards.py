"""The guards that a student's process takes on itself before it runs a line of the submission.

Each where the system has it:
    limits    processor seconds, address space, file size, no core; wall clock and output are watched by the judge
    landlock  reads Python and its packages alone, writes its own folder alone, opens no TCP connection (Linux 5.13)
    seccomp   starts no process or program, signals and inspects no other process, opens no socket (Linux)
    powerless no capabilities, although root started it; a user of its own where that user can read Python
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import struct
import sys
from pathlib import Path

FILE_LIMIT = 2**26  # bytes of a file that a worker writes
LIBC = ctypes.CDLL(None, use_errno=True)
SYSCALLS = {  # name: x86_64, aarch64
    "clone": (56, 220),
    "fork": (57, -1),
    "vfork": (58, -1),
    "execve": (59, 221),
    "execveat": (322, 281),
    "clone3": (435, 435),
    "kill": (62, 129),
    "tkill": (200, 130),
    "tgkill": (234, 131),
    "ptrace": (101, 117),
    "socket": (41, 198),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "pidfd_getfd": (438, 438),
    "io_uring_setup": (425, 425),
    "keyctl": (250, 219),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "perf_event_open": (298, 241),
    "prlimit64": (302, 261),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "setpriority": (141, 140),
    "setns": (308, 268),
    "unshare": (272, 97),
    "mount": (165, 40),
    "reboot": (169, 142),
    "mq_open": (240, 180),
    "bpf": (321, 280),
    # Landlock knows no rights for what stands beside the content of a file.
    "chmod": (90, -1),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, -1),
    "fchown": (93, 55),
    "lchown": (94, -1),
    "fchownat": (260, 54),
    "utime": (132, -1),
    "utimes": (235, -1),
    "utimensat": (280, 88),
    "futimesat": (261, -1),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
}


def set_limits(seconds: float, memory: int) -> bool:
    import resource

    def limit(what: int, value: int, hard: int | None = None) -> None:
        top = resource.getrlimit(what)[1]
        value, hard = (v if top == resource.RLIM_INFINITY else min(v, top) for v in (value, hard or value))
        resource.setrlimit(what, (value, hard))

    limit(resource.RLIMIT_CPU, int(seconds), int(seconds) + 2)
    limit(resource.RLIMIT_FSIZE, FILE_LIMIT)
    limit(resource.RLIMIT_CORE, 0)
    with contextlib.suppress(OSError):  # not Linux: its size is unknown
        size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        limit(resource.RLIMIT_AS, size + memory)
    return True


def landlock(readable: list[str], writable: list[str]) -> bool:
    """Allow reading below `readable` and everything below `writable`, nothing else; False where Linux has no Landlock.

    The kernel's structures: linux/landlock.h. Rights that a newer version of it adds are handled when it has them.
    """
    create, add, restrict = 444, 445, 446
    abi = LIBC.syscall(create, None, ctypes.c_size_t(0), 1)
    if abi < 1:
        return False
    fs = (1 << 13) - 1 | (1 << 13) * (abi >= 2) | (1 << 14) * (abi >= 3) | (1 << 15) * (abi >= 5)
    attributes = struct.pack("<QQQ", fs, 3 * (abi >= 4), 3 * (abi >= 6))
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    rules = LIBC.syscall(create, attributes, ctypes.c_size_t(len(attributes)), 0)
    if rules < 0:
        return False
    read, of_files = 0b1101, 0b111 | (1 << 14) * (abi >= 3) | (1 << 15) * (abi >= 5)  # execute, read file, read folder
    for path, rights in [*((p, read) for p in readable), *((p, fs) for p in writable)]:
        try:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        rights &= fs if os.path.isdir(path) else of_files & fs
        added = LIBC.syscall(add, rules, 1, struct.pack("<Qi", rights, fd), 0)
        os.close(fd)
        if added < 0:
            return False
    return LIBC.syscall(restrict, rules, 0) == 0


def seccomp() -> bool:
    """Refuse the system calls of SYSCALLS (threads may start); False where the processor is not known."""
    machine = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}.get(os.uname().machine)
    if sys.platform != "linux" or machine is None:
        return False
    column, arch = machine
    load, equal, at_least, bits, end = 0x20, 0x15, 0x35, 0x45, 0x06  # instructions of the classic filter
    refuse, allow = 0x00050000 | 1, 0x7FFF0000  # EPERM
    program = [(load, 0, 0, 4), (equal, 1, 0, arch), (end, 0, 0, refuse), (load, 0, 0, 0)]
    if column == 0:  # numbers of the 32-bit pointers' variant
        program += [(at_least, 0, 1, 0x40000000), (end, 0, 0, refuse)]
    numbers = {name: pair[column] for name, pair in SYSCALLS.items() if pair[column] >= 0}
    # clone makes threads too; clone3 hides its flags, and answered "not there" (ENOSYS) libc takes clone instead.
    program += [(equal, 0, 1, numbers.pop("clone3")), (end, 0, 0, 0x00050000 | 38)]
    program += [(equal, 0, 4, numbers.pop("clone")), (load, 0, 0, 16), (bits, 0, 1, 0x00010000)]
    program += [(end, 0, 0, allow), (end, 0, 0, refuse)]
    # A process may ask for its own limits (the threads' library does, with pid 0), and for those of no other.
    program += [(equal, 0, 4, numbers.pop("prlimit64")), (load, 0, 0, 16), (equal, 0, 1, 0)]
    program += [(end, 0, 0, allow), (end, 0, 0, refuse)]
    for number in numbers.values():
        program += [(equal, 0, 1, number), (end, 0, 0, refuse)]
    program.append((end, 0, 0, allow))
    code = b"".join(struct.pack("<HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code, len(code))
    header = struct.pack("<HxxxxxxQ", len(program), ctypes.addressof(buffer))
    return LIBC.prctl(22, 2, header, 0, 0) == 0  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def can_be_another(paths: list[str]) -> bool:
    """Whether a user who owns nothing could read `paths`."""
    folders = {parent for path in paths for parent in [Path(path), *Path(path).parents]}
    return all(folder.stat().st_mode & 0o001 for folder in folders if folder.is_dir())


def become_nobody(uid: int | None) -> bool:
    """Give up root: the user, where `uid` is given, and in any case its powers (capabilities)."""
    if os.geteuid() != 0:
        return False
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        return True
    for capability in range(64):
        LIBC.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP
    return LIBC.capset(struct.pack("<IiIII", 0x20080522, 0, 0, 0, 0)[:8], bytes(24)) == 0


def take_guards(folder: str, seconds: float, memory: int) -> list[str]:
    """Shut this process in; the names of the guards that hold."""
    paths = sorted({os.path.realpath(p) for p in [sys.prefix, sys.base_prefix, *sys.path] if os.path.exists(p)})
    system = [
        "/usr/lib",
        "/lib",
        "/lib64",
        "/usr/share",
        "/usr/local/lib",
        "/etc/ld.so.cache",
        "/etc/localtime",
        "/etc/fonts",
        "/dev/urandom",
        "/dev/random",
        f"/proc/{os.getpid()}",
        "/proc/cpuinfo",
        "/proc/meminfo",
        "/sys/devices/system/cpu",
    ]
    guards = {"limits": set_limits(seconds, memory)}
    if sys.platform == "linux":
        uid = None
        if os.geteuid() == 0 and can_be_another([*paths, os.path.dirname(folder)]):
            uid = 61000 + os.getpid() % 4000
            os.chown(folder, uid, uid)
            for place, folders, files in os.walk(folder):
                for name in (*folders, *files):
                    os.chown(os.path.join(place, name), uid, uid)
        LIBC.prctl(38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS, which the two below need
        guards["landlock"] = landlock([*paths, *system], [folder, "/dev/null"])
        guards["powerless"] = become_nobody(uid)
        guards["seccomp"] = seccomp()
        if not guards["seccomp"]:
            import resource

            with contextlib.suppress(OSError, ValueError):
                resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
    return [name for name, holds in guards.items() if holds]
