"""The update rules of the attack loop: PGD, APGD, Square, and random noise as a control.

A rule starts near the images x (B,C,H,W) in [0, 1]. After each step it gets the surrogate's losses
(B,), its gradients if ``asks_gradient``, and which images continue. All its proposals lie in the
ball and in [0, 1].
"""

from typing import Literal, Protocol

from torch import Generator, Tensor

from defense.rules.apgd import APGD
from defense.rules.noise import Noise
from defense.rules.pgd import PGD
from defense.rules.square import Square
from defense.threat import ThreatModel

RuleName = Literal["pgd", "apgd", "square", "noise"]


class StepRule(Protocol):
    """One restart of an attack on a batch of images."""

    asks_gradient: bool

    def start(self, x: Tensor) -> Tensor:
        """The first iterate of each image."""

    def next(self, x_adv: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
        """The next iterate after x_adv (B,C,H,W), the last one, given its losses and gradient."""

    def keep(self, mask: Tensor) -> None:
        """Continue with the images in ``mask`` only, (B,) bool."""


def make_rule(
    name: RuleName, threat: ThreatModel, steps: int, step_255: float, generator: Generator
) -> StepRule:
    """A rule for one restart of ``steps`` updates."""
    if name == "pgd":
        return PGD(threat, step_255, generator)
    if name == "apgd":
        return APGD(threat, steps, generator)
    if name == "square":
        return Square(threat, steps, generator)
    if name == "noise":
        return Noise(threat, generator)
    raise ValueError(f"rule: expected pgd, apgd, square or noise, got {name!r}")
