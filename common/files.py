"""Files that are written whole or not at all, locks, and errors of the disk that name their file."""

import os
import sys
from contextlib import contextmanager
from pathlib import Path

from common.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None


@contextmanager
def replaced(path, text: bool = False):
    """Opens a temporary file, for bytes or for UTF-8 text, that replaces `path` when the block ends.

    Readers see the old file or the new one, never a partial one, and a full disk or an error in the block leaves the
    old one. The temporary file is in the same folder (made where there is none), since a rename is atomic only within
    one disk.
    """
    path = Path(path)
    mode = {"mode": "w", "encoding": "utf-8", "newline": "\n"} if text else {"mode": "wb"}
    with named(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with open(temporary, **mode) as file:
                yield file
                file.flush()
                os.fsync(file.fileno())  # before the rename: after a power cut the new name must not be an empty file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def named(path):
    """A context for writing to `path`, a file or a folder. An OSError of a failed write does not say which file: here
    the path is added to it. torch's writer turns the OSError into a RuntimeError; this is undone.
    """
    try:
        yield
    except (OSError, RuntimeError) as error:
        fault = error
        while fault is not None and not isinstance(fault, OSError):
            fault = fault.__context__
        if fault is None or fault.errno is None or fault.filename is not None:
            raise
        raise OSError(fault.errno, fault.strerror, str(path)) from None


def lock(path, taken: str):
    """Opens `path` (made where there is none) for appending and reading bytes, and locks it for this process.

    UserError(taken) where another process holds the lock. The system releases it when the file is closed or the
    process ends, also by a kill. It is a record lock, not flock: worker processes would inherit a flock and hold it
    for a second after the kill.
    """
    try:
        file = open(path, "ab+")
    except PermissionError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    file.seek(0)
    try:
        if fcntl is not None:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        else:
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))  # unless its owner has just deleted it
    except (BlockingIOError, PermissionError, FileNotFoundError):
        ours = False
    except OSError as error:  # of a network disk
        print(f"{path} cannot be locked ({error.strerror}): start no second run there", file=sys.stderr)
        ours = True
    if not ours:
        file.close()
        raise UserError(taken)
    return file
