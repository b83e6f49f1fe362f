"""One writer an output: a lock file beside it, which the system unlocks when its process ends, however it ends.

The file goes with the lock, also when a command is interrupted (`remove_held`); what a kill leaves is taken over and
removed by the next command that writes the output. A name may be removed while its lock is held, and only then: who
opened the file before sees, once it has the lock, that the name is gone or another file's, and opens it anew. Windows
removes no file that is open, and keeps it.
"""

import os
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from dynquant.errors import WriteError, reason


class _Lock(NamedTuple):
    file: Path
    descriptor: int
    new: list[Path]
    """Folders that were made for it, from the innermost on."""


_held: dict[Path, _Lock] = {}
"""Outputs of this process, which may lock one again within."""
_removing = threading.Lock()
"""Held by whoever removes a lock, so that nobody does so after the descriptor is closed."""
_WAIT_SECONDS = 0.2
_OWNER_BYTES = 4096


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Context manager: no other process writes `output`, a file or a directory that need not be there yet.

    The lock is `.NAME.lock` beside it, or `.lock` in a directory with a parent that cannot be written to. One that a
    killed process left is taken over. File systems without locks have none.

    Raises:
        WriteError: another process holds the lock; something else has its name; or nothing can be written there.
    """
    path = output.resolve() if os.path.isdir(output) else output.parent.resolve() / output.name
    if path in _held:
        yield
        return
    new = [folder for folder in path.parents if not os.path.exists(folder)]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file, descriptor = _acquired(path)
    except BlockingIOError as error:
        raise WriteError(
            f"{output} is being written by {error}. Wait until that has finished, stop it, or give another output."
        ) from error
    except OSError as error:
        _remove_empty(new)
        raise WriteError(
            f"{output} cannot be written: {reason(error)}. Choose a place with space that can be written to."
        ) from error
    _held[path] = lock = _Lock(file, descriptor, new)
    try:
        yield
    finally:
        with _removing:
            _remove(lock)
            os.close(lock.descriptor)
            del _held[path]


def remove_held() -> None:
    """Remove the files of all locks of this process, which ends at once and holds the locks until then."""
    if _removing.acquire(timeout=_WAIT_SECONDS):  # for ever: a thread that is still unwinding waits for the end
        for lock in [*_held.values()][::-1]:
            _remove(lock)


def _remove(lock: _Lock) -> None:
    """Remove the file of a lock that is held, unless the name is another file's, and folders that nothing filled."""
    with suppress(OSError):
        if os.path.samestat(os.fstat(lock.descriptor), os.stat(lock.file, follow_symlinks=False)):
            lock.file.unlink()
    _remove_empty(lock.new)


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders that nothing filled."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()


def _acquired(path: Path) -> tuple[Path, int]:
    """Return the lock file and its descriptor; BlockingIOError names the process that holds it."""
    file = path.with_name(f".{path.name}.lock") if path.name else path / ".lock"
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    while True:
        try:
            descriptor = os.open(file, flags, 0o666)
        except OSError:
            if not path.is_dir() or file.parent == path:
                raise
            file = path / ".lock"
            continue
        try:
            _lock(descriptor)
            if os.path.samestat(os.fstat(descriptor), os.stat(file)):
                if not is_lock(file):
                    raise WriteError(
                        f"{file} is in the way: {path} is locked by a file of this name, and it holds something else, "
                        "which would be lost. Move it, or give another name for the output."
                    )
                os.ftruncate(descriptor, 0)
                os.write(descriptor, _this_process().encode())
                return file, descriptor
        except FileNotFoundError:  # its holder has finished, and has removed it
            pass
        except BlockingIOError as error:
            os.lseek(descriptor, 0, os.SEEK_SET)
            owner = os.read(descriptor, _OWNER_BYTES).decode(errors="replace")
            os.close(descriptor)
            raise BlockingIOError(owner or "another process") from error
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def is_lock(file: Path) -> bool:
    """Return whether a file is a lock, or empty."""
    with file.open("rb") as opened:
        start = opened.read(_OWNER_BYTES)
    return not start or re.match(rb"process \d+ on ", start) is not None


def _this_process() -> str:
    import socket

    return f"process {os.getpid()} on {socket.gethostname()}, which started at {time.strftime('%Y-%m-%d %H:%M:%S')}"


def _lock(descriptor: int) -> None:
    """Lock a file without waiting. Raises BlockingIOError: another process has it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        os.lseek(descriptor, 1 << 30, os.SEEK_SET)  # far behind the text, which stays readable
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except OSError as error:
            raise BlockingIOError from error
        finally:
            os.lseek(descriptor, 0, os.SEEK_SET)
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        import errno

        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP):
            raise
