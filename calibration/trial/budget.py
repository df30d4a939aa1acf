"""A budget for the mean KL divergence: the worst layers stay as they are until it holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from calibration.errors import CalibrationError
from calibration.trial.candidate import candidate, layers_of, only, without
from calibration.trial.measure import Comparison, Reference, Speed
from calibration.trial.prober import Prober
from export.quantized.plan import QuantizationPlan
from runtime.bundle.reader import Bundle
from runtime.console.console import Console

SENSITIVITY_EXAMPLES = 8
"""Questions that each layer by itself is measured with; the whole plan is measured with all."""


@dataclass
class Trial:
    """A plan that was measured.

    Attributes:
        plan: what would be quantized.
        comparison: how far the answers moved.
        speed: of its answers.
        kept: layers that the budget left as they are, the worst first; None is the head.
        sensitivity: mean KL with only one layer quantized, by layer; empty where the budget held at once.
    """

    plan: QuantizationPlan
    comparison: Comparison
    speed: Speed
    kept: tuple[int | None, ...] = ()
    sensitivity: dict[int | None, float] = field(default_factory=dict)

    @property
    def mean_kl(self) -> float:
        """Over all positions, in nats."""
        figures = self.comparison.figures()
        assert figures is not None  # noqa: S101 - there is at least one question
        return figures.mean_kl


class Trials:
    """Measures plans against the answers of the bundle that they are of.

    Args:
        bundle: not quantized.
        reference: its answers.
        prober: the options of the questions.
        form: of the quantized decoder.
        threads: as the runtime takes them.
        console: shown the progress.
    """

    def __init__(
        self,
        bundle: Bundle,
        reference: Reference,
        prober: Prober,
        form: str,
        threads: int | None,
        console: Console,
    ) -> None:
        self._bundle, self._reference, self._asker = bundle, reference, prober
        self._form, self._threads, self._console = form, threads, console

    def run(self, plan: QuantizationPlan, name: str, examples: int | None = None) -> Trial:
        """Measures one plan, over all questions or the first so many."""
        model = candidate(self._bundle, plan, self._form, self._threads)
        prober = Prober(model, self._asker.max_tiles, self._asker.max_new_tokens)
        count = len(self._reference.answered[:examples])
        with self._console.bar(name, count) as advance:
            comparison, speed = self._reference.compare(prober, advance, examples)
        return Trial(plan, comparison, speed)


def fit_budget(trials: Trials, whole: Trial, budget: float, console: Console) -> Trial:
    """The plan with the most layers quantized whose mean KL is within a budget.

    Each layer is measured by itself first. Then the worst are left as they are, as many as it takes: found by halving,
    since leaving out one more never makes answers much worse.

    Args:
        trials: what measures.
        whole: the plan with everything quantized, measured.
        budget: most mean KL, in nats.
        console: told each finding.

    Raises:
        CalibrationError: no layer can be quantized within it.
    """
    if whole.mean_kl <= budget:
        return whole
    layers = sorted(layers_of(whole.plan), key=_place)
    console.say(
        f"mean KL {whole.mean_kl:.2e} is above the budget of {budget:.2e}: measuring each of {len(layers)} layers"
    )
    sensitivity = {
        layer: trials.run(only(whole.plan, layer), name(layer), SENSITIVITY_EXAMPLES).mean_kl for layer in layers
    }
    worst = sorted(layers, key=lambda layer: sensitivity[layer], reverse=True)
    holds: Trial | None = None
    fewest, most = 1, len(worst) - 1
    while fewest <= most:
        count = (fewest + most) // 2
        trial = trials.run(without(whole.plan, worst[:count]), f"without {count} layers")
        console.say(f"without {_names(worst[:count])}: mean KL {trial.mean_kl:.2e}")
        if trial.mean_kl <= budget:
            holds, most = trial, count - 1
            holds.kept = tuple(worst[:count])
        else:
            fewest = count + 1
    if holds is None:
        least = worst[-1]
        raise CalibrationError(
            f"--max-kl {budget:g} cannot be held: {name(least)} alone, the least sensitive, gives a mean KL of "
            f"{sensitivity[least]:.2e}, everything {whole.mean_kl:.2e}; nothing was written. Allow more, or choose "
            "--mode w8a16"
        )
    holds.sensitivity = sensitivity
    return holds


def name(layer: int | None) -> str:
    """A layer for people."""
    return "lm_head" if layer is None else f"layer {layer}"


def _names(layers: Sequence[int | None]) -> str:
    return ", ".join(map(name, layers))


def _place(layer: int | None) -> float:
    return float("inf") if layer is None else layer
