"""Every family on a small model: what is claimed, replayed, scaled, quantized, saved and loaded again."""

import copy
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import OUTLIER, TINY, add_outliers_, tiny_model, token_ids
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedModel

import cbq
from cbq.activations import ActivationCache
from cbq.checkpoint import load_checkpoint, save_checkpoint
from cbq.errors import InputError
from cbq.models.equivalent import producer_maxima, scale_channels_
from cbq.models.families import FAMILIES, find_family, get_blocks, scaling_pairs
from cbq.models.linears import to_linears_
from cbq.models.loading import load_pretrained
from cbq.preprocess.cfp import CoarseToFine
from cbq.preprocess.statistics import InputStatistics, input_statistics
from cbq.quant.linear import QuantLinear
from cbq.quant.rounding import DenseSTE
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.quantized import make_quantizable_

# Of Qwen3-MoE's blocks some have it; of Mixtral's none.
ONE_FEED_FORWARD = {
    ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
    ("mlp.up_proj", ("mlp.down_proj",)),
}
EVERY = pytest.mark.parametrize("name", TINY)


def logits(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return the logits of token ids (N, T), (N, T, V)."""
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def input_statistics_of(model: PreTrainedModel, ids: torch.Tensor, index: int) -> dict[str, InputStatistics]:
    """Return the statistics of the inputs of one block's linears by their names."""
    return list(input_statistics(model, get_blocks(model), ids))[index]


def test_blocks_are_the_decoder_layers_in_order(tiny_llama_folder: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(tiny_llama_folder)
    blocks = get_blocks(model)
    assert isinstance(blocks, nn.ModuleList)
    assert [block.self_attn.layer_idx for block in blocks] == [0, 1, 2, 3]


def test_unsupported_architecture_names_the_supported_ones() -> None:
    with pytest.raises(InputError, match=r"'mamba' is not supported; supported: llama, mistral"):
        find_family(transformers.MambaConfig())


def test_no_model_type_is_in_two_rows_and_every_one_is_tested() -> None:
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(types) == len(set(types))
    assert {name.partition("-")[0] for name in TINY} == set(types)


@EVERY
def test_every_matrix_of_a_block_is_a_linear_of_a_scheme(name: str) -> None:
    model = tiny_model(name)
    ids = token_ids()
    expected = logits(model, ids)
    to_linears_(model)
    excluded = {parameter for parameter, reason in find_family(model.config).excluded if reason}
    matrices = [
        [name for name, tensor in block.named_parameters() if tensor.dim() > 1 and name not in excluded]
        for block in get_blocks(model)
    ]
    make_quantizable_(model, get_blocks(model), QuantScheme(4, 4))
    for block, names in zip(get_blocks(model), matrices, strict=True):
        linears = [name for name, module in block.named_modules() if isinstance(module, QuantLinear)]
        assert sorted(f"{linear}.weight" for linear in linears) == sorted(names)
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-5, atol=1e-5)


class OnlyDeterministicOnCuda(TorchDispatchMode):
    """Refuses of floating-point numbers what `torch.use_deterministic_algorithms` lists for CUDA as refused."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.name().split(".")[0] in ("aten::cumsum", "aten::histc", "aten::put_", "aten::nll_loss2d_forward"):
            assert not args[0].is_floating_point(), func.name()
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [name for name in TINY if not name.startswith("opt")])
def test_a_model_computes_with_deterministic_kernels(name: str) -> None:
    """As `deterministic=true` demands on a GPU."""
    model = tiny_model(name)
    to_linears_(model)
    with OnlyDeterministicOnCuda():
        assert logits(model, token_ids(3, 12)).isfinite().all()


def test_a_loaded_opt_counts_positions_in_a_fixed_order(tmp_path, tiny_llama_folder) -> None:
    """transformers adds up ones. The bits are its own: also with padding, with a cache, and of what is written."""
    plain, ids = tiny_model("opt"), token_ids(3, 12)
    plain.save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_folder / file, tmp_path / file)
    model = load_pretrained(str(tmp_path)).model
    with OnlyDeterministicOnCuda():
        found = logits(model, ids)
    assert torch.equal(found, logits(plain, ids))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    computed, written, gone_on = [], [], []
    for each in (model, plain):
        computed.append(each(input_ids=ids, attention_mask=mask).logits)
        written.append(each.generate(ids, max_new_tokens=3, do_sample=False, attention_mask=mask))
        cache = each(input_ids=ids[:, :-1]).past_key_values
        gone_on.append(each(input_ids=ids[:, -1:], past_key_values=cache).logits)
    assert torch.equal(*computed)
    assert torch.equal(*written)
    assert torch.equal(*gone_on)


@EVERY
def test_replayed_blocks_are_the_plain_forward(name: str) -> None:
    """In batches of other sizes than the one that was captured."""
    model = tiny_model(name)
    ids, blocks = token_ids(num_segments=5), get_blocks(model)
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        block.register_forward_hook(
            lambda block, args, output, index=index: seen.update(
                {index: output[0] if isinstance(output, tuple) else output}
            )
        )
        for index, block in enumerate(blocks)
    ]
    logits(model, ids)
    for hook in hooks:
        hook.remove()
    cache = ActivationCache(model, blocks, ids, batch_size=2)
    for index in range(len(blocks)):
        stream = cache.advance_full_precision(index + 1)
        torch.testing.assert_close(stream[:], seen[index], rtol=1e-5, atol=1e-5)


@EVERY
def test_scaling_keeps_the_function_and_reaches_every_claimed_channel(name: str) -> None:
    model = tiny_model(name)
    ids = token_ids()
    expected = logits(model, ids)
    scaled = copy.deepcopy(model)
    to_linears_(scaled)
    generator = torch.Generator().manual_seed(3)
    unseen = {(pair.producer, pair.consumers) for pair in find_family(model.config).scaling_pairs(model.config)}
    for block in get_blocks(scaled):
        for pair in scaling_pairs(model.config, block):
            unseen -= {(pair.producer, pair.consumers)}
            weight = block.get_submodule(pair.producer).weight
            before = {consumer: block.get_submodule(consumer).weight.clone() for consumer in pair.consumers}
            channels = len(weight) if pair.rows is None else len(pair.rows)
            scale_channels_(pair, block, torch.rand(channels, generator=generator) * 3 + 0.3)
            for consumer, old in before.items():
                assert ((block.get_submodule(consumer).weight - old).abs().amax(0) > 0).all()
    torch.testing.assert_close(logits(scaled, ids), expected, rtol=2e-3, atol=2e-3)
    assert unseen == (ONE_FEED_FORWARD if name == "mixtral" else set())


@EVERY
def test_calls_are_captured_without_the_head(name: str) -> None:
    """Its logits may be larger than the model."""
    model = tiny_model(name)
    model.get_output_embeddings().register_forward_pre_hook(lambda *_: pytest.fail("the head ran"))
    ActivationCache(model, get_blocks(model), token_ids(num_segments=5), batch_size=2).advance_full_precision(4)


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma2", "gemma3_text"])
def test_scaling_norms_in_a_short_dtype_costs_no_more_than_the_dtype(name: str) -> None:
    """Where a norm multiplies by 1 + weight, the weight of a large scale is near -1, where bfloat16 is coarse.

    It cost a hundred times what rounding to 8 bits does.
    """
    model = tiny_model(name).to(torch.bfloat16)
    ids = token_ids()
    expected = logits(model, ids).float().log_softmax(-1)
    rounded, scaled = copy.deepcopy(model), copy.deepcopy(model)
    make_quantizable_(rounded, get_blocks(rounded), QuantScheme(8, 16))
    generator = torch.Generator().manual_seed(3)
    for block in get_blocks(scaled):
        for pair in scaling_pairs(model.config, block):
            if pair.producer.endswith("norm"):
                spread = torch.rand(len(block.get_submodule(pair.producer).weight), generator=generator)
                scale = 70 * (0.7 + 0.6 * spread)
                scale_channels_(pair, block, scale)

    def divergence(other: PreTrainedModel) -> float:
        found = logits(other, ids).float().log_softmax(-1)
        return nn.functional.kl_div(found, expected, log_target=True, reduction="batchmean").item()

    with quant_state(rounded, QuantState.NEAREST):
        assert divergence(scaled) < 5 * divergence(rounded)


def test_a_refused_scheme_leaves_the_model_as_it_was() -> None:
    for name in ("gpt2", "mixtral"):
        model = tiny_model(name)
        before = {key: tensor.shape for key, tensor in model.state_dict().items()}
        with pytest.raises(InputError, match=r"group_size must divide"):
            cbq.quantize(model, token_ids(), "w4a16g7", progress=False)
        assert {key: tensor.shape for key, tensor in model.state_dict().items()} == before


@EVERY
def test_cfp_keeps_the_function_and_removes_outliers(name: str) -> None:
    model = tiny_model(name)
    to_linears_(model)
    ids, blocks = token_ids(), get_blocks(model)
    add_outliers_(model, factor=200.0)
    expected = logits(model, ids)
    make_quantizable_(model, blocks, QuantScheme(4, 4))
    pair = scaling_pairs(model.config, blocks[1])[0]
    maxima = [input_statistics_of(model, ids, 1)[pair.consumers[0]].maxima]
    CoarseToFine(weights=False, activations=True).apply_(model, blocks, ids)
    torch.testing.assert_close(logits(model, ids), expected, rtol=2e-3, atol=2e-3)
    maxima.append(input_statistics_of(model, ids, 1)[pair.consumers[0]].maxima)
    largest, after = (producer_maxima(pair, blocks[1], each) for each in maxima)
    assert largest.argmax() == OUTLIER
    assert after[OUTLIER] < 0.5 * largest[OUTLIER]


@EVERY
def test_queries_keys_and_values_can_be_reached_or_are_refused(name: str) -> None:
    model = tiny_model(name)
    ids = token_ids()
    expected = logits(model, ids)
    if find_family(model.config).attention is None:
        with pytest.raises(InputError, match=r"qkv_bits must be 16 for model type '(bloom|falcon|gemma2)'"):
            make_quantizable_(model, get_blocks(model), QuantScheme(4, 4, qkv_bits=4))
        assert torch.equal(logits(model, ids), expected)
        return
    make_quantizable_(model, get_blocks(model), QuantScheme(16, 16, qkv_bits=4))
    torch.testing.assert_close(logits(model, ids), expected, rtol=1e-3, atol=1e-4)
    with quant_state(model, QuantState.NEAREST):
        assert (logits(model, ids) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        # Of variants, and of both schemes, one does in everyday tests; docs/families.md is made by all.
        pytest.param(
            name,
            scheme,
            id=f"{scheme}-{name}",
            marks=[] if scheme == "w4a4" and "-" not in name else pytest.mark.slow,
        )
        for name in TINY
        for scheme in ("w4a4", "w2a16")
    ],
)
def test_cbq_from_end_to_end(
    name: str, scheme: str, tmp_path: Path, tiny_llama_folder: Path, record_property: Callable[[str, float], None]
) -> None:
    """Preprocessed, learned, saved, and loaded again by us and by plain transformers."""
    model = tiny_model(name)
    to_linears_(model)
    add_outliers_(model, factor=8.0)
    ids = token_ids()
    quantized, windows = cbq.quantize(
        model,
        ids,
        scheme,
        window=3,
        overlap=2,
        rounding=DenseSTE,
        preprocess=CoarseToFine(weights=True, activations=True),
        progress=False,
    )
    assert all(window.guard is None for window in windows)
    nearest, learned = (sum(getattr(window, f"rec_loss_{when}") for window in windows) for when in ("rtn", "last"))
    record_property("nearest", nearest)  # for docs/families.md
    record_property("learned", learned)
    assert learned < nearest
    after = logits(quantized, ids)
    assert after.isfinite().all()
    folder = tmp_path / "checkpoint"
    save_checkpoint(quantized, AutoTokenizer.from_pretrained(tiny_llama_folder), folder)
    assert torch.equal(logits(load_checkpoint(folder).model, ids), after)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    if scheme == "w2a16":  # activations are not quantized there; transformers runs experts in another order
        torch.testing.assert_close(
            logits(plain, ids), after, rtol=0, atol=1e-4 if find_family(model.config).experts else 0
        )
    to_linears_(plain)
    ours = quantized.state_dict()
    assert all(torch.equal(tensor, ours[key]) for key, tensor in plain.state_dict().items())
