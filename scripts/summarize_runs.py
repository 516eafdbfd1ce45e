"""Print a Markdown table of finished runs: one row a configuration, mean and range over seeds.

python scripts/summarize_runs.py multirun/2026-11-22/02-00-00 --by quant.weight_bits quant.act_bits method rounding
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import yaml


def describe(folder: Path, keys: list[str]) -> tuple[str, ...]:
    """Return a run's values of `keys`, dotted names of its config.yaml; a group is named by its class."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    values = []
    for key in keys:
        node = config
        for part in key.split("."):
            node = node[part]
        values.append(str(node["_target_"].rpartition(".")[2] if isinstance(node, dict) else node))
    return tuple(values)


def spread(values: list[float]) -> str:
    """Return the mean, and the range where there is more than one value.

    Example:
        >>> spread([2.0, 4.0])
        '3.00 (2.00-4.00)'
    """
    mean = f"{fmean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} ({min(values):.2f}-{max(values):.2f})"


def main() -> None:
    """Read every results.json below the folders and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--by", nargs="+", default=["quant.weight_bits", "quant.act_bits", "rounding"])
    args = parser.parse_args()
    runs = defaultdict(list)
    for folder in args.folders:
        for path in sorted(folder.rglob("results.json")):
            results = json.loads(path.read_text(encoding="utf-8"))
            if results["status"] == "finished":
                runs[describe(path.parent, args.by)].append(results)
    columns = [*args.by, "seeds", "full precision", "round-to-nearest", "quantized", "changed integers", "seconds"]
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for key, group in sorted(runs.items()):
        corpus = next(iter(group[0]["perplexity"]))
        values = {
            state: [run["perplexity"][corpus][state] for run in group] for state in group[0]["perplexity"][corpus]
        }
        changed = [window["changed_integers"] for run in group for window in run["windows"]]
        cells = [*key, str(len({run["seed"] for run in group}))]
        cells += [spread(values["full_precision"][:1]), spread(values["rtn"][:1]), spread(values["quantized"])]
        cells += [f"{min(changed):.1%}-{max(changed):.1%}"]
        cells += [f"{fmean(run['cost']['wall_time_seconds'] for run in group):.0f}"]
        print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
