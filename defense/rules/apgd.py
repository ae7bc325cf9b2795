"""APGD: PGD with momentum and its own step size."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from defense.threat import ThreatModel, wide


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
        s.best = torch.where(wide(better), x_adv, s.best)
        s.best_gradient = torch.where(wide(better), gradient, s.best_gradient)
        if self.taken in self.checkpoints:
            x_adv, gradient = self._checkpoint(x_adv, gradient)
        # Croce & Hein (2020), Algorithm 1: z is a PGD step of length ``step`` along a unit step
        # of steepest ascent; the move mixes it with momentum, from the second update on.
        ahead = self.threat.ascend(torch.zeros_like(x_adv), gradient, 255.0)
        z = self.threat.project(x_adv + wide(s.step) * ahead, s.x)
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
        x_adv = torch.where(wide(stalled), s.best, x_adv)
        gradient = torch.where(wide(stalled), s.best_gradient, gradient)
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
