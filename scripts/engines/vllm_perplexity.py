"""Runs in vLLM's environment: the log likelihoods of given tokens, and a generated text, as JSON.

python vllm_perplexity.py FOLDER SEGMENTS.json RESULT.json [DTYPE]
"""

import json
import os
import sys
from pathlib import Path

import torch

os.environ |= {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def main() -> None:
    folder, segments_file, result_file, *dtype = sys.argv[1:]
    if dtype == ["float32"]:  # its W8A8 kernel for AMX is chosen for any type, and then takes half precisions only
        torch.cpu._is_amx_tile_supported = lambda: False
    from vllm import LLM, SamplingParams

    given = json.loads(Path(segments_file).read_text())
    segments = given["segments"]
    llm = LLM(
        folder,
        dtype=dtype[0] if dtype else "bfloat16",
        max_model_len=len(segments[0]) + 1,
        max_num_batched_tokens=max(2048, len(segments[0]) + 1),
        enforce_eager=True,
        max_num_seqs=4,
        seed=0,
    )
    scored = llm.generate(
        [{"prompt_token_ids": segment} for segment in segments],
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    nll = [
        -found[token].logprob
        for segment, output in zip(segments, scored, strict=True)
        for token, found in zip(segment[1:], output.prompt_logprobs[1:], strict=True)
    ]
    text = llm.generate([given["prompt"]], SamplingParams(max_tokens=24, temperature=0), use_tqdm=False)
    result = {"nll": nll, "text": text[0].outputs[0].text}
    Path(result_file).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
