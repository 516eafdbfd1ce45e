"""What is refused of a checkpoint's parameters."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from cbq.errors import InputError
from cbq.models.checks import check_complete, check_finite


@pytest.mark.parametrize(("part", "refused"), [("g_idx", False), ("qzeros", True), ("bias", True)])
def test_the_order_of_inputs_is_what_a_reader_may_leave_out(tmp_path, part, refused):
    """AutoRound loads the layout of GPTQ without it: every such export was refused where AutoRound was installed."""
    info = {"unexpected_keys": [f"model.layers.0.mlp.up_proj.{part}"], "missing_keys": [], "mismatched_keys": []}
    if not refused:
        assert check_complete(tmp_path, LlamaConfig(), info) is None
        return
    with pytest.raises(InputError, match=f"has no place for: model.layers.0.mlp.up_proj.{part}"):
        check_complete(tmp_path, LlamaConfig(), info)


EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, *EIGHT_BITS], ids=str)
def test_what_is_not_finite_is_found_in_every_type(tmp_path, dtype):
    """torch has no extremes of 8 bits: a folder of such weights was a traceback."""
    values = torch.tensor([1.0, -2.0, 0.5])
    model = nn.ParameterDict({"weight": nn.Parameter(values.to(dtype), requires_grad=False)})
    assert check_finite(tmp_path, model) is None
    values[1] = torch.nan
    model["weight"].data = values.to(dtype)
    with pytest.raises(InputError, match=f"too large for {str(dtype).removeprefix('torch.')}: weight"):
        check_finite(tmp_path, model)
