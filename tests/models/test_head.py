"""The head of every family on hidden states that are given."""

import pytest
import torch
from tiny_models import TINY, tiny_model

from cbq.models.head import last_hidden_states, logits_of


@pytest.mark.parametrize("name", TINY)
def test_head_is_the_models_own(name):
    """Scaled embeddings, caps of the logits, tied weights: whatever stands behind the last hidden states."""
    model = tiny_model(name)
    tokens = torch.randint(0, model.config.vocab_size, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model(input_ids=tokens, use_cache=False).logits
        hidden = last_hidden_states(model, tokens)
        assert torch.equal(logits_of(model, hidden), expected)
        assert torch.allclose(logits_of(model, hidden.flip(0)), expected.flip(0), atol=1e-6)
        assert torch.equal(model(input_ids=tokens, use_cache=False).logits, expected)  # as it was
