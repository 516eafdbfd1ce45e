"""Print a Markdown table of finished runs: one row a configuration, mean and range over seeds.

python scripts/summarize_runs.py multirun/2026-11-22/02-00-00-000000 --by quant rounding cbd.window
"""

import argparse
import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean


def spread(values: list[float]) -> str:
    """Return the mean, and the range where there is more than one value.

    Example:
        >>> spread([2.0, 4.0])
        '3.00 (2.00-4.00)'
    """
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def read_runs(folders: list[Path], keys: list[str]) -> dict[tuple[str, ...], list[dict]]:
    """Return the finished runs with a perplexity, by their values of `keys` in the settings of results.json."""
    runs = defaultdict(list)
    for folder in folders:
        for path in sorted(folder.rglob("results.json")):
            results = json.loads(path.read_text(encoding="utf-8"))
            if results["status"] != "finished" or not results["perplexity"]:
                continue
            row = tuple(str(results["settings"].get(key)) for key in keys)
            if any(other["seed"] == results["seed"] for other in runs[row]):
                sys.exit(f"{path}: a second run of seed {results['seed']} with {row}; give more keys by --by")
            runs[row].append(results)
    return runs


def main() -> None:
    """Read every results.json below the folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--by", nargs="+", default=["model", "quant", "preprocess", "rounding", "reconstruction"])
    args = parser.parse_args()
    runs = read_runs(args.folders, args.by)
    columns = [*args.by, "seeds", "full precision", "round-to-nearest", "quantized", "changed integers", "guard"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for key, group in sorted(runs.items()):
        corpus = next(iter(group[0]["perplexity"]))
        values = {
            state: [run["perplexity"][corpus][state] for run in group] for state in group[0]["perplexity"][corpus]
        }
        windows = [window for run in group for window in run["windows"]]
        changed = [window["changed_integers"] for window in windows]
        cells = [*key, str(len(group))]
        cells += [spread(values["full_precision"][:1]), spread(values["rtn"][:1]), spread(values["quantized"])]
        cells += [f"{min(changed):.2%}-{max(changed):.2%}", str(sum(bool(window["guard"]) for window in windows))]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
