"""PGD: projected gradient steps of fixed length."""

from dataclasses import dataclass

from torch import Generator, Tensor

from defense.threat import ThreatModel


@dataclass
class PGD:
    """Projected steepest ascent with steps of fixed length; Madry et al. (2018), equation (8)."""

    threat: ThreatModel
    step_255: float
    generator: Generator
    asks_gradient: bool = True

    def start(self, x: Tensor) -> Tensor:
        self.x = x
        return self.threat.random_point(x, generator=self.generator)

    def next(self, x_adv: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        return self.threat.project(self.threat.ascend(x_adv, gradient, self.step_255), self.x)

    def keep(self, mask: Tensor) -> None:
        self.x = self.x[mask]
