"""The scan against plain models in which one linear, or one block, is rounded by hand."""

import copy
import math

import pytest
import torch
from analysis.conftest import loss_of, nearest
from torch.distributions import Categorical, kl_divergence

from cbq.analysis.sensitivity import scan
from cbq.quant.scheme import QuantScheme


@pytest.mark.parametrize("act_bits", [16, 6])
def test_one_at_a_time_against_rounding_by_hand(make_pair, act_bits):
    scheme = QuantScheme(8, act_bits)
    pair = make_pair(scheme)
    found = scan(pair.loaded, scheme, [2, 4], pair.segments)
    names = list(pair.linears(pair.plain))
    assert list(found["linears"]) == names
    assert list(found["blocks"]) == ["blocks.0", "blocks.1", "blocks.2"]
    before = [pair.plain(input_ids=segment).logits for segment in pair.segments.split(1)]
    loss_before = float(loss_of(pair.plain, pair.segments))
    for name in ("blocks.1", "blocks.0.mlp.down_proj", "blocks.2.self_attn.v_proj"):
        for bits in (2, 4):
            model = copy.deepcopy(pair.plain)
            for other, linear in pair.linears(model).items():
                if other == name or other.startswith(f"{name}."):
                    linear.weight.data = nearest(linear.weight, bits)
                    if act_bits < 16:  # each token by its own range: a row
                        linear.register_forward_pre_hook(
                            lambda linear, args: nearest(args[0].flatten(0, -2), act_bits).view_as(args[0])
                        )
            after = [model(input_ids=segment).logits for segment in pair.segments.split(1)]
            divergence = torch.cat(
                [
                    kl_divergence(Categorical(logits=expected), Categorical(logits=changed)).flatten()
                    for expected, changed in zip(before, after, strict=True)
                ]
            ).mean()
            loss = float(loss_of(model, pair.segments))
            kind = "blocks" if name == "blocks.1" else "linears"
            got = found[kind][name][str(bits)]
            assert got["loss_change"] == pytest.approx(loss - loss_before, rel=1e-3, abs=1e-5)
            assert got["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)
            assert got["kl_divergence"] == pytest.approx(float(divergence), rel=1e-3, abs=1e-6)
            assert got["kl_divergence"] > 1e-6
