import copy
import json
import os
import re
import subprocess

import jsonschema
import pytest
import torch

import cbq
from cbq.errors import InputError
from cbq.results import SCHEMA_PATH, environment, read_results, write_results

FINISHED = {
    "format_version": 1,
    "status": "finished",
    "model": "pico",
    "scheme": "W4A4",
    "method": "cbq",
    "seed": 0,
    "settings": {"quant.weight_bits": 4, "cbd.window": 2, "quant.group_size": None, "evaluation.corpora": ["c4"]},
    "protocol": {
        "embedded": {"segment_tokens": 512, "num_tokens": 4096, "text_sha256": "0" * 64},
        "calibration": {"name": "embedded", "num_segments": 16, "segment_tokens": 512, "sha256": "f" * 64},
    },
    "perplexity": {"embedded": {"full_precision": 5.5, "rtn": 1e4, "quantized": 7.0}},
    "zero_shot": {},
    "agreement": {},
    "windows": [
        {
            "start": 0,
            "stop": 2,
            "rec_loss_first": 0.5,
            "rec_loss_last": 0.25,
            "rec_loss_rtn": 0.5,
            "changed_integers": 0.125,
            "guard": None,
            "wall_time_seconds": 3.5,
        }
    ],
    "effective_bits": 4.0,
    "cost": {
        "wall_time_seconds": 60.0,
        "reconstruction_seconds": 40.0,
        "evaluation_seconds": 10.0,
        "peak_host_memory_gib": 1.5,
        "peak_device_memory_gib": None,
        "calibration_tokens": 8192,
    },
    "environment": environment("cpu"),
}
RUNNING = {
    key: value
    for key, value in FINISHED.items()
    if key in ("format_version", "model", "scheme", "method", "seed", "settings", "environment")
} | {"status": "running"}
FAILED = RUNNING | {"status": "failed", "error": "the loss is not finite"}

schema = json.loads(SCHEMA_PATH.read_text(encoding="utf-8"))
validator = jsonschema.Draft202012Validator(schema)


def changed(results: dict, path: str, value) -> dict:
    """Return a copy with the value at a dotted path replaced, or the key removed for `...`."""
    results = copy.deepcopy(results)
    *parents, last = path.split(".")
    place = results
    for key in parents:
        place = place[int(key)] if isinstance(place, list) else place[key]
    if value is ...:
        del place[last]
    else:
        place[last] = value
    return results


def test_schema_is_a_schema():
    jsonschema.Draft202012Validator.check_schema(schema)


@pytest.mark.parametrize("results", [FINISHED, RUNNING, FAILED], ids=lambda results: results["status"])
def test_schema_accepts(results, tmp_path):
    write_results(tmp_path, results)
    validator.validate(read_results(tmp_path))


@pytest.mark.parametrize(
    ("results", "path", "value"),
    [
        *[(FINISHED, key, ...) for key in FINISHED],
        *[(FINISHED, f"cost.{key}", ...) for key in FINISHED["cost"]],
        *[(FINISHED, f"windows.0.{key}", ...) for key in FINISHED["windows"][0]],
        *[(FINISHED, f"environment.{key}", ...) for key in FINISHED["environment"]],
        *[(RUNNING, key, ...) for key in RUNNING],
        (FAILED, "error", ...),
        (FAILED, "error", "two\nlines"),
        (FINISHED, "format_version", 2),
        (FINISHED, "status", "done"),
        (FINISHED, "seed", 0.5),
        (FINISHED, "settings", {"quant": {"weight_bits": 4}}),
        (FINISHED, "protocol.calibration.sha256", "abc"),
        (FINISHED, "protocol.embedded.num_tokens", 0),
        (FINISHED, "protocol.embedded.segment_tokens", ...),
        (FINISHED, "perplexity.embedded.rtn", ...),
        (FINISHED, "perplexity.embedded.rtn", "1e4"),
        (FINISHED, "perplexity.embedded.rtn", 0.5),
        (FINISHED, "agreement", {"c4": {"kl_divergence": 0.1, "top1": 1.5}}),
        (FINISHED, "zero_shot", {"piqa": {"full_precision": {"acc": 0.5}}}),
        (FINISHED, "effective_bits", 0),
        (FINISHED, "environment.git_commit", "main"),
    ],
)
def test_schema_refuses(results, path, value):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate(changed(results, path, value))


def test_fields_may_be_added():
    for path in ("new", "cost.new", "environment.new", "windows.0.new", "perplexity.embedded.new"):
        validator.validate(changed(FINISHED, path, {"anything": 1}))


def test_written_file_is_json_that_is_not_only_pythons(tmp_path):
    results = changed(FINISHED, "perplexity.embedded.rtn", float("inf"))
    results = changed(results, "windows.0.rec_loss_last", float("nan"))
    results = changed(results, "settings.list", (1.5, float("-inf")))
    write_results(tmp_path / "new", results)

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "new" / "results.json").read_text(encoding="utf-8")
    found = json.loads(text, parse_constant=refuse)
    assert found["perplexity"]["embedded"] == {"full_precision": 5.5, "rtn": None, "quantized": 7.0}
    assert found["windows"][0]["rec_loss_last"] is None
    assert found["settings"]["list"] == [1.5, None]
    assert text.startswith('{\n "format_version": 1,\n')
    validator.validate(found)
    assert results["perplexity"]["embedded"]["rtn"] == float("inf"), "the caller's results were changed"


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    write_results(tmp_path, RUNNING)
    with pytest.raises(TypeError):
        write_results(tmp_path, FINISHED | {"new": object()})
    assert read_results(tmp_path) == RUNNING

    def power_cut(descriptor: int):
        raise OSError("power cut")

    monkeypatch.setattr(os, "fsync", power_cut)
    with pytest.raises(OSError, match="power cut"):
        write_results(tmp_path, FINISHED)
    assert read_results(tmp_path) == RUNNING
    monkeypatch.undo()
    write_results(tmp_path, FINISHED)
    assert read_results(tmp_path) == FINISHED
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_the_format_version_is_added(tmp_path):
    write_results(tmp_path, {"status": "running"})
    assert read_results(tmp_path) == {"format_version": 1, "status": "running"}


def test_no_results(tmp_path):
    assert read_results(tmp_path) is None
    assert read_results(tmp_path / "missing") is None


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format_version": 1, "sta', "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"\xff\xfe", "is not UTF-8"),
        (b"[1]", "must hold a JSON object, not a list"),
        (b'{"format_version": 2}', "has format_version 2; this cbq reads 1"),
        (b"{}", "has format_version None; this cbq reads 1"),
    ],
)
def test_corrupt_results(tmp_path, content, message):
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        read_results(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_results(tmp_path):
    (tmp_path / "results.json").mkdir()
    with pytest.raises(InputError, match=r"cannot read .*results\.json: Is a directory"):
        read_results(tmp_path)


def test_environment_tells_the_truth():
    found = environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["cbq"] == cbq.__version__
    assert found["device"] == "cpu"
    assert found["device_name"] is None
    assert found["cores"] == len(os.sched_getaffinity(0))


def test_git_commit_is_the_one_of_this_checkout_only(tmp_path):
    from cbq.results import _git_commit

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    package = tmp_path / "src" / "cbq"
    package.mkdir(parents=True)
    installed = tmp_path / "lib" / "cbq"
    installed.mkdir(parents=True)
    (package / "file").write_text("1")
    assert _git_commit(package) is None
    git("init", "-q")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")  # a tag must not take the commit's place
    commit = git("rev-parse", "HEAD")
    assert _git_commit(package) == commit
    assert _git_commit(installed) is None
    (package / "file").write_text("2")
    assert _git_commit(package) == commit + "-dirty"
