"""A small convolutional denoiser, and what the systems with one have in common."""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from defense.systems.system import Fit, System


class Denoiser(nn.Module):
    """Noisy images (B,C,H,W) and their noise sigma -> estimates of the clean images.

    A residual network of ``depth`` convolutions without normalization, after DnCNN (Zhang et al.
    2017): it estimates the noise and subtracts it. sigma, in the units of the pixels, is a further
    input channel, so one network serves many noise levels.
    """

    def __init__(self, channels: int, width: int, depth: int) -> None:
        super().__init__()
        if depth < 2:
            raise ValueError(f"depth: expected >= 2, got {depth}")
        planes = [channels + 1, *[width] * (depth - 1), channels]
        layers: list[nn.Module] = []
        for before, after in pairwise(planes):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.SiLU()]
        self.layers = nn.Sequential(*layers[:-1])

    def forward(self, x: Tensor, sigma: Tensor | float) -> Tensor:
        """sigma: one number, or one for each image (B,)."""
        level = torch.as_tensor(sigma, dtype=x.dtype, device=x.device).view(-1, 1, 1, 1)
        plane = level.expand(len(x), 1, *x.shape[2:])
        noise: Tensor = self.layers(torch.cat([x, plane], dim=1))
        return x - level * noise


def squared_error(denoiser: nn.Module, x: Tensor, sigma: Tensor, *, generator: Generator) -> Tensor:
    """Mean squared error of the estimated noise, for clean images x and their noise sigma (B,)."""
    noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    level = sigma.view(-1, 1, 1, 1)
    estimate = (x + level * noise - denoiser(x + level * noise, sigma)) / level
    return F.mse_loss(estimate, noise)


@dataclass(frozen=True)
class DenoiserSystem(System):
    """A system with one `Denoiser` of ``depth`` convolutions, trained for noise ``sigma``."""

    width: int
    depth: int
    sigma: float  # in pixels
    fit: Fit

    def network(self, shape: tuple[int, int, int], bare: nn.Module) -> nn.Module:
        return Denoiser(shape[0], self.width, self.depth)

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        sigma = torch.full_like(x[:, 0, 0, 0], self.sigma)
        return squared_error(network, x, sigma, generator=generator)
