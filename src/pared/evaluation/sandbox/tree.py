"""Folders that a program left: however deep, and whatever their permissions say. Standard library only."""

import contextlib
import os

FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
LOOKED_AT = 20_000  # entries; a folder of more is full


def remove_tree(path: str) -> bool:
    """Remove a folder and return whether it is gone; never raises.

    It goes down and up one folder at a time, so that no path is long, nothing recurses and one folder is open.
    """
    try:
        os.chmod(path, 0o700)
        root = os.open(path, FLAGS)
    except OSError:
        return not os.path.lexists(path)
    try:
        _empty(root)
    finally:
        os.close(root)
    try:
        os.rmdir(path)
    except OSError:
        return False
    return True


def _empty(root: int) -> None:
    place, above, waiting = os.dup(root), list[str](), [_unlinked(root)]
    while waiting:
        if waiting[-1]:
            name = waiting[-1].pop()
            try:
                os.chmod(name, 0o700, dir_fd=place)
                below = os.open(name, FLAGS, dir_fd=place)
            except OSError:
                continue
            os.close(place)
            place = below
            above.append(name)
            waiting.append(_unlinked(place))
            continue
        waiting.pop()
        if above:
            up = os.open("..", FLAGS, dir_fd=place)
            os.close(place)
            place = up
            with contextlib.suppress(OSError):
                os.rmdir(above.pop(), dir_fd=place)
    os.close(place)


def _unlinked(place: int) -> list[str]:
    """Remove the files of a folder and return the names of the folders in it."""
    folders = []
    for entry in os.listdir(place):
        try:
            os.unlink(entry, dir_fd=place)
        except OSError:
            folders.append(entry)
    return folders


def used_bytes(path: str, most: float) -> float:
    """Return the bytes on the disk of the files beneath a folder; infinite where they cannot be counted.

    Args:
        path: of the folder; infinite is one of very many entries, and one that hides some.
        most: bytes at which counting stops.
    """
    found, count, waiting = 0, 0, [path]
    while waiting and found <= most:
        try:
            with os.scandir(waiting.pop()) as entries:
                for entry in entries:
                    count += 1
                    found += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)
                    if count > LOOKED_AT:
                        return float("inf")
        except FileNotFoundError:  # gone by now
            continue
        except OSError:  # not to be read, or its path is too long
            return float("inf")
    return found
