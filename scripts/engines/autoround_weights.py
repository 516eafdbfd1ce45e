"""Runs in the environment of AutoRound: the weights that it leaves of a model, as safetensors.

python autoround_weights.py FOLDER GIVEN.json RESULT.safetensors

GIVEN holds `segments` (token ids), `steps`, `rate` and `scheme`, the fields of AutoRound's own.
"""

import json
import sys
from pathlib import Path

import torch
from auto_round import AutoRound
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    folder, given_file, result_file = sys.argv[1:]
    given = json.loads(Path(given_file).read_text())
    segments = torch.tensor(given["segments"])
    rounding = AutoRound(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        AutoTokenizer.from_pretrained(folder),
        dataset=[{"input_ids": segment[None], "attention_mask": None} for segment in segments],
        nsamples=len(segments),
        seqlen=segments.shape[1],
        batch_size=len(segments),
        iters=given["steps"],
        lr=given["rate"],
        minmax_lr=given["rate"],
        scale_dtype="fp32",
        amp=False,
        device_map="cpu",
        enable_torch_compile=False,
        **given["scheme"],
    )
    model, _ = rounding.quantize()
    # Where activations are quantized, a linear is wrapped.
    linears = {
        name.removesuffix(".orig_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    save_file({name: linear.weight.detach().contiguous() for name, linear in linears.items()}, result_file)


if __name__ == "__main__":
    main()
