"""Moves finished files to where the user wants them: whole or not at all; over other files only with --overwrite."""

import filecmp
import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def stage_beside(out: Path):
    """A new folder beside `out`, on the same file system. It is deleted at the end unless it was renamed to `out`."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    except OSError as error:
        raise ValueError(f"cannot write to {out.parent}: {error.strerror}") from None
    try:
        stage.chmod(0o755)  # mkdtemp makes a folder that other users cannot read
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def check_folder(out: Path, names) -> None:
    """ValueError if `out` is something that an export of files called `names` must not replace."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file; this format is a folder")
    foreign = sorted(path.name for path in out.iterdir() if path.name not in names) if out.exists() else []
    if foreign:
        raise ValueError(f"--out {out} holds {foreign[0]}, which no export writes; give another folder")


def publish_folder(stage: Path, out: Path, overwrite: bool) -> None:
    """Renames `stage` to `out`. A folder of other content is kept unless `overwrite`."""
    for path in stage.iterdir():
        _settle(path)
    if not out.exists():
        os.rename(stage, out)
        return
    names, there = ({path.name for path in folder.iterdir()} for folder in (stage, out))
    if names == there and filecmp.cmpfiles(stage, out, names, shallow=False)[0] == list(names):
        return
    if there and not overwrite:
        raise ValueError(f"--out {out} holds another export, which was kept; --overwrite replaces it")
    # rename cannot replace a folder that holds files. So the old one is moved away first; leaving the block deletes it.
    with stage_beside(out) as aside:
        try:
            os.rename(out, aside / "old")
            os.rename(stage, out)
        except BaseException:  # Ctrl-C too: put the old folder back
            if not out.exists():
                os.rename(aside / "old", out)
            raise


def publish_files(stage: Path, folder: Path, overwrite: bool) -> None:
    """Moves the files of `stage` into `folder`; where one is there with other content, none unless `overwrite`."""
    files = sorted(stage.iterdir())
    for path in files:  # all are checked before the first is moved
        _settle(path)
        there = folder / path.name
        if there.exists() and not overwrite and not filecmp.cmp(path, there, shallow=False):
            raise ValueError(f"{there} is there with other content and was kept; --overwrite replaces it")
    for path in files:
        os.replace(path, folder / path.name)


def _settle(path: Path) -> None:
    """Flushes a file to the disk, so that a crash after the renaming does not leave an empty one, and makes it readable
    by all: servers run as other users, and safetensors writes for the owner alone."""
    path.chmod(0o644)
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
