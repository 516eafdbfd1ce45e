"""Runs in the environment of GPTQModel and AutoRound: what plain transformers gives for a folder, as JSON.

python transformers_perplexity.py FOLDER SEGMENTS.json RESULT.json [DTYPE]
"""

import json
import sys
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer


@torch.no_grad()
def main() -> None:
    folder, segments_file, result_file, *dtype = sys.argv[1:]
    given = json.loads(Path(segments_file).read_text())
    model = AutoModelForCausalLM.from_pretrained(folder, device_map="cpu", dtype=dtype[0] if dtype else "auto").eval()
    nll = []
    for segment in given["segments"]:
        ids = torch.tensor(segment)
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nll += F.cross_entropy(logits.double(), ids[1:], reduction="none").tolist()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(given["prompt"], return_tensors="pt").input_ids
    text = tokenizer.decode(model.generate(ids, max_new_tokens=24, do_sample=False)[0, ids.shape[1] :])
    kernels = sorted({type(module).__name__ for module in model.modules() if "Linear" in type(module).__name__})
    result = {"nll": nll, "text": text, "kernels": kernels}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
