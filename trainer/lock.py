"""One process at a time writes the same files."""

import os
import sys

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

from trainer.cli import UserError


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
