"""Errors in one line and exit codes: what every program does with its mistakes and its failures."""

import contextlib
import errno
import os
import re
import sys
from pathlib import Path

DISK_FAULTS = (  # full, over a limit, broken, gone
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE,
)  # fmt: skip
WRONG_PATHS = (errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


class UserError(Exception):
    """A mistake of the user: the message is one line that says what, where and what to do. Exit code 2."""


class RunFailed(Exception):
    """A failure that is not the user's (NaN, full disk, lost process). One line, exit code 1."""


@contextlib.contextmanager
def user_errors():
    """A ValueError of model/ or inference/, which is worded for the user, becomes a UserError."""
    try:
        yield
    except ValueError as error:
        raise UserError(str(error)) from None


def out_of_memory(error: BaseException) -> str | None:
    """The message for an error of running out of memory; None for any other error.

    Only CUDA's has a class of its own, so the others are known by their text.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and "out of memory" not in text and "can't allocate memory" not in text:
        return None
    if (wanted := re.search(r"tried to allocate ([\d.]+) (\w+)", text, re.IGNORECASE)) is None:
        return "out of memory"
    amount = f"{int(wanted[1]) / 2**30:.2f} GiB" if wanted[2] == "bytes" else f"{wanted[1]} {wanted[2]}"
    return f"out of memory ({amount} more were wanted)"


def disk_fault(error: BaseException) -> str | None:
    """The message for an error of the disk, with the file and where its disk is mounted; None for any other error."""
    if not isinstance(error, OSError) or error.errno not in DISK_FAULTS:
        return None
    if error.filename is None:
        return error.strerror
    place = Path(error.filename).absolute().parent
    while not os.path.ismount(place):
        place = place.parent
    return f"{error.filename}: {error.strerror} (the disk at {place})"


def note(text: str) -> None:
    """Prints something worth knowing, once, however many processes a launcher started."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(f"NOTE: {text}", flush=True)


def run_main(main, argv=None) -> None:
    """Runs a program's main(argv) and turns its errors into one line and an exit code."""
    try:
        main(argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunFailed as error:
        print(f"failed: {error}", file=sys.stderr)
        sys.exit(1)
    except (RuntimeError, MemoryError) as error:
        if (words := out_of_memory(error)) is None:
            raise
        print(f"failed: {words}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:  # the reader of our output, such as `head`, has gone
        sys.stderr.close()
        sys.exit(0)
    except OSError as error:
        if (words := disk_fault(error)) is not None:
            print(f"failed: {words}; see to it and give the same command again", file=sys.stderr)
            sys.exit(1)
        if error.errno in WRONG_PATHS and error.filename is not None:
            print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
            sys.exit(2)
        raise
    except KeyboardInterrupt:  # while data are read; during training the loop saves first
        print("stopped", file=sys.stderr)
        sys.exit(130)
