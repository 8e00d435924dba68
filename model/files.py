"""Files that are there whole or not at all, and errors of the disk that say which file they are of."""

import os
from contextlib import contextmanager
from pathlib import Path


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
