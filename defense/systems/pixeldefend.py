"""PixelDefend (Song et al. 2018): each pixel becomes the likeliest one near it, by a PixelCNN."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from defense.purifier import Purifier
from defense.systems.system import Fit, System


class GatedLayer(nn.Module):
    """One layer of the gated PixelCNN (van den Oord et al. 2016, Figure 2).

    The vertical stack at a pixel sees the rows above and its own row, the horizontal one the pixels
    to the left. The vertical stack enters the horizontal one a row later, so together they see all
    pixels before this one in raster order, and no other. The ``first`` layer leaves out the pixel
    itself (mask A), later ones see its features (mask B).
    """

    def __init__(self, inputs: int, width: int, size: int, *, first: bool) -> None:
        super().__init__()
        self.reach, self.first = size // 2, first
        self.vertical = nn.Conv2d(inputs, 2 * width, (self.reach + 1, size))
        self.down = nn.Conv2d(2 * width, 2 * width, 1)
        self.horizontal = nn.Conv2d(inputs, 2 * width, (1, self.reach + (not first)))
        self.out = nn.Conv2d(width, width, 1)

    def forward(self, v: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Both stacks, (B,width,H,W)."""
        reach, columns = self.reach, h.shape[3]
        above = self.vertical(F.pad(v, (reach, reach, reach, 0)))
        shifted = F.pad(above, (0, 0, 1, 0))[:, :, :-1]
        left = self.horizontal(F.pad(h, (reach, 0, 0, 0)))[..., :columns]
        across = self.out(gate(left + self.down(shifted)))
        return gate(above), across if self.first else across + h


def gate(x: Tensor) -> Tensor:
    """tanh(a) sigmoid(b) of the two halves of the channels (equation 2 there)."""
    a, b = x.chunk(2, dim=1)
    return torch.tanh(a) * torch.sigmoid(b)


class PixelCNN(nn.Module):
    """Logits of each pixel's grey level, given the pixels before it in raster order.

    Grey images (B,1,H,W) in [0, 1] -> (B, levels, H, W).
    """

    def __init__(self, levels: int, width: int, layers: int) -> None:
        super().__init__()
        self.levels = levels
        self.layers = nn.ModuleList(
            GatedLayer(1 if i == 0 else width, width, 5 if i == 0 else 3, first=i == 0)
            for i in range(layers)
        )
        self.head = nn.Sequential(nn.ReLU(), nn.Conv2d(width, levels, 1))

    def forward(self, x: Tensor) -> Tensor:
        v = h = 2.0 * x - 1.0
        for layer in self.layers:
            v, h = layer(v, h)
        logits: Tensor = self.head(h)
        return logits

    def level(self, x: Tensor) -> Tensor:
        """Pixels in [0, 1] -> the nearest level, int64 0 to levels - 1."""
        return (x * (self.levels - 1)).round().long().clamp(0, self.levels - 1)


@dataclass(frozen=True)
class GreedyDecoding:
    """Algorithm 1 of Song et al. (2018).

    In raster order each pixel becomes the likeliest level within ``radius`` of its old value,
    given the pixels already replaced. Deterministic, with no useful gradient.
    """

    network: PixelCNN
    radius: float

    @torch.no_grad()
    def __call__(self, x: Tensor, *, generator: Generator) -> Tensor:
        """Grey images (N,1,H,W) in [0, 1] -> the same shape, each pixel one of the levels."""
        levels = torch.linspace(0.0, 1.0, self.network.levels, device=x.device, dtype=x.dtype)
        purified = x.clone()
        for row in range(x.shape[2]):
            for column in range(x.shape[3]):
                old = x[:, 0, row, column, None]
                logits = self.network(purified[:, :, : row + 1])[:, :, row, column]  # no row below
                distance = (levels - old).abs()
                # The nearest level is allowed even where the radius is smaller than the spacing.
                near = distance <= torch.clamp(distance.amin(1, keepdim=True), min=self.radius)
                purified[:, 0, row, column] = levels[
                    logits.masked_fill(~near, -torch.inf).argmax(1)
                ]
        return purified


@dataclass(frozen=True)
class PixelDefend(System):
    """A gated PixelCNN of ``layers`` layers on ``levels`` grey levels; radius ``eps_255`` / 255."""

    title: ClassVar[str] = "PixelDefend"
    source: ClassVar[str] = "Song et al. 2018"
    own_attack: ClassVar[str] = "transfer"

    levels: int
    width: int
    layers: int
    eps_255: float
    fit: Fit

    def network(self, shape: tuple[int, int, int], bare: nn.Module) -> nn.Module:
        if shape[0] != 1:
            raise ValueError(f"images: PixelDefend expects grey ones, got {shape[0]} channels")
        return PixelCNN(self.levels, self.width, self.layers)

    def loss(
        self, network: Any, bare: nn.Module, x: Tensor, y: Tensor, *, generator: Generator
    ) -> Tensor:
        """Cross-entropy in nats a pixel."""
        return F.cross_entropy(network(x), network.level(x[:, 0]))

    def purifier(self, network: Any) -> Purifier:
        return GreedyDecoding(network, self.eps_255 / 255.0)
