"""The walls a process is put behind before it runs what nobody trusts: namespaces, a root folder, a user, limits.

Standard library only. ``enter`` builds those that it is given, and fails with the name of the first that is missing.
"""

import ctypes
import os
import resource
import signal
import sys
from collections.abc import Sequence

from . import landlock

NAMESPACES, ROOT, LANDLOCK, USER = "namespaces", "a root folder of its own", "Landlock", "an unprivileged user"
ALL = (NAMESPACES, ROOT, LANDLOCK, USER) if sys.platform == "linux" else (USER,)
ABSENT = () if sys.platform == "linux" else (NAMESPACES, ROOT, LANDLOCK)  # from this system altogether

LIBC = ctypes.CDLL(None, use_errno=True)
NEW_MOUNTS, NEW_OTHERS = (
    0x20000,
    0x10000000 | 0x20000000 | 0x40000000 | 0x8000000 | 0x4000000,
)  # user, pid, net, ipc, uts
NO_NEW_PRIVILEGES, PARENT_DEATH_SIGNAL, DUMPABLE = 38, 1, 4
READ_ONLY, NO_SUID, NO_DEVICES, NO_EXECUTION = 1, 2, 4, 8
BIND, RECURSIVE, PRIVATE, DETACH = 4096, 16384, 1 << 18, 2
MOUNT_SETATTR, AT_RECURSIVE, HERE = 442, 0x8000, -100
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}.get(os.uname().machine)
INSIDE, NOBODY, OWN = 1000, 65534, 0x70000000  # user ids: in a namespace, of root's processes, and one for each of them
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/nix/store", "/etc/ld.so.cache", "/etc/localtime")
FILES = 4096  # in the folder of a program
HOME = "/tmp"  # of a program, in a root folder of its own


class MissingError(Exception):
    """A wall that this machine does not have; its argument is the name."""


def readable() -> list[str]:
    """Return the folders and files that a Python program needs to read, none within another."""
    paths = {sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix, *SYSTEM}
    found: list[str] = []
    for path in sorted(path for path in paths if path != "/" and os.path.exists(path)):
        if not any(path.startswith(f"{one}/") for one in found):
            found.append(path)
    return found


def enter(walls: Sequence[str], folder: str, limits: dict[str, float]) -> list[str]:
    """Go behind walls; returns in a new process, with the descriptors of the caller, which does not go on.

    Args:
        walls: to build, of ``ALL``.
        folder: an empty one, of this user, where the process may write; or where a folder in memory is put over it.
        limits: of every process ``seconds``, ``memory``, ``file_bytes``, ``open_files``; ``processes``, ``disk_bytes``.

    Returns:
        Walls that are missing and can be done without.

    Raises:
        MissingError: a namespace cannot be had: to be tried again in a new process.
    """
    os.setsid()
    missing: list[str] = []
    user = NOBODY if os.geteuid() == 0 and USER in walls else None
    if NAMESPACES in walls:
        _require(_new_namespaces(user, mounts=ROOT in walls), NAMESPACES)
    if ROOT in walls:
        _require(_own_root(folder, int(limits["disk_bytes"])), ROOT)
        folder, read = HOME, [one for one in (*readable(), *DEVICES) if os.path.exists(one)]
    else:
        read = [*readable(), *(one for one in DEVICES if os.path.exists(one))]
    os.chdir(folder)
    if NAMESPACES in walls:
        _die_with_parent()
        _fork_and_wait()  # the first process of the namespace, which outlives the program by nothing
        _die_with_parent()
    users = (INSIDE,) if NAMESPACES in walls else (OWN + os.getpid(), NOBODY)
    if user is not None and not _become(users, folder):
        missing.append(USER)
    if sys.platform == "linux":
        LIBC.capset((ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        LIBC.prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        _die_with_parent()
        if NAMESPACES in walls:
            _fork_and_wait()  # the program itself: signals do not reach the first process of a namespace
    hide()
    if LANDLOCK in walls and not landlock.restrict(LIBC, read, [folder, "/dev/null"]):
        missing.append(LANDLOCK)
    _limit(limits)
    return missing


def hide() -> None:
    """Let no other process of this user look into this one or its descriptors."""
    if sys.platform == "linux":
        LIBC.prctl(DUMPABLE, 0, 0, 0, 0)


def _require(done: bool, wall: str) -> None:
    if not done:
        raise MissingError(wall)


def _die_with_parent() -> None:
    if sys.platform == "linux":
        LIBC.prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)


def _fork_and_wait() -> None:
    """Go on in a child; the parent waits for it, with no descriptor open, and ends as it did."""
    child = os.fork()
    if not child:
        return
    os.closerange(0, 1024)
    while True:
        pid, status = os.wait()
        if pid == child:
            code = os.waitstatus_to_exitcode(status)
            os._exit(code if code >= 0 else 128 - code)


def _new_namespaces(user: int | None, mounts: bool) -> bool:
    """Leave the namespaces of this process; a helper outside says who its users are."""
    begun_read, begun_write = os.pipe()
    own, groups = os.getpid(), os.getegid()
    helper = os.fork()
    if helper == 0:
        os.close(begun_write)
        done = os.read(begun_read, 1) == b"y" and _map_users(own, user, os.geteuid(), groups)
        os._exit(0 if done else 1)
    os.close(begun_read)
    done = LIBC.unshare(NEW_OTHERS | (NEW_MOUNTS if mounts else 0)) == 0
    os.write(begun_write, b"y" if done else b"n")
    os.close(begun_write)
    mapped = os.waitpid(helper, 0)[1] == 0
    if not (done and mapped):
        return False
    try:  # no namespace within this one: its first user would have every right in there
        with open("/proc/sys/user/max_user_namespaces", "w") as most:
            most.write("0")
    except OSError:
        return False
    return True


def _map_users(process: int, user: int | None, own: int, group: int) -> bool:
    lines = {"setgroups": "deny", "uid_map": f"{INSIDE} {own} 1", "gid_map": f"{INSIDE} {group} 1"}
    if user is not None:  # the superuser stays until all is mounted
        lines = dict.fromkeys(("uid_map", "gid_map"), f"0 0 1\n{INSIDE} {user} 1")
    try:
        for name, text in lines.items():
            with open(f"/proc/{process}/{name}", "w") as file:
                file.write(text)
    except OSError:
        return False
    return True


def _own_root(base: str, disk: int) -> bool:
    """Make a folder in memory the root, with Python in it to be read and ``HOME`` to be written; the rest is gone."""
    if PIVOT_ROOT is None:
        return False
    home = base + HOME
    try:
        _mount(None, "/", None, RECURSIVE | PRIVATE)
        _mount("tmpfs", base, "tmpfs", NO_SUID, "size=1m,mode=755")
        os.mkdir(home)
        _mount("tmpfs", home, "tmpfs", NO_SUID | NO_DEVICES, f"size={disk},nr_inodes={FILES},mode=1777")
        for path in readable():
            _show(base, path, READ_ONLY | NO_SUID | NO_DEVICES)
        for path in DEVICES:
            _show(base, path, READ_ONLY | NO_SUID | NO_EXECUTION)
        os.chdir(base)
        _check(LIBC.syscall(PIVOT_ROOT, b".", b"."))
        _check(LIBC.umount2(b".", DETACH))
        os.chdir("/")
        _set_attributes("/", READ_ONLY | NO_SUID | NO_DEVICES, 0)
    except OSError:
        return False
    return True


def _show(base: str, path: str, attributes: int) -> None:
    """Let a folder or file be seen at its own place beneath another root."""
    there = base + path
    if os.path.islink(path):
        os.makedirs(os.path.dirname(there), exist_ok=True)
        os.symlink(os.readlink(path), there)
        return
    os.makedirs(there if os.path.isdir(path) else os.path.dirname(there), exist_ok=True)
    if not os.path.isdir(path):
        os.close(os.open(there, os.O_CREAT | os.O_WRONLY, 0o644))
    _mount(path, there, None, BIND | RECURSIVE)
    _set_attributes(there, attributes, AT_RECURSIVE)


def _mount(source: str | None, target: str, kind: str | None, flags: int, options: str | None = None) -> None:
    words = [None if word is None else word.encode() for word in (source, target, kind, options)]
    _check(LIBC.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3]))


def _set_attributes(path: str, attributes: int, flags: int) -> None:
    wanted = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _check(LIBC.syscall(MOUNT_SETATTR, HERE, path.encode(), flags, wanted, ctypes.c_size_t(32)))


def _check(result: int) -> None:
    if result:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _become(users: Sequence[int], folder: str) -> bool:
    """Be another user for good, who owns this folder: the first of these that there is and reaches it and Python."""
    for user in users:
        try:
            os.seteuid(user)
            with open(os.__file__, "rb"):
                pass
            os.stat(folder)  # which may lie in one of the superuser alone, as TMPDIR says
        except OSError:
            continue
        finally:
            os.seteuid(0)
        os.chown(folder, user, user)
        os.setgroups([])
        os.setgid(user)  # of the superuser: the real, the effective and the saved one
        os.setuid(user)
        return True
    return False


def _limit(limits: dict[str, float]) -> None:
    for name, value in (
        ("RLIMIT_AS", limits["memory"]),
        ("RLIMIT_CPU", max(limits["seconds"], 1)),
        ("RLIMIT_FSIZE", limits["file_bytes"]),
        ("RLIMIT_NOFILE", limits["open_files"]),
        ("RLIMIT_NPROC", limits["processes"] + 2),  # those that wait for the program
        ("RLIMIT_CORE", 0),
        ("RLIMIT_MSGQUEUE", 0),
    ):
        which = getattr(resource, name, None)
        if which is None:
            continue
        try:
            resource.setrlimit(which, (int(value), int(value) + (name == "RLIMIT_CPU")))  # SIGXCPU, then SIGKILL
        except (OSError, ValueError):  # macOS knows the limit of memory and does not take it
            if sys.platform == "linux":
                raise
