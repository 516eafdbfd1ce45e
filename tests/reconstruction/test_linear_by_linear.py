"""Groups, Gram matrices and windows of the tiny LLaMA, for solvers that go linear by linear."""

import pytest
import torch
import torch.nn.functional as F

from cbq.activations import ActivationCache
from cbq.quant.given_integers import GivenIntegers
from cbq.quant.linear import FusedLinear, QuantLinear, quant_linears
from cbq.quant.rounding import AdaRound
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.reconstruction.gptq import GPTQ
from cbq.reconstruction.linear_adaround import LinearAdaRound
from cbq.reconstruction.linear_by_linear import LinearByLinear, gram_matrix, input_groups
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.windows import SlidingWindows

W2A16, W4A4, W16A4 = QuantScheme(2, 16), QuantScheme(4, 4), QuantScheme(16, 4)
W4A4_QKV4 = QuantScheme(4, 4, qkv_bits=4)
QUERIES_IN_8_BITS = QuantScheme(4, 4, overrides=[{"linears": ".*q_proj", "act_bits": 8}])
NAMES = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"] + [
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
]
SOLVERS = {
    "gptq": lambda: GPTQ(ReconstructionLoss()),
    "linear_adaround": lambda: LinearAdaRound(ReconstructionLoss(), AdaRound, num_steps=60),
}


class Watcher(LinearByLinear):
    """Rounds to nearest, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__(ReconstructionLoss())
        self.given: list[tuple[QuantLinear, torch.Tensor]] = []

    def solve_linear_(self, linear: QuantLinear, gram: torch.Tensor) -> None:
        self.given.append((linear, gram))


def names_of(block, linears) -> list[str]:
    names = {id(module): name for name, module in block.named_modules()}
    return [names[id(linear)] for linear in linears]


@pytest.mark.parametrize(
    ("scheme", "expected"),
    [
        (W2A16, [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]]),
        (W4A4, [NAMES[:3], NAMES[3:4], NAMES[4:6], NAMES[6:]]),
        (QUERIES_IN_8_BITS, [NAMES[:1], NAMES[1:3], NAMES[3:4], NAMES[4:6], NAMES[6:]]),
    ],
    ids=["w2a16", "w4a4", "override"],
)
def test_linears_of_one_input_are_found(make_setup, scheme, expected):
    setup = make_setup(scheme)
    for start, index in ((0, 0), (0, 2)):
        groups = input_groups(setup.cache, start, index)
        assert [names_of(setup.blocks[index], group) for group in groups] == expected
    assert not any(linear._forward_pre_hooks for linear in quant_linears(setup.blocks))


def test_a_clipped_range_is_an_input_of_its_own(make_setup):
    setup = make_setup(W4A4)
    setup.blocks[0].self_attn.k_proj.act_quantizer.clip_ratio.fill_(0.8)
    groups = [names_of(setup.blocks[0], group) for group in input_groups(setup.cache, 0, 0)]
    assert groups[:2] == [[NAMES[0], NAMES[2]], [NAMES[1]]]


@pytest.mark.parametrize("scheme", [W2A16, W4A4], ids=lambda scheme: scheme.label)
def test_gram_matrix_is_that_of_the_inputs(make_setup, scheme):
    """Of what is multiplied in a plain forward of all segments, in every linear of blocks 0 and 1."""
    setup = make_setup(scheme)
    setup.cache.batch_size = 3  # does not divide the 8 segments
    blocks = list(setup.blocks[:2])
    multiplied: dict[int, torch.Tensor] = {}

    def remember(x, weight, bias=None):
        multiplied[len(multiplied)] = x.flatten(0, -2).double()
        return F.linear(x, weight, bias)

    with quant_state(blocks, QuantState.LEARNED):
        with pytest.MonkeyPatch.context() as patch:
            for linear in quant_linears(blocks):
                patch.setattr(linear, "product", remember)
            setup.cache.run_blocks(0, 2, setup.cache.quantized[:])
        assert len(multiplied) == 14
        for index, block in enumerate(blocks):
            for position, name in enumerate(NAMES):
                x = multiplied[7 * index + position]
                gram = gram_matrix(setup.cache, 0, index, block.get_submodule(name))
                assert gram.dtype == torch.float64
                torch.testing.assert_close(gram, x.T @ x, rtol=1e-4, atol=1e-4 * x.square().sum().item() / len(gram))
    assert not any(linear._forward_pre_hooks for linear in quant_linears(setup.blocks))


def test_each_linear_is_solved_on_what_the_solved_ones_give(make_setup):
    """In order, in both blocks of a window, and once each."""
    setup, watcher = make_setup(W4A4), Watcher()
    with torch.no_grad():
        setup.solve(watcher, SlidingWindows(2, 0), [], num_windows=1)
    assert len(watcher.given) == 14

    class Breaker(Watcher):
        """Halves what one linear gives."""

        def __init__(self, position: int) -> None:
            super().__init__()
            self.position = position

        def solve_linear_(self, linear: QuantLinear, gram: torch.Tensor) -> None:
            super().solve_linear_(linear, gram)
            if len(self.given) == self.position + 1:
                linear.weight_quantizer.initial_scale.mul_(0.5)

    for position in (0, 3, 6, 10):
        setup, breaker = make_setup(W4A4), Breaker(position)
        setup.solve(breaker, SlidingWindows(2, 0), [], num_windows=1)
        same = [torch.equal(a[1], b[1]) for a, b in zip(watcher.given, breaker.given, strict=True)]
        reads_the_same = 7 * (position // 7) + {0: 3, 3: 4, 6: 7}[position % 7]
        assert same == [True] * reads_the_same + [False] * (14 - reads_the_same)


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("scheme", [W2A16, W4A4_QKV4], ids=lambda scheme: scheme.label)
def test_windows_end_better_than_round_to_nearest(make_setup, tiny_llama, segments, name, scheme):
    setup, solver = make_setup(scheme), SOLVERS[name]()
    window = SlidingWindows(1).plan(4)[0]
    result = solver.solve(window, setup.cache, [])
    assert (result.start, result.stop) == (0, 1)
    assert result.guard is None or (name == "linear_adaround" and "an output kept round-to-nearest" in result.guard)
    assert result.rec_loss_last < result.rec_loss_rtn
    assert result.rec_loss_first == pytest.approx(result.rec_loss_rtn, rel=1e-5)
    assert result.wall_time_seconds > 0

    def after_block(model) -> torch.Tensor:
        with torch.no_grad():
            return model(segments, output_hidden_states=True).hidden_states[1]

    def loss() -> float:
        return ReconstructionLoss()(after_block(tiny_llama), after_block(setup.model))[0].item()

    assert result.rec_loss_last == pytest.approx(loss(), rel=1e-4)
    linears = quant_linears(setup.blocks[0])
    learned = torch.cat([linear.integers().flatten() for linear in linears])
    nearest = [linear.weight_quantizer.starting_integers(linear.weight).flatten() for linear in linears]
    changed = (learned != torch.cat(nearest)).double().mean().item()
    assert result.changed_integers == pytest.approx(changed)
    assert 0 < changed < 0.5
    with quant_state(setup.blocks[0], QuantState.NEAREST):
        assert result.rec_loss_rtn == pytest.approx(loss(), rel=1e-4)
    assert solver.steps(8) == 0


@pytest.mark.parametrize("name", SOLVERS)
def test_a_whole_model_ends_fused(make_setup, name):
    setup, seen = make_setup(W4A4), []
    results = reconstruct_(
        setup.model,
        setup.blocks,
        setup.segments,
        SlidingWindows(1).plan(4),
        SOLVERS[name](),
        [],
        seen.append,
    )
    assert seen == results
    assert [(result.start, result.stop) for result in results] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert not quant_linears(setup.model)
    assert sum(isinstance(module, FusedLinear) for module in setup.model.modules()) == 4 * 7
    assert setup.logits().isfinite().all()
    assert not any(parameter.requires_grad for parameter in setup.model.parameters())


def test_gptq_is_better_on_the_whole_model(make_setup, tiny_llama, segments):
    with torch.no_grad():
        exact = tiny_llama(segments).logits
    nearest, setup = make_setup(W2A16), make_setup(W2A16)
    with quant_state(nearest.model, QuantState.NEAREST):
        error_of_nearest = (nearest.logits() - exact).square().mean()
    setup.solve(SOLVERS["gptq"](), SlidingWindows(1), [])
    assert (setup.logits() - exact).square().mean() < error_of_nearest


@pytest.mark.parametrize("name", SOLVERS)
def test_a_block_in_an_overlap_is_solved_anew(make_setup, name):
    """From the full-precision weight: on one stream twice is as good as once."""
    setup, solver = make_setup(W2A16), SOLVERS[name]()
    window = SlidingWindows(1).plan(4)[0]
    first = solver.solve(window, setup.cache, [])
    integers = [linear.integers() for linear in quant_linears(setup.blocks[0])]
    last = setup.blocks[0].mlp.down_proj  # no other linear of the block reads what it puts out
    last.rounding = GivenIntegers(torch.zeros_like(last.weight))
    second = solver.solve(window, setup.cache, [])
    assert second.rec_loss_first != first.rec_loss_last
    assert second.rec_loss_last == first.rec_loss_last
    again = [linear.integers() for linear in quant_linears(setup.blocks[0])]
    assert all(torch.equal(a, b) for a, b in zip(integers, again, strict=True))


def test_overlap_mode_solves_only_those_blocks(make_setup):
    setup, watcher = make_setup(W2A16), Watcher()
    watcher.solve(SlidingWindows(2, 1, "overlap").plan(4)[0], setup.cache, [])
    assert [linear for linear, _ in watcher.given] == quant_linears(setup.blocks[1])


@pytest.mark.parametrize("name", SOLVERS)
def test_weights_in_full_precision_stay(make_setup, tiny_llama, name):
    """W16A4: nothing to solve; the inputs are quantized all the same."""
    setup = make_setup(W16A4)
    setup.solve(SOLVERS[name](), SlidingWindows(1), [])
    assert [result.changed_integers for result in setup.results] == [0.0] * 4
    nearest = make_setup(W16A4)
    with quant_state(nearest.model, QuantState.NEAREST):
        assert torch.equal(setup.logits(), nearest.logits())
    for linear_name, module in setup.model.named_modules():
        if isinstance(module, FusedLinear):
            assert torch.equal(module.weight, tiny_llama.get_submodule(linear_name).weight)


def test_streams_hold_what_the_plain_model_passes_on(make_setup):
    """After the last window, the quantized stream is what the final norm of the finished model reads."""
    setup = make_setup(W4A4)
    assert isinstance(setup.cache, ActivationCache)
    setup.solve(SOLVERS["gptq"](), SlidingWindows(1), [])
    with torch.no_grad():
        states = setup.model(setup.segments, output_hidden_states=True).hidden_states
        torch.testing.assert_close(setup.model.model.norm(setup.cache.quantized[:]), states[-1], rtol=1e-4, atol=1e-4)
