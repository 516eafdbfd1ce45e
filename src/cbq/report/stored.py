"""What a run left in its folder, as far as it can be read: it may have been killed while it wrote."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cbq.errors import one_line


class StoredFiles:
    """Reads files of a run.

    Args:
        folder: of the run.

    Attributes:
        unreadable: a sentence for each file that is there and cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.unreadable: list[str] = []

    def table(self, name: str, *keys: str) -> pd.DataFrame:
        """Return a CSV file of numbers, without rows where there is none, or none that can be read.

        Args:
            name: of the file.
            keys: columns that every row has; a row without, such as half a line, is left out.
        """
        path = self.folder / name
        if not path.is_file() or not path.stat().st_size:
            return pd.DataFrame()
        try:
            frame = pd.read_csv(path, on_bad_lines="skip").apply(pd.to_numeric, errors="coerce")
            return frame.replace([np.inf, -np.inf], np.nan).dropna(subset=list(keys)).astype(dict.fromkeys(keys, int))
        except KeyError:
            self._leave_out(name, f"it has no column {' or '.join(keys)}")
        except (ValueError, OSError) as error:
            self._leave_out(name, one_line(error))
        return pd.DataFrame()

    def json(self, name: str) -> dict[str, Any]:
        """Return a JSON file, an empty object where there is none, or none that can be read."""
        path = self.folder / name
        try:
            found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        except (ValueError, OSError) as error:
            self._leave_out(name, one_line(error))
            return {}
        if not isinstance(found, dict):
            self._leave_out(name, "it holds no object")
            return {}
        return found

    def _leave_out(self, name: str, reason: str) -> None:
        self.unreadable.append(f"{name} cannot be read and is left out: {reason}")
