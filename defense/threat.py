"""What an attacker may do: a ball around the image, intersected with the pixel box [0, 1]."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Generator, Tensor

Norm = Literal["linf", "l2"]


def wide(values: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1), to be combined with images."""
    return values.view(-1, 1, 1, 1)


def _scaled(x: Tensor, factors: Tensor) -> Tensor:
    """Multiply every image (B,C,H,W) by its own number (B,)."""
    return x * wide(factors)


def _unit(x: Tensor) -> Tensor:
    """Every image scaled to l_2 length 1; zero stays zero. Squares of tiny values underflow, so the
    largest value is made 1 first.
    """
    tiny = torch.finfo(x.dtype).tiny
    x = _scaled(x, 1.0 / x.abs().flatten(1).amax(1).clamp_min(tiny))
    return _scaled(x, 1.0 / x.flatten(1).norm(dim=1).clamp_min(tiny))


@dataclass(frozen=True)
class ThreatModel:
    """The l_inf or l_2 ball of radius ``eps_255`` / 255 pixels, within [0, 1]^D.

    All images are (B,C,H,W) pixels in [0, 1]. Equation (8) of Hill et al. (2021): `ascend` is the
    steepest step under the norm, `project` the projection onto S.
    """

    norm: Norm
    eps_255: float

    def __post_init__(self) -> None:
        if self.norm not in ("linf", "l2"):
            raise ValueError(f"norm: expected linf or l2, got {self.norm!r}")
        if not self.eps_255 >= 0:
            raise ValueError(f"eps_255: expected >= 0, got {self.eps_255}")

    @property
    def eps(self) -> float:
        """The radius in pixel units, where an image spans [0, 1]."""
        return self.eps_255 / 255.0

    def random_point(self, x: Tensor, *, generator: Generator | None) -> Tensor:
        """A point drawn uniformly from the ball around x, then projected to the pixel box."""
        if self.norm == "linf":
            uniform = torch.rand(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            delta = self.eps * (2.0 * uniform - 1.0)
        else:
            direction = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
            radius = torch.rand(len(x), generator=generator, device=x.device, dtype=x.dtype)
            # Uniform in the l_2 ball of dimension D: the volume within radius r grows as r^D.
            radius = self.eps * radius ** (1.0 / x.shape[1:].numel())
            delta = _scaled(_unit(direction), radius)
        return (x + delta).clamp(0.0, 1.0)

    def ascend(self, x_adv: Tensor, gradient: Tensor, step_255: float) -> Tensor:
        """The steepest ascent step of length ``step_255`` / 255 in the norm; not yet projected.

        NaN entries of a gradient count as 0, since one NaN would spoil the image for good.
        """
        step, gradient = step_255 / 255.0, gradient.nan_to_num()
        if self.norm == "linf":
            return x_adv + step * gradient.sign()
        return x_adv + step * _unit(gradient)

    def project(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """The nearest point of the ball around x, clamped to [0, 1]; x itself lies in [0, 1].

        Clamping towards the box brings a point closer to x in every coordinate, so it stays in
        the ball.
        """
        delta = x_adv - x
        if self.norm == "linf":
            delta = delta.clamp(-self.eps, self.eps)
        else:
            length = delta.flatten(1).norm(dim=1).clamp_min(torch.finfo(delta.dtype).tiny)
            delta = _scaled(delta, (self.eps / length).clamp(max=1.0))
        return (x + delta).clamp(0.0, 1.0)

    def distance(self, x_adv: Tensor, x: Tensor) -> Tensor:
        """Length of the perturbation in pixel units, (B,)."""
        order = torch.inf if self.norm == "linf" else 2.0
        lengths: Tensor = (x_adv - x).flatten(1).norm(p=order, dim=1)
        return lengths
