"""What is refused of a checkpoint's parameters."""

import pytest
from transformers import LlamaConfig

from cbq.errors import InputError
from cbq.models.checks import check_complete


@pytest.mark.parametrize(("part", "refused"), [("g_idx", False), ("qzeros", True), ("bias", True)])
def test_the_order_of_inputs_is_what_a_reader_may_leave_out(tmp_path, part, refused):
    """AutoRound loads the layout of GPTQ without it: every such export was refused where AutoRound was installed."""
    info = {"unexpected_keys": [f"model.layers.0.mlp.up_proj.{part}"], "missing_keys": [], "mismatched_keys": []}
    if not refused:
        assert check_complete(tmp_path, LlamaConfig(), info) is None
        return
    with pytest.raises(InputError, match=f"has no place for: model.layers.0.mlp.up_proj.{part}"):
        check_complete(tmp_path, LlamaConfig(), info)
