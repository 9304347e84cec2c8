# SPDX-License-Identifier: Apache-2.0
"""Files that are there whole or not at all."""

import errno
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from tutelage.core.error import UserError


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file under a temporary name, sync it, then rename it: a reader sees all of it or nothing.

    Raises:
        UserError: if the disk is full or the folder cannot be written; nothing is left behind, and the file
            that was there before is untouched.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.chmod(0o666 & ~_umask())  # some writers make files that only their owner may read
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise unwritten(path, error) from error


def unwritten(path: Path, error: Exception) -> UserError:
    """Return the line that says why a file could not be written."""
    reason = getattr(error, "strerror", None) or str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in reason:
        reason = "the disk is full; make room, then give the same command again"
    return UserError(f"could not write {path}: {reason}")


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""

    def write(partial: Path) -> None:
        partial.write_text(text, encoding="utf-8")

    write_whole(path, write)


def _umask() -> int:
    """Return the process's mask of file permissions; it can only be read by setting it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
