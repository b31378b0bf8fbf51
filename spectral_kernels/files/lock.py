"""One writer a folder: a lock that ends with the process that holds it, however that ends."""

import errno
import os
import socket
import stat
import sys
import threading
import warnings
import weakref
from pathlib import Path

from spectral_kernels.files.reading import shown

NAME = ".lock"


class FolderInUse(OSError):
    """Another process writes to the folder; the message says which."""


class FolderLock:
    """Held for as long as this object is referred to. One process may hold it several times over: see `hold`."""

    def __init__(self, folder: Path, wait: bool) -> None:
        self.folder = folder
        handle = os.open(folder / NAME, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            os.close(handle)
            raise OSError(errno.EINVAL, "is no file", shown(folder / NAME))
        self._release = weakref.finalize(self, _release, handle, os.getpid())
        self._release.atexit = False  # the system does it then
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = os.pread(handle, 500, 0).decode("utf-8", "replace").strip() or "another process"
            raise FolderInUse(
                errno.EAGAIN, f"is in use by {shown(owner)}; wait for it, or write to another folder", shown(folder)
            ) from None
        except (ModuleNotFoundError, OSError) as error:
            warnings.warn(f"{shown(folder)} cannot be locked against other processes: {error}", stacklevel=3)
        command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])[:300]
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}: {command}\n".encode(errors="replace"), 0)


_one_at_a_time = threading.Lock()
_held: weakref.WeakValueDictionary[Path, FolderLock] = weakref.WeakValueDictionary()


def hold(folder: Path, *, wait: bool = False) -> FolderLock:
    """Make the folder and lock it; keep the result for as long as you write there.

    Args:
        wait: for the process that holds it, instead of refusing.

    Raises:
        FolderInUse: another process holds it. OSError: the folder cannot be made or written to.
    """
    folder.mkdir(parents=True, exist_ok=True)
    key = folder.resolve()
    with _one_at_a_time:
        lock = _held.get(key)
        if lock is None:
            lock = _held[key] = FolderLock(key, wait)
    return lock


def _release(handle: int, owner: int) -> None:
    # a child that was forked shares the lock, which is not its own to end
    if os.getpid() == owner:
        try:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_UN)
        except (ModuleNotFoundError, OSError):
            pass  # there was none to be had
    os.close(handle)
