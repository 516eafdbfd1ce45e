"""Train `pico`, the language model that cbq ships, from the text that comes with CPython.

    python scripts/train_pico.py            # about 80 minutes on 2 cores; minutes on a GPU

Everything that the package embeds is rebuilt: the tokenizer, the model, the calibration and test texts, and the model
card. The text is CPython's own: the sources of its standard library and test suite, the pydoc topics and the
docstrings of its compiled modules, all under the PSF licence. Files are split by a hash of their name, so that the
calibration and the test text share no file with the training text or with each other.

An interrupted training continues from its last checkpoint (`--work`, deleted at the end). The learning rate is
constant until the decay of the last `DECAY_SHARE` of the steps, so a checkpoint from before the decay is the same for
every number of steps.
"""

import argparse
import csv
import ctypes
import hashlib
import importlib
import inspect
import math
import platform
import shutil
import sys
import sysconfig
import time
import types
from collections import Counter
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
CONTEXT = 512
BATCH_SIZE = 8
MICRO_BATCH_SIZE = 2  # keeps a micro-batch's logits in the processor's cache
PEAK_LEARNING_RATE = 3e-3
WARMUP_STEPS = 60
DECAY_SHARE = 0.4
CHECKPOINT_EVERY = 100
# Tables of code points, machine-written parsers and build settings: text that teaches no language.
SKIPPED_FOLDERS = {"site-packages", "encodings", "lib2to3", "idlelib", "__pycache__", "cjkencodings"}
COMPILED_MODULES = (*sys.builtin_module_names, "math", "array", "zlib", "select", "_socket", "_decimal", "pyexpat")
SKIPPED_FILES = ("_sysconfigdata", "keysymdef", "topics.py", "test_htmlentitydefs", "entities.py", "stringprep.py")
# Of 100 hash buckets; the rest is for training. What exceeds HELD_OUT_BYTES is dropped: a perplexity takes seconds.
CALIBRATION_BUCKETS = range(0, 6)
TEST_BUCKETS = range(6, 12)
HELD_OUT_BYTES = {"calibration": 400_000, "test": 160_000}


def bucket(name: str) -> int:
    """Return the stable hash bucket, 0 to 99, of a document's name."""
    return int(hashlib.sha256(name.encode()).hexdigest(), 16) % 100


def collect_documents() -> dict[str, str]:
    """Return every document of the text by name: library sources, pydoc topics, docstrings of compiled modules."""
    library = Path(sysconfig.get_path("stdlib"))
    documents = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS & set(relative.parts) or path.name.startswith(SKIPPED_FILES):
            continue
        if not 500 < path.stat().st_size < 300_000:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # deliberately broken test files
            continue
        documents[f"Lib/{relative.as_posix()}"] = text
    from pydoc_data.topics import topics

    documents |= {f"topics/{name}": text for name, text in sorted(topics.items())}
    for name in sorted(COMPILED_MODULES):
        module = importlib.import_module(name)
        parts = [f"{name}\n\n{inspect.getdoc(module) or ''}"]
        for key, value in sorted(vars(module).items()):
            if isinstance(value, type | types.BuiltinFunctionType) and (text := inspect.getdoc(value)):
                parts.append(f"{name}.{key}\n\n{text}")
        documents[f"docstrings/{name}"] = "\n\n\n".join(parts)
    return documents


def is_test_suite(name: str) -> bool:
    """Return whether a document belongs to CPython's test suite (trained on, but not calibrated or tested on)."""
    return any(part in ("test", "tests") for part in name.split("/"))


def split_documents(documents: dict[str, str]) -> dict[str, list[str]]:
    """Return the documents' names by split. The held-out documents that exceed `HELD_OUT_BYTES` are dropped."""
    splits = {"train": [], "calibration": [], "test": []}
    for name in sorted(documents, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        number = bucket(name)
        if is_test_suite(name) or number >= TEST_BUCKETS.stop:
            splits["train"].append(name)
        else:
            splits["calibration" if number in CALIBRATION_BUCKETS else "test"].append(name)
    for split in ("calibration", "test"):
        size, kept = 0, []
        for name in splits[split]:
            if size + len(documents[name].encode()) <= HELD_OUT_BYTES[split]:
                size += len(documents[name].encode())
                kept.append(name)
        splits[split] = kept
    return splits


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of `VOCAB_SIZE` tokens that round-trips any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE,
            special_tokens=[END_OF_TEXT],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def build_model(seed: int) -> LlamaForCausalLM:
    """Return the untrained model: 8 blocks, hidden 256, 7.3 million parameters."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        rms_norm_eps=1e-5,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def learning_rate_factor(step: int, num_steps: int) -> float:
    """Return the share of the peak learning rate at `step`: linear warm-up, constant, linear decay to 2 %."""
    decay_start = int(num_steps * (1 - DECAY_SHARE))
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    if step < decay_start:
        return 1.0
    return max(0.02, (num_steps - step) / (num_steps - decay_start))


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, ids: torch.Tensor, text: str) -> dict[str, float]:
    """Return perplexity and bits per byte of `text`, whose tokens are `ids`, in segments of `CONTEXT` tokens."""
    segments = ids[: len(ids) // CONTEXT * CONTEXT].view(-1, CONTEXT)
    nll = 0.0
    for segment in segments.split(8):
        logits = model(input_ids=segment, use_cache=False).logits.float()
        nll += torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), segment[:, 1:].flatten(), reduction="sum"
        ).item()
    mean = nll / (segments.numel() - len(segments))
    return {"perplexity": math.exp(mean), "bits_per_byte": mean / math.log(2) * len(ids) / len(text.encode())}


def unigram_perplexity(train_ids: torch.Tensor, test_ids: torch.Tensor) -> float:
    """Return the test perplexity of the training text's token frequencies, with add-one smoothing."""
    counts = torch.bincount(train_ids, minlength=VOCAB_SIZE).double() + 1
    return math.exp(-(counts / counts.sum()).log()[test_ids].mean().item())


def keep_freed_memory() -> None:
    """Tell glibc not to hand freed memory back to the system: page faults take half of a CPU step otherwise."""
    try:
        mallopt = ctypes.CDLL("libc.so.6").mallopt
    except (OSError, AttributeError):
        return
    m_mmap_max, m_trim_threshold = -4, -1
    mallopt(m_mmap_max, 0)
    mallopt(m_trim_threshold, 2**31 - 1)


def train(args: argparse.Namespace) -> None:
    """Rebuild every embedded file."""
    keep_freed_memory()
    documents = collect_documents()
    splits = split_documents(documents)
    texts = {split: [documents[name].strip() + "\n" for name in names] for split, names in splits.items()}
    held_out = {split: "\n\n".join(texts[split]) for split in ("calibration", "test")}
    tokenizer = train_tokenizer(texts["train"])
    stream = [token for ids in tokenizer(texts["train"])["input_ids"] for token in [0, *ids]]
    train_ids = torch.tensor(stream)
    test_ids = torch.tensor(tokenizer(held_out["test"])["input_ids"])
    num_bytes = {split: sum(len(text.encode()) for text in texts[split]) for split in texts}
    print(
        {split: (len(texts[split]), num_bytes[split]) for split in texts},
        "tokens",
        len(train_ids),
        len(test_ids),
        flush=True,
    )
    unigram = unigram_perplexity(train_ids, test_ids)

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = build_model(args.seed).to(device)
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    optimizers = [
        torch.optim.Muon(matrices, lr=PEAK_LEARNING_RATE, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=PEAK_LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    args.work.mkdir(parents=True, exist_ok=True)
    checkpoint, start, curve = args.work / "checkpoint.pt", 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device)
        start, curve = state["step"], state["curve"]
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)

    began, running = time.perf_counter(), 0.0
    for step in range(start, args.steps):
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        offsets = torch.randint(len(train_ids) - CONTEXT, (BATCH_SIZE,), generator=generator)
        batch = torch.stack([train_ids[offset : offset + CONTEXT] for offset in offsets]).to(device)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LEARNING_RATE * learning_rate_factor(step, args.steps)
        for micro in batch.split(MICRO_BATCH_SIZE):
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                logits = model(input_ids=micro, use_cache=False).logits
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), micro[:, 1:].flatten())
            loss = loss * len(micro) / len(batch)
            loss.backward()
            running += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 20 == 0:
            curve.append((step + 1, round(running / 20, 4)))
            running = 0.0
            speed = (step + 1 - start) * batch.numel() / (time.perf_counter() - began)
            print(f"step {step + 1}/{args.steps} loss {curve[-1][1]:.3f} {speed:.0f} tokens/s", flush=True)
        if (step + 1) % CHECKPOINT_EVERY == 0:
            state = {"step": step + 1, "curve": curve, "model": model.state_dict()}
            state["optimizers"] = [optimizer.state_dict() for optimizer in optimizers]
            torch.save(state, checkpoint.with_suffix(".tmp"))
            checkpoint.with_suffix(".tmp").replace(checkpoint)

    # What ships is bfloat16: so is what is measured.
    model = model.to("cpu", torch.bfloat16).eval()
    reloaded = model.float()
    metrics = evaluate(reloaded, test_ids, held_out["test"]) | {"unigram_perplexity": unigram}
    prompt = tokenizer("def ", return_tensors="pt").input_ids
    torch.manual_seed(args.seed)
    sample = tokenizer.decode(
        reloaded.generate(prompt, max_new_tokens=120, do_sample=True, temperature=0.7, pad_token_id=0)[0]
    )
    model = model.to(torch.bfloat16)
    args.out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for split, text in held_out.items():
        (args.out / f"{split}.txt").write_text(text, encoding="utf-8")
    with (args.out / "loss_curve.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("step", "loss"), *curve])
    write_card(
        args, metrics, curve, num_bytes, len(train_ids), sample, Counter(bucket_kind(name) for name in splits["train"])
    )
    shutil.rmtree(args.work)
    print(metrics)


def bucket_kind(name: str) -> str:
    """Return the kind of a document: 'library', 'test suite', 'topics' or 'docstrings'."""
    top = name.split("/")[0]
    return top if top != "Lib" else "test suite" if is_test_suite(name) else "library"


def write_card(args, metrics, curve, num_bytes, num_tokens, sample, kinds) -> None:
    """Write the model card and the picture of the loss curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3), layout="constrained")
    axes.plot(*zip(*curve, strict=True))
    axes.set(xlabel="step", ylabel="training loss (nats a token)", title="pico")
    figure.savefig(args.out / "loss_curve.png", dpi=110)
    card = f"""---
license: psf-2.0
language: en
tags: [llama, tiny, python]
---
# pico

A LLaMA-architecture language model of 7.3 million parameters that cbq trains and ships, so that every command works
with no network: 8 blocks, hidden 256, intermediate 768, 4 heads of 64 with 2 key/value heads, context {CONTEXT}, tied
embeddings, a byte-level BPE of {VOCAB_SIZE} tokens. It writes Python and Python's documentation.

| held-out text | perplexity | bits per byte | unigram perplexity |
|---|---|---|---|
| `test.txt` (segments of {CONTEXT} tokens) | {metrics["perplexity"]:.3f} | {metrics["bits_per_byte"]:.3f} | {metrics["unigram_perplexity"]:.0f} |

- **Text**: what comes with CPython {platform.python_version()}: {", ".join(f"{count} documents of {kind}" for kind, count in sorted(kinds.items()))};
  {num_bytes["train"] / 1e6:.1f} MB, {num_tokens / 1e6:.2f} M tokens. `calibration.txt` ({num_bytes["calibration"] / 1e6:.2f} MB) and
  `test.txt` ({num_bytes["test"] / 1e6:.2f} MB) are files that it never saw, disjoint from each other.
- **Licence**: the text is under the PSF licence (CPython's `LICENSE`), and so are the weights made from it.
- **Training**: `python scripts/train_pico.py --steps {args.steps} --seed {args.seed}`: {args.steps} steps of {BATCH_SIZE} x {CONTEXT} tokens
  ({args.steps * BATCH_SIZE * CONTEXT / 1e6:.1f} M), fp32 (bfloat16 autocast on a GPU), Muon on the matrices and AdamW on the rest, peak rate {PEAK_LEARNING_RATE}.
- **Loss curve**: `loss_curve.csv`, final training loss {curve[-1][1]:.3f}.

![loss curve](loss_curve.png)

A sample at temperature 0.7 after the prompt `def `:

```
{sample}
```
"""
    (args.out / "README.md").write_text(card, encoding="utf-8")


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "src/cbq/pico", help="folder of the embedded files")
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build/pico", help="folder of the checkpoint while it trains"
    )
    train(parser.parse_args())


if __name__ == "__main__":
    main()
