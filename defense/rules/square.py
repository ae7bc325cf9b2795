"""Square: random search, without gradients."""

import math
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from defense.threat import ThreatModel, wide


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
        self.best = torch.where(wide(won), x_adv, self.best)
        self.best_loss = torch.where(won, losses, self.best_loss)
        self.asked_again = better & ~won
        self.taken += 1
        return torch.where(wide(self.asked_again), x_adv, self._squares())

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
