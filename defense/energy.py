"""The energy network: the lightweight ConvNet potential of Nijkamp et al. (2019)."""

import math
from collections.abc import Callable, Sequence

from torch import Tensor, nn


class SmoothLeakyReLU(nn.Module):
    """Leaky ReLU with its corner rounded over a width of about ``sqrt(softness)``.

    h(x) = (1 + s)/2 x + (1 - s)/2 (sqrt(x^2 + e) - sqrt(e)), s the slope (0.05), e the softness
    (0.01). Its second derivative is nonzero, so the exact gradient through a chain is not the
    identity of BPDA, as it is for a piecewise linear energy.
    """

    def __init__(self, negative_slope: float = 0.05, softness: float = 0.01) -> None:
        super().__init__()
        self.negative_slope = negative_slope
        self.softness = softness

    def extra_repr(self) -> str:
        return f"negative_slope={self.negative_slope}, softness={self.softness}"

    def forward(self, x: Tensor) -> Tensor:
        s, e = self.negative_slope, self.softness
        return 0.5 * (1.0 + s) * x + 0.5 * (1.0 - s) * ((x * x + e).sqrt() - math.sqrt(e))


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(0.05),
    "smooth_leaky_relu": SmoothLeakyReLU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
}


class ConvEnergy(nn.Module):
    """Images (N,C,H,W) in net range [-1, 1] -> energies (N,).

    The output is f = (tau^2 / 2) U, the authors' scaling, so that one Langevin step is
    x - grad f(x) + tau z. A 3x3 convolution to ``width`` channels, then 4x4 convolutions of stride
    2 that halve the image and double the channels until no side is longer than 4, then one
    convolution over what is left to a single number. 32x32x3 with width 32 has the paper's 693,569
    parameters.

    ``image_size`` is one side, or (height, width). The longer side may have at most four times the
    pixels of the shorter one, roughly: `ValueError` if halving leaves nothing of that.

    ``sigma`` is the standard deviation of the noise that training adds to the data, in net range;
    None if unknown. `defense.langevin.denoised` needs it.
    """

    def __init__(
        self,
        *,
        image_size: int | Sequence[int] = 32,
        channels: int = 3,
        width: int = 32,
        activation: str = "leaky_relu",
        sigma: float | None = None,
    ) -> None:
        super().__init__()
        height, wide = (image_size, image_size) if isinstance(image_size, int) else image_size
        self.shape = (channels, height, wide)
        self.architecture = {
            "image_size": image_size,
            "channels": channels,
            "width": width,
            "activation": activation,
            "sigma": sigma,
        }
        self.sigma = sigma
        if min(height, wide) < 4:
            raise ValueError(f"image_size: expected >= 4, got {image_size}")
        if sigma is not None and not sigma >= 0:
            raise ValueError(f"sigma: expected >= 0 or None, got {sigma}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation: expected one of {list(ACTIVATIONS)}, got {activation!r}")
        make_activation = ACTIVATIONS[activation]
        layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, 1, 1), make_activation()]
        sides = height, wide
        while max(sides) > 4:
            layers += [nn.Conv2d(width, 2 * width, 4, 2, 1), make_activation()]
            width, sides = 2 * width, (sides[0] // 2, sides[1] // 2)
            if min(sides) < 1:
                raise ValueError(
                    f"image_size: {height}x{wide} is too narrow: halved until the longer side is "
                    "at most 4, nothing of the shorter one is left"
                )
        layers.append(nn.Conv2d(width, 1, sides))
        self.layers = nn.Sequential(*layers)

    def check(self, x: Tensor) -> None:
        """`ValueError` unless x is (N,C,H,W) of this size, so that each image gives one number."""
        if x.ndim != 4 or x.shape[1:] != self.shape:
            expected = "(N,{},{},{})".format(*self.shape)
            raise ValueError(f"x: expected images {expected}, got shape {tuple(x.shape)}")

    def forward(self, x: Tensor) -> Tensor:
        self.check(x)
        energies: Tensor = self.layers(x)
        return energies.flatten()


def count_parameters(module: nn.Module) -> int:
    """Number of weights in a module, frozen ones included."""
    return sum(p.numel() for p in module.parameters())
