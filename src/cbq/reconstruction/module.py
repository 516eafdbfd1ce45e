"""One sliding window as a LightningModule (paper Eq. 13).

Shapes: B batch, T tokens, D hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import lightning as L
import torch
from torch import nn

from cbq.activations import ActivationCache
from cbq.quant.linear import quant_linears
from cbq.quant.quantizer import WeightQuantizer, act_quantizers
from cbq.reconstruction.descent import Descent
from cbq.reconstruction.losses import ReconstructionLoss
from cbq.reconstruction.norms import LearnedGain
from cbq.reconstruction.scaling import WindowScaling
from cbq.reconstruction.windows import Window


@dataclass(frozen=True)
class LearningRates:
    """Adam's rates of the step sizes; a rounding brings its own. 0 does not learn.

    Args:
        weight_scale: of what S_W is learned by.
        act_scale: of the multiplier on S_X.
        norm: of the multiplier on the gains of norms. Not in the paper.

    Source: section 5.1.
    """

    weight_scale: float = 1e-3
    act_scale: float = 1e-4
    norm: float = 0.0


class WindowModule(L.LightningModule):
    """The quantized blocks of one window, and the total loss that teaches them.

    There is no teacher inside: targets come with the batch, from the cache's full-precision stream. `parameters()` is
    exactly what the window learns.

    Args:
        window: which blocks.
        cache: runs them with the arguments that the model would pass.
        loss: the reconstruction loss.
        compensation_weight: the gamma of Eq. 13.
        learning_rates: of the step sizes.
        descent: how what is learned is moved.
        scaling: the channel scales that are learned with the window, if any.
        gains: of norms, those that are learned with the window.
        homologous_weight: weight of a second reconstruction term whose target is the full-precision blocks on the
            quantized stream; 0 leaves it out.
        accumulate_grad_batches: batches an optimizer step.

    Attributes:
        beta: the exponent of Eq. 12, or None while the compensation loss is off. Set by `BetaAnnealing`.
        losses: the loss terms by logged name, detached, on the device: means over the batches of the present
            optimizer step so far.
        loss_at_start: the reconstruction loss before learning, hard rounded, if it was measured; for display.
        loss_nearest: likewise, rounded to nearest.
        gradient_norms: of the present optimizer step, by group, on the device. Set by `FiniteSteps`.
    """

    def __init__(
        self,
        window: Window,
        cache: ActivationCache,
        loss: ReconstructionLoss,
        compensation_weight: float,
        learning_rates: LearningRates,
        descent: Descent | None = None,
        scaling: WindowScaling | None = None,
        gains: Sequence[LearnedGain] = (),
        homologous_weight: float = 0.0,
        accumulate_grad_batches: int = 1,
    ) -> None:
        super().__init__()
        self.window = window
        self.cache = cache
        self.loss = loss
        self.compensation_weight = compensation_weight
        self.homologous_weight = homologous_weight
        self.accumulate_grad_batches = accumulate_grad_batches
        self.beta: float | None = None
        self.losses: dict[str, torch.Tensor] = {}
        self.loss_at_start: float | None = None
        self.loss_nearest: float | None = None
        self.gradient_norms: dict[str, torch.Tensor] = {}
        # The blocks stay out of this module's registry: `parameters()` holds nothing frozen, and Lightning's move to
        # the CPU after a fit leaves their weights where they are.
        self.blocks = tuple(cache.blocks[window.start : window.stop])
        self.roundings = tuple(
            linear.rounding
            for linear in quant_linears(list(cache.blocks[window.rounding_start : window.stop]))
            if linear.weight_quantizer is not None
        )
        blocks = list(self.blocks)
        weight_quantizers = [linear.weight_quantizer for linear in quant_linears(blocks) if linear.weight_quantizer]
        self.quantizers = (*weight_quantizers, *act_quantizers(blocks))
        self.descent = descent or Descent()
        self.groups = self._parameter_groups(learning_rates, scaling, gains)
        self.learned = nn.ParameterList([p for group in self.groups.values() for p in group["params"]])

    def _parameter_groups(
        self, learning_rates: LearningRates, scaling: WindowScaling | None, gains: Sequence[LearnedGain]
    ) -> dict[str, dict]:
        """Return optimizer groups by logged name, without the empty ones and those of rate 0."""
        weight_scales = [p for q in self.quantizers if isinstance(q, WeightQuantizer) for p in q.parameters()]
        act_scales = [q.range_multiplier for q in act_quantizers(list(self.blocks)) if q.has_multiplier]
        rounding_rate = self.roundings[0].learning_rate if self.roundings else 0.0
        groups = {
            "weight_scale": (weight_scales, learning_rates.weight_scale),
            "act_scale": (act_scales, learning_rates.act_scale),
            "rounding": ([p for rounding in self.roundings for p in rounding.parameters()], rounding_rate),
            "norm": ([gain.multiplier for gain in gains], learning_rates.norm),
            "channel_scale": (list(scaling.parameters()), scaling.learning_rate) if scaling else ([], 0.0),
        }
        return {name: {"params": params, "lr": rate} for name, (params, rate) in groups.items() if params and rate}

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the window's output (B, T, D) for its input (B, T, D)."""
        return self.cache.run_blocks(self.window.start, self.window.stop, hidden)

    def compensation_loss(self) -> torch.Tensor | float:
        """Return the compensation losses of the last forward, averaged over the window's linears; 0 while it is off."""
        if self.beta is None:
            return 0.0
        penalties = [rounding.penalty() for rounding in self.roundings]
        penalties = [penalty for penalty in penalties if penalty is not None]
        return sum(penalties) / len(penalties) if penalties else 0.0

    def training_step(self, batch: list[torch.Tensor], batch_index: int) -> torch.Tensor:
        """Return the total loss of a batch: input (B, T, D), target (B, T, D), and the homologous target if any.

        Source: Eq. 13.
        """
        hidden, target, *homologous = batch
        for rounding in self.roundings:
            rounding.beta = self.beta
        output = self(hidden)
        reconstruction_loss, terms = self.loss(target, output)
        if homologous:
            second, second_terms = self.loss(homologous[0], output)
            reconstruction_loss = reconstruction_loss + self.homologous_weight * second
            terms |= {f"homologous_{name}": term for name, term in second_terms.items()}
        compensation_loss = self.compensation_loss()
        total_loss = reconstruction_loss + self.compensation_weight * compensation_loss
        losses = {f"loss/{name}": term.detach() for name, term in terms.items()} | {
            "loss/rec": reconstruction_loss.detach(),
            "loss/com": torch.as_tensor(compensation_loss).detach(),
            "loss/total": total_loss.detach(),
        }
        position = batch_index % self.accumulate_grad_batches
        if position:
            means = self.losses
            losses = {name: means[name] + (loss - means[name]) / (position + 1) for name, loss in losses.items()}
        self.losses = losses
        return total_loss

    def configure_optimizers(self) -> dict:
        """Return the optimizer, and its schedule over all steps of the window."""
        optimizer = self.descent.optimizer(list(self.groups.values()))
        schedule = self.descent.schedule(optimizer, self.trainer.max_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
