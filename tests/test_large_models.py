"""Host memory of loading and saving: the model once, measured by the system in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from cbq.models.loading import embedded_folder

MIB = 2**20
MEASURE = """
import json, re, sys
from pathlib import Path

from cbq.checkpoint import save_checkpoint
from cbq.models.loading import load_pretrained
from cbq.quant.linear import fuse_linears_
from cbq.quant.scheme import QuantScheme
from cbq.quantized import make_quantizable_

def status(key):
    return int(re.search(rf"^{key}:\\s+(\\d+)", Path("/proc/self/status").read_text(), re.M)[1]) * 1024

def peak(do):  # bytes above what there was before
    Path("/proc/self/clear_refs").write_text("5")
    before = status("VmRSS")
    result = do()
    return result, status("VmHWM") - before

def load():  # and read every weight: files are mapped, and so far nothing of them need be in memory
    loaded = load_pretrained(sys.argv[1], dtype="bfloat16")
    assert sum(float(parameter.abs().max()) for parameter in loaded.model.parameters()) > 0
    return loaded

loaded, loading = peak(load)
size = sum(parameter.nbytes for parameter in loaded.model.parameters())
make_quantizable_(loaded.model, loaded.blocks, QuantScheme(4, 16))
fuse_linears_(loaded.blocks)
_, saving = peak(lambda: save_checkpoint(loaded.model, loaded.tokenizer, sys.argv[2]))
print(json.dumps({"size": size, "loading": loading, "saving": saving}))
"""


@pytest.mark.slow
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="measures by Linux' own account")
def test_a_model_is_in_memory_once(tmp_path: Path):
    """A second copy would be 200 MiB; what takes the place is a block of 24 MiB, and what libraries load on the way."""
    tokenizer = AutoTokenizer.from_pretrained(embedded_folder("pico"))
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=8,
        num_attention_heads=16,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).bfloat16().save_pretrained(tmp_path / "model", max_shard_size="50MB")
    tokenizer.save_pretrained(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "model"), str(tmp_path / "saved")],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["size"] > 190 * MIB
    assert found["loading"] < found["size"] + 80 * MIB
    assert found["saving"] < 80 * MIB
