"""The update rules of the attack loop: PGD, APGD, Square, and random noise as a control.

A rule starts near the images x (B,C,H,W) in [0, 1]. After each step it gets the surrogate's losses
(B,), its gradients if ``asks_gradient``, and which images continue. All its proposals lie in the
ball and in [0, 1].
"""

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Generator, Tensor

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


@dataclass
class _Climb:
    """State of APGD for B images; every field's first axis is the image."""

    x: Tensor  # clean images
    before: Tensor  # the iterate before the last one
    best: Tensor
    best_gradient: Tensor
    best_loss: Tensor
    last_loss: Tensor
    step: Tensor  # length of a step, in pixel units
    rises: Tensor  # number of times the loss rose since the last checkpoint
    halved: Tensor  # bool: the step was halved at the last checkpoint
    best_then: Tensor  # largest loss at the last checkpoint


@dataclass
class APGD:
    """PGD with momentum that halves its step where the loss stalls; Croce & Hein (2020).

    The step starts at twice the radius. Checkpoints come at ever shorter intervals. There an image
    restarts from its best point with half the step if its loss rose in fewer than three quarters of
    the steps since the last checkpoint, or if its step was not halved there and its largest loss
    has not grown since. ``steps`` is the total number of updates.
    """

    threat: ThreatModel
    steps: int
    generator: Generator
    asks_gradient: bool = True

    momentum = 0.75
    enough_rises = 0.75

    def start(self, x: Tensor) -> Tensor:
        self.taken, self.since = 0, 0
        self.checkpoints = checkpoints(self.steps)
        x_adv = self.threat.random_point(x, generator=self.generator)
        low = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        none = torch.zeros_like(low)
        step = torch.full_like(low, 2.0 * self.threat.eps)
        self.state = _Climb(
            x, x_adv, x_adv, torch.zeros_like(x), low, low, step, none, none.bool(), low
        )
        return x_adv

    def next(self, x_adv: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
        assert gradient is not None
        s = self.state
        if self.taken:
            s.rises = s.rises + (losses > s.last_loss)
        s.last_loss = losses
        better = losses > s.best_loss
        s.best_loss = torch.where(better, losses, s.best_loss)
        s.best = torch.where(_wide(better), x_adv, s.best)
        s.best_gradient = torch.where(_wide(better), gradient, s.best_gradient)
        if self.taken in self.checkpoints:
            x_adv, gradient = self._checkpoint(x_adv, gradient)
        # Croce & Hein (2020), Algorithm 1: z is a PGD step of length ``step`` along a unit step
        # of steepest ascent; the move mixes it with momentum, from the second update on.
        ahead = self.threat.ascend(torch.zeros_like(x_adv), gradient, 255.0)
        z = self.threat.project(x_adv + _wide(s.step) * ahead, s.x)
        pull = self.momentum if self.taken else 1.0
        moved = x_adv + pull * (z - x_adv) + (1.0 - pull) * (x_adv - s.before)
        s.before = x_adv
        self.taken += 1
        self.since += 1
        return self.threat.project(moved, s.x)

    def _checkpoint(self, x_adv: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """Halve the step of images that stall, and put them back to their best point."""
        s = self.state
        # Condition 1: too few rises. Condition 2: same step and same maximum as last time.
        stalled = s.rises < self.enough_rises * self.since
        stalled |= ~s.halved & (s.best_loss <= s.best_then)
        s.step = torch.where(stalled, 0.5 * s.step, s.step)
        x_adv = torch.where(_wide(stalled), s.best, x_adv)
        gradient = torch.where(_wide(stalled), s.best_gradient, gradient)
        s.halved, s.best_then = stalled, s.best_loss
        s.rises, self.since = torch.zeros_like(s.rises), 0
        return x_adv, gradient

    def keep(self, mask: Tensor) -> None:
        self.state = _Climb(**{name: value[mask] for name, value in vars(self.state).items()})


def checkpoints(steps: int) -> set[int]:
    """The checkpoints of APGD, Croce & Hein (2020), as numbers of updates.

    Shares of ``steps``: p_1 = 0.22, then p_{j+1} = p_j + max(p_j - p_{j-1} - 0.03, 0.06).
    """
    points, before, now = set[int](), 0.0, 0.22
    while now <= 1.0:
        points.add(math.ceil(round(now * steps, 6)))
        before, now = now, now + max(now - before - 0.03, 0.06)
    return points


@dataclass
class Square:
    """Gradient-free random squares of +-eps, kept if the loss grows; Andriushchenko et al. (2020).

    For l_inf; `ValueError` otherwise. Against a stochastic defense one lucky loss might never be
    beaten again. So a proposal that looks better is evaluated a second time. It is accepted only if
    its second loss is better, too, and later proposals have to beat that second loss. Losses are
    those of mean logits over the surrogate's replicas.
    """

    threat: ThreatModel
    steps: int
    generator: Generator
    asks_gradient: bool = False

    first_share = 0.8  # of the image's area that the first squares cover

    def __post_init__(self) -> None:
        if self.threat.norm != "linf":
            raise ValueError(f"square: expected norm linf, got {self.threat.norm}")

    def start(self, x: Tensor) -> Tensor:
        """Vertical stripes of +-eps."""
        self.x, self.taken = x, 0
        self.best_loss = torch.full_like(x[:, 0, 0, 0], -torch.inf)
        self.asked_again = torch.zeros_like(self.best_loss, dtype=torch.bool)
        stripes = self._signs(x.shape[0], x.shape[1], 1, x.shape[3])
        self.best = self.threat.project(x + self.threat.eps * stripes, x)
        return self.best

    def next(self, x_adv: Tensor, losses: Tensor, gradient: Tensor | None) -> Tensor:
        better = losses > self.best_loss
        first = torch.full_like(better, self.taken == 0)
        won = better & (self.asked_again | first)
        self.best = torch.where(_wide(won), x_adv, self.best)
        self.best_loss = torch.where(won, losses, self.best_loss)
        self.asked_again = better & ~won
        self.taken += 1
        return torch.where(_wide(self.asked_again), x_adv, self._squares())

    def _squares(self) -> Tensor:
        """The best points so far, each with a square of +-eps at a random position."""
        count, channels, height, width = self.x.shape
        side = max(1, round(math.sqrt(self._share() * height * width)))
        side = min(side, height, width)
        rows, columns = (
            torch.randint(
                size - side + 1, (count, 1), generator=self.generator, device=self.x.device
            )
            for size in (height, width)
        )
        down, along = (torch.arange(size, device=self.x.device) for size in (height, width))
        inside = ((down >= rows) & (down < rows + side))[:, None, :, None]
        inside = inside & ((along >= columns) & (along < columns + side))[:, None, None, :]
        signs = self._signs(count, channels, 1, 1)
        squares = self.threat.project(self.x + self.threat.eps * signs, self.x)
        return torch.where(inside, squares, self.best)

    def _share(self) -> float:
        """Share of the image's area in a square, halved at the published fractions of the steps."""
        done = 10_000 * self.taken / max(1, self.steps)
        halvings = sum(done > at for at in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000))
        return float(self.first_share / 2**halvings)

    def _signs(self, *shape: int) -> Tensor:
        bits = torch.randint(2, shape, generator=self.generator, device=self.x.device)
        return 2.0 * bits.to(self.x.dtype) - 1.0

    def keep(self, mask: Tensor) -> None:
        self.x, self.best = self.x[mask], self.best[mask]
        self.best_loss, self.asked_again = self.best_loss[mask], self.asked_again[mask]


def _wide(values: Tensor) -> Tensor:
    """(B,) -> (B,1,1,1)."""
    return values.view(-1, 1, 1, 1)


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
