"""Windows of the tiny LLaMA, solved; 8 steps each unless a test says otherwise."""

import itertools
import weakref

import lightning as L
import pytest
import torch

from cbq.activations import ActivationCache
from cbq.errors import InputError
from cbq.quant.linear import FusedLinear, quant_linears
from cbq.quant.rounding import AdaRound, DenseSTE, LoRARounding, LoRASTE, Nearest
from cbq.quant.scheme import QuantScheme
from cbq.quant.state import QuantState, quant_state
from cbq.reconstruction.curves import WindowCurves
from cbq.reconstruction.loop import reconstruct_
from cbq.reconstruction.windows import SlidingWindows
from cbq.streams.kinds import Stream

W2A16, W4A4, W16A4 = QuantScheme(2, 16), QuantScheme(4, 4), QuantScheme(16, 4)
W4A4_QKV4 = QuantScheme(4, 4, qkv_bits=4)
INTEGERS = ("epochs", "batch_size", "accumulate_grad_batches")
MULTIPLIERS = ("multiplier", "range_multiplier")
PARAMETERS_OF = {
    DenseSTE: {"offset_values"},
    AdaRound: {"logits"},
    LoRASTE: {"a1", "a2"},
    LoRARounding: {"a1", "a2"},
}


class Watcher(L.Callback):
    """As each fit begins, copies the whole model and names what is to be learned; keeps every step's batch."""

    def __init__(self, setup) -> None:
        self.setup = setup
        self.before: list[dict[str, torch.Tensor]] = []
        self.learned: list[set[str]] = []
        self.batches: list[list[torch.Tensor]] = []

    def on_fit_start(self, trainer, module) -> None:
        self.before.append(self.setup.state())
        learned = {id(parameter) for parameter in module.parameters()}
        self.learned.append({name for name, p in self.setup.model.named_parameters() if id(p) in learned})

    def on_train_batch_start(self, trainer, module, batch, batch_index) -> None:
        self.batches.append(batch)


@pytest.fixture
def solve_two(make_setup, make_solver):
    """Solves windows (0, 2) and (1, 3); block 0 ends fused, blocks 1 and 2 as the solver leaves them."""

    def solve(scheme, rounding_blocks: str = "window", **options) -> tuple:
        setup, solver = make_setup(scheme), make_solver(**options)
        watcher, windows = Watcher(setup), SlidingWindows(2, 1, rounding_blocks)
        setup.solve(solver, windows, [watcher], num_windows=1)
        setup.between = setup.state()
        solver.solve(windows.plan(4)[1], setup.cache, [watcher])
        return setup, watcher

    return solve


def reference_loss(target: torch.Tensor, output: torch.Tensor) -> float:
    """Eq. 7 by torch's own modules."""
    divergence = torch.nn.KLDivLoss(reduction="batchmean")
    divergences = divergence(output.flatten(0, 1).log_softmax(-1), target.flatten(0, 1).softmax(-1))
    return ((output - target).norm(dim=-1).mean() + divergences).item()


@pytest.mark.parametrize("kind", [DenseSTE, LoRASTE, AdaRound, LoRARounding])
def test_only_declared_parameters_change(solve_two, kind):
    """In the second window: no weight, no buffer, no other block."""
    setup, watcher = solve_two(W4A4, kind=kind)
    before, after, learned = watcher.before[1], setup.state(), watcher.learned[1]
    assert set(before) == set(after)
    assert {name for name in before if not torch.equal(before[name], after[name])} == learned
    assert {name.split(".")[2] for name in learned} == {"1", "2"}
    assert {name.rsplit(".")[-1] for name in learned} == {*MULTIPLIERS, *PARAMETERS_OF[kind]}
    assert not any(parameter.requires_grad for parameter in setup.model.parameters())


def test_step_sizes_of_queries_keys_and_values_are_learned(solve_two, run):
    setup, watcher = solve_two(W4A4_QKV4)
    suffixes = {f"self_attn.qkv_quantizer.{part}.range_multiplier" for part in ("query", "key", "value")}
    names = {f"model.layers.{block}.{suffix}" for block in (1, 2) for suffix in suffixes}
    assert names < watcher.learned[1]
    after = setup.state()
    assert all(not torch.equal(watcher.before[1][name], after[name]) for name in names)
    assert {block.self_attn.qkv_quantizer.state for block in setup.blocks[1:3]} == {QuantState.LEARNED}
    assert setup.blocks[3].self_attn.qkv_quantizer.state is QuantState.FULL_PRECISION
    finished, plain = run(W4A4_QKV4), run(W4A4)
    assert finished.results[0].rec_loss_rtn > plain.results[0].rec_loss_rtn
    assert all(result.rec_loss_last < result.rec_loss_rtn for result in finished.results)


def test_overlap_mode_learns_only_those_blocks_rounding(solve_two):
    """The second window of (2, 1): rounding of block 2, step sizes of 1 and 2."""
    setup, watcher = solve_two(W4A4, rounding_blocks="overlap")
    after = setup.state()
    changed = {name for name in after if not torch.equal(watcher.before[1][name], after[name])}
    assert {name.split(".")[2] for name in changed if name.endswith("offset_values")} == {"2"}
    for multiplier in MULTIPLIERS:
        assert {name.split(".")[2] for name in changed if name.endswith(multiplier)} == {"1", "2"}


@pytest.mark.parametrize("restart", [False, True])
def test_a_block_in_an_overlap_continues_or_restarts(solve_two, restart):
    setup, watcher = solve_two(W4A4, restart=restart)
    names = [name for name in watcher.learned[1] if name.startswith("model.layers.1.")]
    assert len(names) == 3 * 7
    for name in names:
        start = 0.0 if name.endswith("offset_values") else 1.0
        fresh = torch.full_like(setup.between[name], start)
        assert not torch.equal(setup.between[name], fresh), "the first window learned it"
        assert torch.equal(watcher.before[1][name], fresh if restart else setup.between[name])


def test_soft_roundings_end_hard(solve_two):
    setup, _ = solve_two(W2A16, kind=AdaRound, hard_start=1.0)
    for linear in quant_linears(list(setup.blocks[1:3])):
        assert linear.state is QuantState.LEARNED
        integers = linear.weight_quantizer.integers(linear.weight, linear.rounding, *linear.weight_quantizer.grid())
        assert torch.equal(integers, integers.round())
    assert {linear.state for linear in quant_linears(setup.blocks[3])} == {QuantState.FULL_PRECISION}


@pytest.mark.parametrize("scheme", [W2A16, W4A4], ids=lambda scheme: scheme.label)
@pytest.mark.parametrize(
    ("kind", "learning_rate"),
    [(DenseSTE, 5e-3), (LoRASTE, 2e-2), (AdaRound, 1e-2)],
    ids=["dense_ste", "lora_ste", "adaround"],
)
def test_a_trained_window_is_better_than_round_to_nearest(run, scheme, kind, learning_rate):
    setup = run(scheme, num_windows=2, kind=kind, learning_rate=learning_rate, epochs=3, batch_size=1)
    for result in setup.results:
        assert result.rec_loss_last < result.rec_loss_rtn
        assert result.rec_loss_last < result.rec_loss_first
        assert 0 < result.changed_integers < 0.5
        assert result.wall_time_seconds > 0
    assert setup.results[0].rec_loss_first == pytest.approx(setup.results[0].rec_loss_rtn, rel=1e-6)
    assert setup.results[1].rec_loss_first != setup.results[1].rec_loss_rtn, "its first block was learned before"


def test_losses_are_those_of_the_plain_forward(make_setup, make_solver, tiny_llama, segments):
    """The first window's: the model's hidden state after two blocks, nearest and learned, against full precision."""
    setup = make_setup(W4A4)
    result = make_solver().solve(SlidingWindows(2).plan(4)[0], setup.cache, [])

    def state_after_two_blocks(model) -> torch.Tensor:
        with torch.no_grad():
            return model(segments, output_hidden_states=True).hidden_states[2]

    target = state_after_two_blocks(tiny_llama)
    assert result.rec_loss_last == pytest.approx(reference_loss(target, state_after_two_blocks(setup.model)), rel=1e-4)
    with quant_state(list(setup.blocks[:2]), QuantState.NEAREST):
        nearest = reference_loss(target, state_after_two_blocks(setup.model))
    assert result.rec_loss_rtn == pytest.approx(nearest, rel=1e-4)
    assert result.guard is None


def test_quantized_stream_is_the_finished_model(run):
    """After the last window it is what the final norm of the finished model reads."""
    setup = run(W4A4)
    with torch.no_grad():
        states = setup.model(setup.segments, output_hidden_states=True).hidden_states
        torch.testing.assert_close(setup.model.model.norm(setup.cache.quantized[:]), states[-1], rtol=1e-4, atol=1e-4)
    assert not quant_linears(setup.model)
    assert sum(isinstance(module, FusedLinear) for module in setup.model.modules()) == 4 * 7


def test_targets_and_inputs_of_the_second_window(solve_two, tiny_llama, segments):
    """Inputs come from the quantized stream, targets from full precision, the homologous one from both."""
    setup, watcher = solve_two(W4A4, homologous_weight=1.0, batch_size=1, epochs=1)
    batches = watcher.batches[8:]
    assert len(batches) == 8
    with torch.no_grad():
        inputs = setup.model(segments, output_hidden_states=True).hidden_states[1]  # block 0 is finished
        targets = tiny_llama(segments, output_hidden_states=True).hidden_states[3]
        plain = ActivationCache(tiny_llama, tiny_llama.model.layers, segments)
        homologous = plain.map_stream(1, 3, Stream(inputs, inputs.device))[:]
    distances = torch.cdist(torch.cat([batch[0] for batch in batches]).flatten(1), inputs.flatten(1))
    order = distances.argmin(1)
    assert sorted(order.tolist()) == list(range(8)), "every segment once an epoch"
    assert order.tolist() != list(range(8)), "shuffled"
    for i, expected in enumerate((inputs, targets, homologous)):
        torch.testing.assert_close(torch.cat([b[i] for b in batches]), expected[order], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(targets, homologous, atol=1e-2)


@pytest.mark.parametrize("scheme", [W4A4, W16A4], ids=lambda scheme: scheme.label)
def test_rate_zero_leaves_the_multiplier_at_one(solve_two, scheme):
    for rates, still, moved in (
        ({"weight_scale": 0, "act_scale": 1e-2}, "step_size.multiplier", "range_multiplier"),
        ({"act_scale": 0}, "range_multiplier", "step_size.multiplier"),
    ):
        setup, _ = solve_two(scheme, **rates)
        state = setup.state()
        assert all((state[name] == 1).all() for name in state if name.endswith(still))
        learned = [state[name] for name in state if name.endswith(moved) and name.split(".")[2] in "12"]
        assert all((multiplier != 1).any() for multiplier in learned)
        assert learned or (scheme is W16A4 and moved == "step_size.multiplier")


ALL_PARTS = {
    "kind": AdaRound,
    "learning_rate": 1e-2,
    "compensation_weight": 100.0,
    "hard_start": 0.75,
    "num_windows": 2,
}


@pytest.fixture(scope="module")
def baselines() -> dict[str, torch.Tensor]:
    return {}


@pytest.mark.parametrize(
    "change",
    [
        {"kld": 0.0},
        {"l2": 0.0},
        {"weight_scale": 0.0},
        {"act_scale": 0.0},
        {"kind": Nearest},
        {"kind": DenseSTE},
        {"kind": LoRARounding},
        {"windows": SlidingWindows(2, 0)},
        {"windows": SlidingWindows(1)},
        {"windows": SlidingWindows(2, 1, "overlap")},
        {"learning_rate": 0.0},
        {"compensation_weight": 0.0},
        {"beta_start": 4.0},
        {"beta_end": 10.0},
        {"warmup": 0.5},
        {"hard_start": 0.5},
        {"homologous_weight": 1.0},
        {"restart": True},
        {"seed": 1},
        {"epochs": 3},
        {"batch_size": 4},
        {"accumulate_grad_batches": 2},
        {},
    ],
    ids=lambda change: ", ".join(change) or "the same again",
)
def test_nothing_is_wired_to_nothing(run, baselines, change):
    """Each part, taken out or changed, changes the finished model; the same once more gives the same bits."""
    if not baselines:
        baselines["logits"] = run(W4A4, **ALL_PARTS).logits()
    assert torch.equal(run(W4A4, **(ALL_PARTS | change)).logits(), baselines["logits"]) == (not change)


def test_homologous_terms_are_logged(run):
    rows: list[dict[str, float]] = []
    run(W4A4, callbacks=[WindowCurves(rows.extend)], homologous_weight=2.0)
    for row in rows:
        first, second = row["loss/l2"] + row["loss/kld"], row["loss/homologous_l2"] + row["loss/homologous_kld"]
        assert row["loss/rec"] == pytest.approx(first + 2 * second, rel=1e-5)
    for first, row in itertools.pairwise(rows):
        if row["window"] > first["window"]:
            assert row["loss/homologous_l2"] != row["loss/l2"], "the quantized stream has left full precision"


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_every_window_size(run, window):
    windows = SlidingWindows(window)
    setup = run(W2A16, windows)
    assert [(result.start, result.stop) for result in setup.results] == [(w.start, w.stop) for w in windows.plan(4)]
    assert setup.results[-1].rec_loss_last < setup.results[-1].rec_loss_rtn
    assert setup.logits().isfinite().all()


def test_activations_only(run, tiny_llama):
    """W16A4: nothing but S_X to learn, weights as they were."""
    setup = run(W16A4, act_scale=1e-2)
    assert [result.changed_integers for result in setup.results] == [0.0] * 3
    for name, module in setup.model.named_modules():
        if isinstance(module, FusedLinear):
            assert torch.equal(module.weight, tiny_llama.get_submodule(name).weight)
            assert module.act_quantizer.range_multiplier.item() != 1


@pytest.mark.parametrize("scheme", [W4A4, QuantScheme(16, 16)], ids=lambda scheme: scheme.label)
def test_nothing_to_learn_takes_no_step(run, make_setup, scheme):
    """All rates 0, or nothing quantized: round-to-nearest comes out, without a fit."""
    rows: list[list] = []
    setup = run(scheme, callbacks=[WindowCurves(rows.append)], kind=Nearest, weight_scale=0, act_scale=0)
    nearest = make_setup(scheme)
    with quant_state(nearest.model, QuantState.NEAREST):
        assert torch.equal(setup.logits(), nearest.logits())
    assert not rows


@pytest.mark.parametrize(
    ("epochs", "batch_size", "accumulate", "steps"),
    [(2, 2, 1, 8), (3, 1, 1, 24), (2, 3, 1, 6), (2, 8, 1, 2), (3, 100, 1, 3), (2, 1, 3, 6), (2, 3, 2, 4), (1, 2, 9, 1)],
)
def test_steps(make_setup, make_solver, epochs, batch_size, accumulate, steps):
    """Also for a batch larger than the sample, and where they do not divide it."""
    solver = make_solver(epochs=epochs, batch_size=batch_size, accumulate_grad_batches=accumulate)
    setup, rows = make_setup(W2A16), []
    watcher = Watcher(setup)
    solver.solve(SlidingWindows(1).plan(4)[0], setup.cache, [watcher, WindowCurves(rows.extend)])
    assert solver.steps(8) == len(rows) == steps
    assert len(watcher.batches) == epochs * -(-8 // batch_size)
    assert sum(len(batch[0]) for batch in watcher.batches) == 8 * epochs


def test_accumulated_batches_are_one_larger_batch(make_setup, make_solver):
    """Losses, rates, beta and hardening of every step, and what is learned, up to the order of summation."""
    rows, learned = ([], []), []
    for record, options in zip(rows, ({"batch_size": 4}, {"batch_size": 2, "accumulate_grad_batches": 2}), strict=True):
        setup = make_setup(W4A4)
        solver = make_solver(AdaRound, 1e-2, epochs=4, warmup=0.25, hard_start=0.75, **options)
        assert solver.solve(SlidingWindows(2).plan(4)[0], setup.cache, [WindowCurves(record.extend)]).guard is None
        learned.append({name: p for name, p in setup.model.named_parameters() if name.endswith(MULTIPLIERS)})
    assert len(rows[0]) == 8
    assert [row["loss/com"] > 0 for row in rows[0]] == [False] * 2 + [True] * 4 + [False] * 2
    for large, small in zip(*rows, strict=True):
        assert small.keys() == large.keys()
        for name in large.keys() - {"time/step_seconds", "memory/host"}:
            assert small[name] == pytest.approx(large[name], rel=1e-3), name
    for name, parameter in learned[0].items():
        torch.testing.assert_close(learned[1][name], parameter, rtol=1e-3, atol=1e-5)
    assert any((parameter != 1).any() for parameter in learned[0].values())


@pytest.mark.parametrize("kind", [LoRASTE, AdaRound])
def test_model_is_left_as_it_was_found(solve_two, kind):
    """Evaluation mode, no gradient kept, no graph kept."""
    setup, _ = solve_two(W4A4, kind=kind, hard_start=1.0)
    assert not any(block.training or block.self_attn.training for block in setup.blocks)
    for linear in quant_linears(setup.model):
        assert linear.rounding.last_penalty is None
        assert all(parameter.grad is None for parameter in linear.parameters()), "a gradient stays in memory"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[(f"reconstruction.{key}", v) for key in INTEGERS for v in (0, -1, 1.5, 2.0, True, "2", None)],
        *[
            (f"reconstruction.{key}", v)
            for key in ("compensation_weight", "homologous_weight")
            for v in (-1, "1", None, True, float("nan"))
        ],
        *[
            (f"reconstruction.learning_rates.{key}", v)
            for key in ("weight_scale", "act_scale", "norm")
            for v in (-1e-3, "1e-3")
        ],
        *[("rounding.learning_rate", v) for v in (-1e-3, "1e-3", None)],
        *[("reconstruction.hard_start", v) for v in (0, 2)],
        *[("reconstruction.compile", v) for v in ("yes", "true", 1, None, [True])],
    ],
    ids=repr,
)
def test_values_out_of_range(make_solver, key, value):
    with pytest.raises(InputError, match=rf"^{key} "):
        make_solver(**{key.split(".")[-1]: value})


@pytest.mark.parametrize("options", [{"warmup": 0.8}, {"warmup": -1}, {"beta_start": 1.0}, {"beta_end": 0.0}], ids=repr)
def test_annealing_out_of_range(make_solver, options):
    with pytest.raises(InputError, match="reconstruction"):
        make_solver(**options)


def test_finished_windows_leave_memory(make_setup, make_solver):
    """No full-precision weight, rounding or stream of an earlier window is kept alive."""
    setup = make_setup(W4A4)
    first = [weakref.ref(linear) for linear in quant_linears(setup.blocks[0])]
    modules = []

    class Remember(L.Callback):
        def on_fit_start(self, trainer, module) -> None:
            modules.append(weakref.ref(module))

    listeners = [WindowCurves(lambda rows: None), Remember()]
    reconstruct_(
        setup.model,
        setup.blocks,
        setup.segments,
        SlidingWindows(2).plan(4),
        make_solver(),
        listeners,
        lambda result: None,
    )
    assert len(modules) == 3
    assert [module() for module in modules] == [None] * 3
    assert [linear() for linear in first] == [None] * 7
