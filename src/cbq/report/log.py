"""The log of a run: what the terminal shows, and warnings, with time and level."""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from cbq.errors import InputError

LOGGER = logging.getLogger("cbq")
VERBOSITIES = ("quiet", "normal", "verbose")
WIDTH = 200  # characters of a line
FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"


class LoggedConsole(Console):
    """A console whose lines are logged too.

    Args:
        verbosity: what the terminal shows of them: `quiet` nothing, `normal`, `verbose` a line an epoch too.

    Raises:
        InputError: it is none of the three.
    """

    def __init__(self, verbosity: str = "normal") -> None:
        if verbosity not in VERBOSITIES:
            raise InputError(f"verbosity must be one of {', '.join(VERBOSITIES)}, got {verbosity!r}")
        super().__init__(highlight=False, quiet=verbosity == "quiet")
        self.every_epoch = verbosity == "verbose"

    def print(self, *objects: object, **options: object) -> None:
        """Print, and log the same without colours."""
        super().print(*objects, **options)
        plain = Console(file=io.StringIO(), width=WIDTH, highlight=False)
        plain.print(*objects, **options)
        for line in plain.file.getvalue().splitlines():
            if line.strip():
                LOGGER.info(line.rstrip())

    def say(self, line: str) -> None:
        """Print one line that the terminal may break where it ends."""
        self.print(line, soft_wrap=True)


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Append to a file what is logged inside: of cbq from INFO on, of others warnings; and Python's warnings.

    A file that cannot be written to changes nothing else.
    """
    root, level, show = logging.getLogger(), LOGGER.level, warnings.showwarning
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(logging.Formatter(FORMAT))
    handler.handleError = lambda record: None  # such as a full disk

    def show_and_log(message: object, category: type, *args: object, **kwargs: object) -> None:
        show(message, category, *args, **kwargs)
        logging.getLogger("warnings").warning("%s: %s", category.__name__, message)

    # With no handler at all Python prints warnings itself: it goes on to.
    added = [handler] if root.handlers else [handler, logging.lastResort]
    for each in added:
        root.addHandler(each)
    LOGGER.setLevel(logging.INFO)
    warnings.showwarning = show_and_log
    try:
        yield
    finally:
        warnings.showwarning = show
        LOGGER.setLevel(level)
        for each in added:
            root.removeHandler(each)
        handler.close()
