"""The Python API, as a user would: a transformers model in, a transformers model out."""

import copy
from pathlib import Path

import lightning as L
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaForCausalLM

import cbq
from cbq.cli import conf_dir, flatten
from cbq.errors import InputError
from cbq.preprocess.cfp import CoarseToFine
from cbq.quant.linear import FusedLinear, quantize_linears_
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.reconstruction.curves import WindowCurves
from cbq.run_folder import RunFolder
from cbq.streams.places import StreamPlacement

TOKENS = torch.randint(320, (8, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(tiny_llama_folder: Path):
    return AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)


def test_quantize_generate_save_load(model, tiny_llama_folder, tmp_path, capsys) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    quantized, windows = cbq.quantize(model, TOKENS, scheme="w4a8", window=2, overlap=1, rounding=DenseSTE)
    assert quantized is model
    assert [(window.start, window.stop) for window in windows] == [(0, 2), (1, 3), (2, 4)]
    assert all(window.rec_loss_last < window.rec_loss_rtn for window in windows)
    assert "window 3/3" in capsys.readouterr().out
    assert sum(isinstance(module, FusedLinear) for module in model.modules()) == 28
    cbq.save(quantized, tokenizer, tmp_path / "saved")
    loaded = cbq.load(tmp_path / "saved")
    ids = TOKENS[:1, :8]
    assert torch.equal(loaded.model(ids).logits, quantized(ids).logits)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = quantized.generate(ids, **options)
    assert written.shape[1] > 8
    assert torch.equal(loaded.model.generate(ids, **options), written)


@pytest.mark.parametrize(
    ("overrides", "scheme", "options"),
    [
        pytest.param(["quant=w2a16", "rounding=lora"], "w2a16", {}, marks=pytest.mark.slow),
        (
            ["quant=w4a4", "quant.act_granularity=tensor", "rounding=dense_ste", "preprocess=cfp"],
            QuantScheme(4, 4, act_granularity="tensor"),
            {"rounding": DenseSTE, "preprocess": CoarseToFine(True, True)},
        ),
    ],
    ids=["lora", "static, cfp, dense_ste"],
)
def test_equals_the_runner(tiny_llama_folder, tiny_text_file, tmp_path, overrides, scheme, options) -> None:
    """The same segments and options give the same bits from the command line's Runner, all defaults being the same."""
    overrides = [*overrides, "model=hf", f"model.path={tiny_llama_folder}", "seed=3", "evaluation=none"]
    overrides += ["calibration=text", f"calibration.path={tiny_text_file}", "calibration.num_segments=7"]
    overrides += ["calibration.segment_tokens=32", "tracking.mode=disabled", "report=none"]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        config = compose("config", overrides=overrides)
    runner = instantiate(config.runner, folder=RunFolder(tmp_path / "run", config), settings=flatten(config))
    runner.run()
    segments = instantiate(config.calibration).sample(AutoTokenizer.from_pretrained(tiny_llama_folder), 320, 128, 3)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32)
    quantized, _ = cbq.quantize(model, segments, scheme, **options, seed=3, progress=False)
    ids = TOKENS[:2]
    assert quantized(ids).logits.isfinite().all()
    assert torch.equal(quantized(ids).logits, cbq.load(tmp_path / "run" / "checkpoint").model(ids).logits)


def test_static_ranges_are_those_of_the_preprocessed_model(model) -> None:
    """In the first block, whose input no quantization changes; norms enlarged so that preprocessing has work."""
    model.requires_grad_(False)
    for block in model.model.layers:
        block.post_attention_layernorm.weight[5] *= 100
    processed = copy.deepcopy(model)
    quantize_linears_(processed.model.layers, QuantScheme(16, 8))
    preprocess = CoarseToFine(False, True)
    preprocess.apply_(processed, processed.model.layers, TOKENS)
    seen = []
    processed.model.layers[0].mlp.up_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    processed(TOKENS)
    cbq.quantize(
        model, TOKENS, QuantScheme(16, 8, act_granularity="tensor"), preprocess=preprocess, progress=False, epochs=1
    )
    scale = model.model.layers[0].mlp.up_proj.act_quantizer.initial_scale
    torch.testing.assert_close(scale, (seen[0].max() - seen[0].min()) / 255, rtol=1e-4, atol=1e-6)


def test_streams_on_disk_and_accumulation(model, tmp_path) -> None:
    """Arguments arrive: the same bits from disk, and 2 steps of 2 batches of 2 an epoch."""
    rows, other = [], copy.deepcopy(model)
    options = {"window": 4, "batch_size": 2, "accumulate_grad_batches": 2, "epochs": 1, "progress": False}
    cbq.quantize(model, TOKENS, **options, callbacks=[WindowCurves(rows.extend)])
    assert len(rows) == 2
    cbq.quantize(other, TOKENS, **options, activation_cache=StreamPlacement("disk", folder=str(tmp_path)))
    assert torch.equal(model(TOKENS).logits, other(TOKENS).logits)


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["device", "host", "disk"])
def test_streams_beside_a_gpu(model, cache) -> None:
    model = model.cuda()
    _, windows = cbq.quantize(model, TOKENS, "w4a8", rounding=DenseSTE, activation_cache=cache, progress=False)
    assert all(window.rec_loss_last < window.rec_loss_rtn for window in windows)
    assert model(TOKENS.cuda()).logits.isfinite().all()


def test_callbacks_and_silence(model, capsys) -> None:
    class Count(L.Callback):
        fits = 0

        def on_fit_start(self, trainer, module) -> None:
            self.fits += 1

    count = Count()
    cbq.quantize(model, TOKENS[:2], QuantScheme(8, 8), window=1, epochs=1, callbacks=[count], progress=False)
    assert count.fits == 4
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "4bit"}, "label must be like w4a4, w2a16g128 or w4a4-qkv4, got '4bit'"),
        ({"scheme": "w9a4"}, "quant.weight_bits must be 2 to 8"),
        ({"scheme": "w4a16g7"}, "quant.group_size must divide the 64 input features"),
        ({"window": 5}, "cbd.window must be at most the model's 4 blocks"),
        ({"overlap": 2}, "cbd.overlap must be 0 to 1"),
        ({"epochs": 0}, "reconstruction.epochs"),
        ({"activation_cache": None}, "activations.cache must be one of"),
        ({"activation_cache": "ram"}, "activations.cache must be one of auto, device, host, disk, got 'ram'"),
        (
            {"tokens": TOKENS[0]},
            r"tokens must be an integer tensor of shape \(segments, tokens\), got torch.int64 \(32,\)",
        ),
        ({"tokens": TOKENS.float()}, "tokens must be an integer tensor"),
        ({"tokens": TOKENS.tolist()}, "got list"),
        ({"tokens": TOKENS[:0]}, "tokens must hold at least one segment"),
        ({"tokens": TOKENS + 10}, "tokens must be 0 to 319"),
    ],
    ids=str,
)
def test_mistakes_leave_the_model_as_it_was(model, options: dict, message: str) -> None:
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(InputError, match=message):
        cbq.quantize(model, **({"tokens": TOKENS, "progress": False} | options))
    assert [name for name, _ in model.named_modules()] == names


def test_a_model_that_cannot_be_quantized(model) -> None:
    cbq.quantize(model, TOKENS[:2], "w8a8", epochs=1, progress=False)
    with pytest.raises(InputError, match="hold no linear to quantize"):
        cbq.quantize(model, TOKENS[:2], "w8a8", progress=False)
    other = MambaForCausalLM(MambaConfig(vocab_size=320, hidden_size=16, num_hidden_layers=1))
    with pytest.raises(InputError, match="'mamba' is not supported"):
        cbq.quantize(other, TOKENS)


def test_the_package_has_no_other_attributes() -> None:
    assert {"load", "save", "quantize"} <= set(cbq.__all__)
    with pytest.raises(AttributeError, match="quantise"):
        _ = cbq.quantise
