"""Files that are there whole or not at all, and errors of the disk that say which file they are of."""

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
    """A file to write into, which takes the place of `path` when the block ends: open for bytes, or for UTF-8 text.

    It is written under another name in the same folder, made where there is none, flushed to the disk and renamed.
    Whoever reads `path` meets the old content or the new, never a part; a full disk leaves the old one.
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
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def named(path):
    """Around what writes to `path`, a file or a folder: an OSError of a write does not know its file, and learns it.

    torch's writer makes a RuntimeError of it, which becomes an OSError again.
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
    """The file `path`, made where there is none, for this process alone; open for appending bytes and for reading.

    UserError(taken) where another process has it. The system gives it free when the file is closed or the process
    ends, in whatever way. A record lock, not flock: worker processes would inherit that one and hold it for a second
    after a kill.
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
