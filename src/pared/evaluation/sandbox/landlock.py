"""Landlock: what a process and its children may read, write and signal, taken away without any privilege."""

import os
import struct
from collections.abc import Iterable
from typing import Any

CREATE, ADD, RESTRICT = 444, 445, 446
READS = 0x1 | 0x4 | 0x8  # executing, reading files and folders
WRITES = 0x3FF2 | 0x4000  # every right of files that changes something, up to truncating
OF_FILES = 0x1 | 0x2 | 0x4 | 0x4000  # those that a file, no folder, can have
SCOPES = 0b11  # abstract sockets and signals


def restrict(libc: Any, read: Iterable[str], written: Iterable[str]) -> bool:
    """Let this process and its children read and write beneath these paths alone, and signal no process outside.

    Args:
        libc: the C library.
        read: paths that are read and executed.
        written: paths that are also changed.

    Returns:
        Whether the kernel has what it takes; no new privileges may be gained from then on.
    """
    version = libc.syscall(CREATE, None, 0, 1)
    if version < 3:  # truncating could not be kept from files outside
        return False
    attributes = struct.pack("QQQ", READS | WRITES, 0, SCOPES if version >= 6 else 0)
    attributes = attributes[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = libc.syscall(CREATE, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        rules = [(path, READS) for path in read] + [(path, READS | WRITES) for path in written]
        return all(_allow(libc, ruleset, path, rights) for path, rights in rules) and (
            libc.syscall(RESTRICT, ruleset, 0) == 0
        )
    finally:
        os.close(ruleset)


def _allow(libc: Any, ruleset: int, path: str, rights: int) -> bool:
    place = os.open(path, os.O_PATH)
    try:
        rights &= ~0 if os.path.isdir(path) else OF_FILES
        return bool(libc.syscall(ADD, ruleset, 1, struct.pack("=Qi", rights, place), 0) == 0)
    finally:
        os.close(place)
