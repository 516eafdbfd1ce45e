"""Methods against the packages that their authors released, in the environment of `scripts/check_engine.py`."""

import json
import subprocess
from pathlib import Path

import hydra
import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import load_file, save_file
from torch import nn

from cbq.cli import conf_dir
from cbq.quant.linear import QuantLinear, fuse_linears_, fused_linears
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.windows import SlidingWindows

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-gptq" / "bin" / "python"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON.is_file(), reason="no environment: scripts/check_engine.py gptq <run> builds it"),
]


def released(script: str, *arguments: object) -> dict[str, torch.Tensor]:
    """Return the tensors that a script of `scripts/engines/` writes into its last argument."""
    subprocess.run([PYTHON, ROOT / "scripts" / "engines" / script, *arguments], check=True)
    return load_file(arguments[-1])


def label(value: object) -> str:
    return value.label if isinstance(value, QuantScheme) else ""


# ---- AutoRound

STEPS, RATE = 10, 0.05  # with more steps a last bit decides signs, and soon everything
PER_TOKEN = {"act_bits": 4, "act_group_size": -1, "act_sym": False, "act_dynamic": True, "act_data_type": "int"}


@pytest.mark.parametrize(
    ("scheme", "fields"),
    [
        (QuantScheme(2, 16), {"bits": 2, "group_size": -1}),
        (QuantScheme(3, 16, 32), {"bits": 3, "group_size": 32}),
        (QuantScheme(4, 4), {"bits": 4, "group_size": -1} | PER_TOKEN),
    ],
    ids=label,
)
def test_signround_is_autoround(scheme, fields, tiny_llama_folder, tiny_llama, segments, make_setup, tmp_path):
    """All segments in every step, so that both see the same batches."""
    given = {"steps": STEPS, "rate": RATE, "scheme": fields | {"sym": False}}
    # Its loss leaves out the last token, which no other sees, and what repeats before it, as padding.
    given["segments"] = torch.cat([segments, (segments[:, -1:] + 1) % tiny_llama.config.vocab_size], 1).tolist()
    given_file = tmp_path / "given.json"
    given_file.write_text(json.dumps(given))
    theirs = released("autoround_weights.py", tiny_llama_folder, given_file, tmp_path / "weights.safetensors")

    words = ["method=signround", f"reconstruction.num_steps={STEPS}", f"rounding.learning_rate={RATE}"]
    words += [f"reconstruction.learning_rates.weight_scale={RATE}"]
    with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
        solver = instantiate(hydra.compose("config", overrides=words).reconstruction)
    nearest, setup = make_setup(scheme), make_setup(scheme)
    fuse_linears_(nearest.blocks)
    setup.solve(solver, SlidingWindows(1), [])
    exact = tiny_llama(segments).logits

    def error(logits: torch.Tensor) -> float:
        return (logits - exact).square().mean().item()

    ours = setup.logits()
    for name, linear in fused_linears(setup.model):
        if name.startswith("model.layers.0."):
            assert ((linear.weight - theirs[name]).abs() > 1e-6).float().mean() < 0.02, name
        linear.weight.data = theirs[name]
    assert error(ours) == pytest.approx(error(setup.logits()), rel=0.05)
    assert error(ours) < 0.3 * error(nearest.logits())


# ---- GPTQModel


@pytest.mark.parametrize(
    ("scheme", "act_order"),
    [
        (QuantScheme(2, 16), True),
        (QuantScheme(2, 16), False),
        (QuantScheme(3, 16, 32), True),
        (QuantScheme(4, 16, 64, True), False),
    ],
    ids=label,
)
def test_gptq_is_gptqmodel(scheme, act_order, tmp_path):
    """With its "static groups"; it computes in float32, so that a tie may fall otherwise."""
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(192, 48, bias=False)
    linear.weight.data = torch.randn(48, 192, generator=generator)
    mixing = torch.randn(192, 192, generator=generator) * torch.rand(192, generator=generator).exp()
    inputs = torch.randn(800, 192, generator=generator) @ mixing
    given, fields = tmp_path / "given.safetensors", tmp_path / "fields.json"
    save_file({"weight": linear.weight.data, "inputs": inputs}, given)
    groups = {"group_size": scheme.group_size, "static_groups": scheme.group_size > 0}
    options = {"sym": scheme.symmetric, "desc_act": act_order, "act_group_aware": False, "damp_percent": 0.01}
    fields.write_text(json.dumps({"bits": scheme.weight_bits} | groups | options))
    theirs = released("gptqmodel_weight.py", given, fields, tmp_path / "weight.safetensors")["weight"]

    block = nn.ModuleList([QuantLinear(linear, scheme)])
    gram = inputs.double().T @ inputs.double()
    GPTQ(ReconstructionLoss(), damping=0.01, act_order=act_order).solve_linear_(block[0], gram)
    changed = block[0].changed_integers()[0]
    fuse_linears_(block)
    assert ((block[0].weight - theirs).abs() > 1e-4).float().mean() < 0.01
    assert changed > 0.2 * theirs.numel(), "rounding to nearest would be no test"
