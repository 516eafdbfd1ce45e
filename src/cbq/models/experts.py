"""Mixtures of experts with a linear a matrix: transformers keeps those of all experts in one parameter, (E, O, I).

Shapes: E experts, H hidden, F feed-forward, T tokens, K experts a token, O out_features, I in_features.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import nn

from cbq.attributes import temporarily


class Expert(nn.Module):
    """One gated feed-forward.

    Args:
        gate_up: (2 F, H), the gate's rows first.
        down: (H, F).
        act_fn: of the gate.
    """

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor, act_fn: nn.Module) -> None:
        super().__init__()
        self.gate_up_proj = linear_of(gate_up)
        self.down_proj = linear_of(down)
        self.act_fn = act_fn

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the expert's output (T, H) for its input (T, H)."""
        gate, up = self.gate_up_proj(hidden_states).chunk(2, dim=-1)
        return self.down_proj(self.act_fn(gate) * up)


class Experts(nn.ModuleList):
    """All experts of a block, each of which runs on the tokens that the router sends to it.

    Args:
        fused: transformers' module, whose memory is shared.

    Attributes:
        every_token: let each run on all tokens; the output is the same.
    """

    def __init__(self, fused: nn.Module) -> None:
        parameters = zip(fused.gate_up_proj, fused.down_proj, strict=True)
        super().__init__(Expert(gate_up, down, fused.act_fn) for gate_up, down in parameters)
        self.every_token = False

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the weighted sum (T, H) of the outputs of each token's experts.

        Args:
            hidden_states: (T, H).
            top_k_index: (T, K), which experts.
            top_k_weights: (T, K).
        """
        total = torch.zeros_like(hidden_states)
        for number, expert in enumerate(self):
            token, choice = torch.where(top_k_index == number)
            if self.every_token:
                output = expert(hidden_states)[token]
            elif len(token):
                output = expert(hidden_states[token])
            else:
                continue
            total.index_add_(0, token, (output * top_k_weights[token, choice, None]).to(total.dtype))
        return total


def linear_of(weight: torch.Tensor) -> nn.Linear:
    """Return the linear of a weight (O, I), which it shares, without bias."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def every_token(blocks: nn.Module) -> AbstractContextManager[None]:
    """Let each expert of the blocks run on all tokens inside: statistics then miss none."""
    return temporarily([module for module in blocks.modules() if isinstance(module, Experts)], "every_token", True)


@contextmanager
def counted_tokens(blocks: nn.ModuleList) -> Iterator[dict[str, torch.Tensor]]:
    """Count, for each mixture of the blocks by its name, the tokens that each of its experts is sent inside, (E,)."""
    counts: dict[str, torch.Tensor] = {}

    def count(experts: Experts, args: tuple, name: str) -> None:
        counts[name] = counts.get(name, 0) + torch.bincount(args[1].flatten(), minlength=len(experts)).cpu()

    hooks = [
        module.register_forward_pre_hook(lambda module, args, name=f"blocks.{name}": count(module, args, name))
        for name, module in blocks.named_modules()
        if isinstance(module, Experts)
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def to_experts_(blocks: nn.ModuleList, name: str) -> list[tuple[nn.Module, str, nn.Module]]:
    """Replace transformers' experts, by their dotted `name` in a block, by `Experts`; some blocks may have none.

    Returns:
        the parent, the name and the module of each that was replaced.
    """
    replaced = []
    for block in blocks:
        parent, _, child = name.rpartition(".")
        owner = block.get_submodule(parent)
        fused = getattr(owner, child, None)
        if fused is not None and not isinstance(fused, Experts):
            setattr(owner, child, Experts(fused))
            replaced.append((owner, child, fused))
    return replaced


def to_fused(state: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    """Return a model's state with the matrices of experts in one parameter each, as transformers has them; on the CPU.

    Args:
        state: by name; `<...><name>.<expert>.<matrix>.weight` is (O, I).
        name: of the experts in a block.

    Example:
        >>> state = {f"h.0.mlp.experts.{e}.down_proj.weight": torch.full((2, 3), e) for e in (0, 1)}
        >>> [(key, tuple(tensor.shape)) for key, tensor in to_fused(state, "mlp.experts").items()]
        [('h.0.mlp.experts.down_proj', (2, 2, 3))]
    """
    fused: dict[str, torch.Tensor] = {}
    parts: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in state.items():
        before, found, after = key.partition(f".{name}.")
        number, _, matrix = after.removesuffix(".weight").partition(".")
        if found and number.isdigit():
            parts.setdefault(f"{before}{found}{matrix}", {})[int(number)] = tensor
        else:
            fused[key] = tensor
    return fused | {key: torch.stack([found[number].cpu() for number in sorted(found)]) for key, found in parts.items()}
