"""Peak memory of solving a window, against a formula of what a fused implementation needs.

    peak     = weights + streams + learned + max(step, measuring)
    weights  = e P                              all parameters of the model; e bytes each: 4 on a CPU, 2 on a GPU
    streams  = 2 e N T D                        the window's input and its targets
    learned  = (16 + c) L                       values, gradients and Adam's two moments, float32; c = 4 on a CPU, where
                                                the guard's copy of the start lies, and 0 on a GPU
    step     = e W + 4 w + B T A                the quantized weights of the window, kept for the backward; the gradient
                                                of the largest of them; the activations, kept likewise
    A        = b e (6 D + 2 K + 4 F) + 4 * 3 D + b e (6 D + F)     the last only where activations are quantized
    measuring = 4 w + B' T e (3 F + 4 D)        no gradients: one quantized weight, the widest place of a block

P parameters; N segments of T tokens; B segments a step, B' those of a pass without gradients (8, or N); D hidden, F
intermediate, K channels of the keys; b blocks a window, of W linear weights, the largest linear with w; L learned
numbers: 1 a linear (S_X), one an output channel (S_W), R (O + I) a linear of low-rank rounding or O I of a dense one.

A counts what autograd keeps of a token: in a block of a LLaMA 6 D (two norms' inputs, the inputs of q/k/v, of o and of
gate/up, the queries), 2 K (keys, values), 4 F (gate, its SiLU, up, their product); of every quantized linear input
one more (what it is quantized to); once 3 D for the loss. Temporary values of
a pass are left out, so that a perfect step is a little above 1.
"""

import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks.fusion import BETA
from benchmarks.plan import Plan
from benchmarks.rows import Row, Skipped
from benchmarks.shapes import ROUNDINGS, Size, weight_dtype
from cbq.quant.quantizer import WeightQuantizer
from cbq.quant.scheme import QuantScheme

GIB = 2**30
SEGMENTS_WITHOUT_GRADIENT = 8  # ActivationCache's batch
HEADROOM = 0.9  # of the free memory may be used


@dataclass(frozen=True)
class Work:
    """Windows of a random-weight model, to be solved.

    Args:
        size: of the blocks.
        scheme: its label.
        rounding: its name.
        segments: N.
        tokens: T.
        blocks: in the model.
        window: blocks a window.
        overlap: blocks that windows share.
        epochs: passes over the segments.
    """

    size: Size
    scheme: str
    rounding: str
    segments: int
    tokens: int
    blocks: int = 2
    window: int = 2
    overlap: int = 0
    epochs: int = 1

    @property
    def case(self) -> str:
        """What a row calls it."""
        return f"{self.size.name} {self.segments}x{self.tokens} {self.scheme.upper()} {self.rounding}"

    def to_json(self) -> str:
        """Write it for the probe."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Work":
        """Read it."""
        fields = json.loads(text)
        return cls(**{**fields, "size": Size(**fields["size"])})


def measure(plan: Plan) -> Iterator[Row | Skipped]:
    """Yield the peak of a window of each size, and what each rounding keeps of a weight until the backward."""
    for size in plan.sizes:
        work = Work(size, "w4a4", "lora_ste", segments=size.steps, tokens=size.on(plan.device))
        if why := shortage(work, plan.device):
            yield Skipped(f"memory {work.case}", why)
            continue
        used = probe(work)["peak_bytes"]
        expected = sum(formula(work, plan.device).values())
        note = f"{used / GIB:.2f} GiB, by the formula {expected / GIB:.2f} GiB"
        yield Row("memory", "peak memory / formula", work.case, (used / expected,), expected=1.0, note=note)
    fused = weight_dtype(plan.device).itemsize
    for rounding in ROUNDINGS:
        kept = kept_bytes_per_weight(rounding, plan.device)
        note = f"{kept:.1f} bytes a weight, fused {fused}"
        name = "kept until the backward / fused"
        yield Row("memory", name, f"W4 {rounding}", (kept / fused,), expected=1.0, note=note)


def probe(work: Work) -> dict[str, float]:
    """Solve the first window of `work` in a fresh process, and return what `benchmarks.probe` prints."""
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "benchmarks.probe", work.to_json()]
    process = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    if process.returncode:
        raise RuntimeError(f"the memory probe of {work.case} failed:\n{process.stderr}")
    return json.loads(process.stdout.splitlines()[-1])


def formula(work: Work, device: torch.device) -> dict[str, float]:
    """Return the terms of the formula above, in bytes; they add up to the peak."""
    size, element = work.size, weight_dtype(device).itemsize
    shapes = size.linear_shapes()
    block_weights, largest = sum(o * i for o, i in shapes), max(o * i for o, i in shapes)
    parameters = work.blocks * (block_weights + 2 * size.hidden) + 257 * size.hidden
    hidden = work.segments * work.tokens * size.hidden
    learned = learned_numbers(size, work.rounding) * work.window
    step = element * block_weights * work.window + 4 * largest + work.tokens * kept_bytes_per_token(work, device)
    batch = min(SEGMENTS_WITHOUT_GRADIENT, work.segments) * work.tokens
    measuring = 4 * largest + batch * element * (3 * size.intermediate + 4 * size.hidden)
    return {
        "weights": element * parameters,
        "streams": 2 * element * hidden,
        "learned": (16 if device.type == "cuda" else 20) * learned,
        "step": max(step, measuring),
    }


def kept_bytes_per_token(work: Work, device: torch.device) -> float:
    """Return A: the bytes of activations that a step keeps of a token, in all blocks of a window."""
    size, element = work.size, weight_dtype(device).itemsize
    block = element * (6 * size.hidden + 2 * size.kv_width + 4 * size.intermediate)
    if QuantScheme.parse(work.scheme).quantizes_activations:
        block += element * (6 * size.hidden + size.intermediate)
    return work.window * block + 4 * 3 * size.hidden


def learned_numbers(size: Size, rounding: str) -> int:
    """Return L of one block with quantized activations: how many numbers its linears learn.

    Example:
        >>> from benchmarks.shapes import SIZES
        >>> tiny = SIZES["tiny"]  # 32 wide, MLP of 64, keys of 16; 256 output channels, 7 linears
        >>> learned_numbers(tiny, "nearest"), learned_numbers(tiny, "dense_ste") - learned_numbers(tiny, "nearest")
        (263, 9216)
    """
    shapes = size.linear_shapes()
    of_rounding = sum(p.numel() for o, i in shapes for p in ROUNDINGS[rounding](o, i).parameters())
    return of_rounding + sum(o for o, _ in shapes) + len(shapes)


def kept_bytes_per_weight(rounding: str, device: torch.device) -> float:
    """Return how many bytes a weight autograd keeps from the forward to the backward of a linear, as installed.

    Parameters themselves are not counted. Fused, it is the quantized weight alone.
    """
    out_features, in_features = 256, 1024
    weight = torch.randn(out_features, in_features, device=device, dtype=weight_dtype(device))
    quantizer = WeightQuantizer(weight, 4).to(device)
    kind = ROUNDINGS[rounding](out_features, in_features).to(device)
    x = torch.randn(1, in_features, device=device, dtype=weight.dtype, requires_grad=True)
    known = {tensor.untyped_storage().data_ptr() for tensor in (weight, x, *kind.parameters())}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        kind.beta = BETA
        F.linear(x, quantizer(weight, kind).to(weight.dtype)).sum()
        kind.penalty()
    large = [t.untyped_storage().nbytes() for key, t in kept.items() if key not in known and t.numel() > out_features]
    return sum(large) / weight.numel()


def shortage(work: Work, device: torch.device) -> str | None:
    """Return why `work` would not fit into memory as the installed code needs it, or None if it fits."""
    weights = replace(work, blocks=work.window).size.linear_shapes()
    extra = kept_bytes_per_weight(work.rounding, device) - weight_dtype(device).itemsize
    needed = sum(formula(work, device).values()) + extra * work.window * sum(o * i for o, i in weights)
    # A chain makes about as many temporary copies of one weight in its backward as it keeps.
    needed += 2 * extra * max(o * i for o, i in weights)
    free = free_bytes(device)
    if free is None or needed <= HEADROOM * free:
        return None
    return f"needs about {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"


def free_bytes(device: torch.device) -> float | None:
    """Return the free memory of a GPU, or of the host where Linux says; None where nobody says."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    table = Path("/proc/meminfo")
    if not table.exists():
        return None
    (line,) = (line for line in table.read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024
