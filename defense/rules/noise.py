"""Random noise, as a control."""

from dataclasses import dataclass

from torch import Generator, Tensor

from defense.threat import ThreatModel


@dataclass
class Noise:
    """Fresh random points of the ball: a control without gradient or memory."""

    threat: ThreatModel
    generator: Generator
    asks_gradient: bool = False

    def start(self, x: Tensor) -> Tensor:
        self.x = x
        return self.threat.random_point(x, generator=self.generator)

    def next(self, x_adv: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
        return self.threat.random_point(self.x, generator=self.generator)

    def keep(self, mask: Tensor) -> None:
        self.x = self.x[mask]
