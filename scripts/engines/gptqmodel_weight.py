"""Runs in the environment of GPTQModel: the weight that it leaves of a linear, as safetensors.

python gptqmodel_weight.py GIVEN.safetensors FIELDS.json RESULT.safetensors

GIVEN holds `weight` (O, I) and `inputs` (N, I); FIELDS those of GPTQModel's own configuration.
"""

import json
import sys
from pathlib import Path

import torch
from gptqmodel.quantization import GPTQ, QuantizeConfig
from safetensors.torch import load_file, save_file
from torch import nn


def main() -> None:
    given_file, fields_file, result_file = sys.argv[1:]
    given = load_file(given_file)
    linear = nn.Linear(given["weight"].shape[1], given["weight"].shape[0], bias=False)
    linear.weight.data = given["weight"]
    gptq = GPTQ(linear, QuantizeConfig(**json.loads(Path(fields_file).read_text())))
    gptq.quantizer.configure(perchannel=True)
    gptq.add_batch(given["inputs"][None], linear(given["inputs"])[None])
    with torch.no_grad():
        weight = gptq.quantize()[0]
    save_file({"weight": weight.float().contiguous()}, result_file)


if __name__ == "__main__":
    main()
