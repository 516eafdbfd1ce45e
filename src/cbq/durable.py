"""Files that are there whole or not at all, also after a kill or a power cut."""

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Full, over quota, read-only, over the largest file that is allowed.
DISK_FAULTS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield another name to write to; what is there at the end takes the place of `path` in one step.

    After an error `path` is what it was, and the other name is gone.

    Args:
        path: its folder must exist.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        yield temporary
        sync(temporary)  # the content before the name, or a power cut leaves an empty file under it
        os.replace(temporary, path)
        sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text in one piece: a reader, or a crash, sees the old file or the new one."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def sync(path: Path) -> None:
    """Wait until a file, or what a folder says of its files, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some file systems cannot wait for folders
            raise
    finally:
        os.close(descriptor)


def disk_fault(error: BaseException) -> str | None:
    """Return what is wrong with the disk, as the system says it, or None if it is something else.

    Args:
        error: what was raised while a file was written; also by libraries in Rust, whose errors have no `errno`.

    Example:
        >>> disk_fault(OSError(errno.ENOSPC, "No space left on device", "outputs/metrics.csv"))
        'No space left on device: outputs/metrics.csv'
        >>> disk_fault(Exception("I/O error: No space left on device (os error 28)"))
        'No space left on device'
        >>> disk_fault(FileNotFoundError(errno.ENOENT, "No such file or directory", "text.txt"))
    """
    number, name = getattr(error, "errno", None), getattr(error, "filename", None)
    if number is None and (found := re.search(r"\(os error (\d+)\)", str(error))):
        number = int(found[1])
    if number not in DISK_FAULTS:
        return None
    return f"{os.strerror(number)}{f': {name}' if name else ''}"
