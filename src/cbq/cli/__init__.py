"""The command line, the only package that imports hydra.

Exit codes: 0 done, 2 the user's mistake (one line), 1 a fault of ours (a traceback, and `error.txt` in the run folder).
"""

from cbq.cli.options import conf_dir, flatten
from cbq.cli.program import main

__all__ = ["conf_dir", "flatten", "main"]
