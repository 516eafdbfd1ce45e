"""The one exception that means: the user's input was wrong; and the checks of input that several modules make."""

import math
from pathlib import Path


class InputError(ValueError):
    """A mistake in what the user gave: one line that says what was wrong and what is allowed.

    `cbq.cli` prints it without a traceback and exits with code 2. Everything else that is raised is a fault of ours.
    """


def one_line(error: BaseException, most: int = 300) -> str:
    """Return an error's message without line breaks, and what does not print in a terminal escaped.

    Args:
        error: what was raised.
        most: characters; the rest is left out.

    Example:
        >>> one_line(ValueError("not found:\\n  see \\x1b[31m"))
        'not found: see \\\\x1b[31m'
    """
    text = " ".join(str(error).split()) or type(error).__name__
    text = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return text if len(text) <= most else f"{text[:most]}..."


def check_flag(key: str, value: bool) -> None:
    """Refuse anything but true and false: a text such as `no` would count as true.

    Raises:
        InputError: it is neither.
    """
    if not isinstance(value, bool):
        raise InputError(f"{key} must be true or false, got {value!r}")


def check_text(key: str, value: str | None, optional: bool = False) -> None:
    """Refuse what is no text, or an empty one.

    Raises:
        InputError: it is not, and not an allowed null either.
    """
    if value is None and optional:
        return
    if not isinstance(value, str) or not value:
        raise InputError(f"{key} must be a text{' or null' if optional else ''}, got {value!r}")


def check_number(key: str, value: float, least: float = 0) -> None:
    """Refuse what is no finite number of at least `least`.

    Raises:
        InputError: it is not.

    Example:
        >>> check_number("preprocess.lambda1", 1.5)
        >>> check_number("preprocess.lambda1", float("nan"))
        Traceback (most recent call last):
        cbq.errors.InputError: preprocess.lambda1 must be a number of at least 0, got nan
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value < math.inf:
        raise InputError(f"{key} must be a number of at least {least}, got {value!r}")


def check_seed(key: str, value: int) -> None:
    """Refuse what does not seed torch and numpy.

    Raises:
        InputError: it is no integer of 0 to 2^32 - 1.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**32:
        raise InputError(f"{key} must be an integer of 0 to 2^32 - 1, got {value!r}")


def expanded(path: str | Path) -> Path:
    """Return a path with the home folder for `~`, or as it is where there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def is_folder(path: Path) -> bool:
    """Return whether there is such a folder; a name that no file system takes is none."""
    try:
        return path.is_dir()
    except OSError:
        return False
