"""A budget for the mean KL divergence: the layers that cost most are left unquantized until it holds."""

from __future__ import annotations

import bisect
import math
from dataclasses import dataclass, field, replace

from calibration import CalibrationError
from calibration.trial.candidate import candidate, layers_of, only, without
from calibration.trial.measure import Comparison, Reference
from calibration.trial.prober import Prober
from export.quantized.plan import QuantizationPlan
from export.quantized.weights import DecoderWeights
from runtime.console.console import Console

SENSITIVITY_EXAMPLES = 8
"""How many questions each single layer is measured with. Whole plans are measured with all."""


@dataclass(frozen=True)
class Trial:
    """A plan that was measured.

    Attributes:
        plan: what is quantized.
        comparison: how far the answers moved.
        kept: layers that are left unquantized to keep within the budget, the worst first; None is the head.
        sensitivity: mean KL with only one layer quantized, by layer; empty where the whole plan is within the budget.
    """

    plan: QuantizationPlan
    comparison: Comparison
    kept: tuple[int | None, ...] = ()
    sensitivity: dict[int | None, float] = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        """The mean KL divergence over all positions, in nats."""
        figures = self.comparison.figures()
        assert figures is not None  # noqa: S101 - there is at least one question
        return figures.mean_kl


class Trials:
    """Measures plans against the answers of the unquantized bundle.

    Args:
        weights: the decoder of the unquantized bundle.
        reference: its answers.
        form: of the quantized decoder, ``qdq`` or ``cpu``.
        threads: CPU threads to compute with; None for ONNX Runtime's choice.
        console: shows the progress.
    """

    def __init__(
        self, weights: DecoderWeights, reference: Reference, form: str, threads: int | None, console: Console
    ) -> None:
        self._weights, self._reference, self._form, self._threads = weights, reference, form, threads
        self.console = console

    def run(self, plan: QuantizationPlan, name: str, examples: int | None = None) -> Trial:
        """Measures one plan with the first ``examples`` questions, or with all."""
        model, asked = candidate(self._weights, plan, self._form, self._threads), self._reference.prober
        prober = Prober(model, asked.max_tiles, asked.max_new_tokens)
        with self.console.bar(name, len(self._reference.answered[:examples])) as advance:
            return Trial(plan, self._reference.compare(prober, advance, examples))


def fit_budget(trials: Trials, whole: Trial, budget: float) -> Trial:
    """Finds the plan with the most layers quantized whose mean KL is within a budget.

    Each layer is measured by itself first. Then the fewest of the worst layers are left unquantized. Their number is
    found by bisection: with one layer less, answers are hardly ever worse.

    Args:
        trials: what measures.
        whole: the plan with everything quantized, measured.
        budget: the largest mean KL, in nats.

    Raises:
        CalibrationError: no layer can be quantized within the budget.
    """
    if whole.mean_kl <= budget:
        return whole
    layers = sorted(layers_of(whole.plan), key=lambda layer: math.inf if layer is None else layer)
    trials.console.say(
        f"mean KL {whole.mean_kl:.2e} is above the budget of {budget:.2e}: measuring {len(layers)} layers one by one"
    )
    sensitivity = {
        layer: trials.run(only(whole.plan, layer), layer_name(layer), SENSITIVITY_EXAMPLES).mean_kl for layer in layers
    }
    worst = sorted(layers, key=lambda layer: sensitivity[layer], reverse=True)
    found: dict[int, Trial] = {}

    def is_enough(count: int) -> bool:
        """Says whether the budget holds without so many of the worst layers."""
        trial = trials.run(without(whole.plan, worst[:count]), f"without {count} layers")
        trials.console.say(f"without {', '.join(map(layer_name, worst[:count]))}: mean KL {trial.mean_kl:.2e}")
        found[count] = replace(trial, kept=tuple(worst[:count]), sensitivity=sensitivity)
        return trial.mean_kl <= budget

    counts = range(1, len(worst))
    place = bisect.bisect_left(counts, True, key=is_enough)
    if place == len(counts):
        least = worst[-1]
        raise CalibrationError(
            f"--max-kl {budget:g} cannot be held: {layer_name(least)} alone, the least sensitive, has a mean KL of "
            f"{sensitivity[least]:.2e}, all layers together {whole.mean_kl:.2e}; nothing was written. Raise --max-kl, "
            "or use --mode w8a16"
        )
    return found[counts[place]]


def layer_name(layer: int | None) -> str:
    """Names a layer for people."""
    return "lm_head" if layer is None else f"layer {layer}"
