"""Reads the file of an offline W&B run without a server.

The file is 7 bytes of magic, then a LevelDB log: blocks of 32 KiB that hold fragments (checksum, length, kind, bytes),
where a fragment never crosses a block and a record may take several; each record is a protobuf `Record`.
"""

import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from wandb.proto.wandb_internal_pb2 import Record

MAGIC_BYTES = 7
BLOCK_BYTES = 32 * 1024
FRAGMENT_HEADER = struct.Struct("<IHB")  # checksum, length, kind
WHOLE, FIRST, MIDDLE, LAST = 1, 2, 3, 4


@dataclass
class WandbRun:
    """What an offline run recorded; W&B's own entries, named with a leading underscore, are left out."""

    id: str = ""
    name: str = ""
    project: str = ""
    group: str = ""
    tags: list[str] = field(default_factory=list)
    config: dict = field(default_factory=dict)
    rows: list[dict[str, float]] = field(default_factory=list)
    summary: dict[str, float] = field(default_factory=dict)
    x_axes: dict[str, str] = field(default_factory=dict)  # metric or pattern -> the metric on its x axis
    exit_code: int | None = None


def read_wandb_run(folder: Path, patience_seconds: float = 20.0) -> WandbRun:
    """Read the only offline run below `<folder>/wandb`.

    Args:
        folder: A run folder.
        patience_seconds: How long to wait for the end of the run in the file: wandb's service writes it in the
            background, up to some time after `finish` has returned but before the process ends.
    """
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    deadline = time.monotonic() + patience_seconds
    while (run := _read(path)).exit_code is None:
        assert time.monotonic() < deadline, f"{path} has no end"
        time.sleep(0.05)
    return run


def _read(path: Path) -> WandbRun:
    run = WandbRun()
    for record in _records(path.read_bytes()):
        match record.WhichOneof("record_type"):
            case "run":
                run.name, run.project, run.group = record.run.display_name, record.run.project, record.run.run_group
                run.id = record.run.run_id
                run.tags = list(record.run.tags)
                run.config |= _values(record.run.config.update)
            case "history":
                run.rows.append(_values(record.history.item))
            case "summary":
                run.summary |= _values(record.summary.update)
            case "metric":
                metric = record.metric
                run.x_axes[metric.name or metric.glob_name] = metric.step_metric
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _records(data: bytes) -> Iterator[Record]:
    assert data[:4] == b":W&B", f"not a W&B file: {data[:4]!r}"
    position, content = MAGIC_BYTES, b""
    while position + FRAGMENT_HEADER.size <= len(data):
        left_in_block = BLOCK_BYTES - position % BLOCK_BYTES
        if left_in_block < FRAGMENT_HEADER.size:  # too small for a fragment: padding
            position += left_in_block
            continue
        _, length, kind = FRAGMENT_HEADER.unpack_from(data, position)
        position += FRAGMENT_HEADER.size
        fragment = data[position : position + length]
        if len(fragment) < length:  # still being written
            return
        position += length
        content = fragment if kind in (WHOLE, FIRST) else content + fragment
        if kind in (WHOLE, LAST):
            yield Record.FromString(content)


def _values(items) -> dict:
    named = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
    return {name: value for name, value in named.items() if not name.startswith("_")}
