"""Engines in environments of their own, which `scripts/check_engine.py` builds: real exports, real kernels."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "options", "dtype"),
    [
        ("vllm", ["quant=w4a16", "target=vllm", "export=compressed_tensors"], "bfloat16"),
        ("vllm", ["quant=w8a8", "target=vllm", "export=compressed_tensors"], "float32"),
        ("gptq", ["quant=w2a16", "target=autoround", "export=autoround"], "float16"),
        ("gptq", ["quant=w4a16", "quant.symmetric=true", "target=autoround", "export=autoround"], "float16"),
        ("gptq", ["quant=w4a16", "quant.group_size=128", "target=autoround", "export=gptq"], "float16"),
    ],
    ids=["vllm-w4a16", "vllm-w8a8", "autoround-w2a16", "autoround-w4a16-symmetric", "gptq-w4a16g128"],
)
def test_perplexity_and_text_through_the_engine(tmp_path, engine, options, dtype):
    if not (ROOT / f".venv-{engine}").is_dir():
        pytest.skip(f"no environment: scripts/check_engine.py {engine} <run> builds it")
    words = ["method=rtn", "debug=fast", "tracking.mode=disabled", "report=none", *options]
    words += [f"hydra.run.dir={tmp_path / 'run'}"]
    subprocess.run([sys.executable, ROOT / "run.py", *words], check=True, cwd=tmp_path)
    command = [sys.executable, ROOT / "scripts" / "check_engine.py", engine, tmp_path / "run", "--dtype", dtype]
    subprocess.run(command, check=True)
