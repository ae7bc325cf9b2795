"""Two transformations that need no training (Guo et al. 2018): JPEG and total variation."""

import io
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Generator, Tensor

from defense.purifier import Purifier
from defense.systems.system import System


@dataclass(frozen=True)
class Jpeg(System):
    """JPEG of a ``quality`` from 1 to 100, and back."""

    title: ClassVar[str] = "JPEG"
    source: ClassVar[str] = "Guo et al. 2018"
    own_attack: ClassVar[str] = "transfer"

    quality: int

    def purifier(self, network: Any) -> Purifier:
        def purify(x: Tensor, *, generator: Generator) -> Tensor:
            pixels = (255 * x).round().clamp(0, 255).to(torch.uint8).cpu().permute(0, 2, 3, 1)
            read = []
            for image in pixels.numpy():
                with io.BytesIO() as file:
                    Image.fromarray(image.squeeze()).save(file, "jpeg", quality=self.quality)
                    read.append(np.atleast_3d(np.asarray(Image.open(file))))
            return torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2).to(x) / 255

        return purify


@dataclass(frozen=True)
class TotalVariation(System):
    """The image u near x of small total variation: argmin of |u - x|^2 / 2 + ``weight`` TV(u).

    Found by ``steps`` of the dual projection of Chambolle (2004), one channel at a time.
    """

    title: ClassVar[str] = "total variation"
    source: ClassVar[str] = "Guo et al. 2018"
    own_attack: ClassVar[str] = "transfer"

    weight: float
    steps: int

    def purifier(self, network: Any) -> Purifier:
        return Chambolle(self.weight, self.steps)


@dataclass(frozen=True)
class Chambolle:
    """Total variation denoising; differentiable."""

    weight: float
    steps: int

    differentiable = True

    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        """Pixels (N,C,H,W) -> the same shape."""
        p = x.new_zeros(2, *x.shape)
        for _ in range(self.steps):
            slope = forward_differences(x - self.weight * minus_divergence(p))
            length = slope.square().sum(0).add(1e-12).sqrt()
            p = (p + 0.25 / self.weight * slope) / (1 + 0.25 / self.weight * length)
        return x - self.weight * minus_divergence(p)


def forward_differences(u: Tensor) -> Tensor:
    """Down and to the right, 0 at the border: (N,C,H,W) -> (2,N,C,H,W)."""
    down = torch.diff(u, dim=-2, append=u[..., -1:, :])
    return torch.stack([down, torch.diff(u, dim=-1, append=u[..., -1:])])


def minus_divergence(p: Tensor) -> Tensor:
    """The adjoint of `forward_differences`: (2,N,C,H,W) -> (N,C,H,W)."""
    down, right = p
    zero_row, zero_column = torch.zeros_like(down[..., :1, :]), torch.zeros_like(right[..., :1])
    rows = torch.diff(torch.cat([zero_row, down[..., :-1, :], zero_row], -2), dim=-2)
    columns = torch.diff(torch.cat([zero_column, right[..., :-1], zero_column], -1), dim=-1)
    return -(rows + columns)
