"""The two ranges of an image: pixels in [0, 1] outside, net range [-1, 1] inside."""

import torch
from torch import Tensor


def to_net(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] -> net range [-1, 1]; any shape."""
    return 2.0 * pixels - 1.0


def to_pixels(net: Tensor) -> Tensor:
    """Net range -> pixels. A chain is unbounded, so its pixels may leave [0, 1] a little.

    The classifier is given them as they are, as in the authors' code; clamp only to show or save.
    """
    return 0.5 * (net + 1.0)


def from_bytes(images: Tensor) -> Tensor:
    """uint8 (N,C,H,W) in 0..255 -> float32 pixels in [0, 1]."""
    return images.to(torch.float32) / 255.0


def check_pixels(x: Tensor, *, beyond: float = 1e-6) -> None:
    """`ValueError` unless x is a batch of images (B,C,H,W) of floating pixels in [0, 1].

    They may leave that range by ``beyond``.
    """
    if not isinstance(x, Tensor):
        raise ValueError(f"x: expected a tensor of images (B,C,H,W), got {type(x).__name__}")
    if x.ndim != 4 or not x.is_floating_point():
        raise ValueError(
            f"x: expected images (B,C,H,W), floating, pixels in [0, 1], got {tuple(x.shape)} "
            f"{x.dtype}"
        )
    if x.numel():
        low, high = (float(end) for end in x.detach().aminmax())
        if not (-beyond <= low and high <= 1.0 + beyond):  # written so that NaN fails, too
            raise ValueError(
                f"x: expected pixels in [0, 1], got {low:g} to {high:g}; divide 0..255 by "
                "255, and put a normalization into the classifier"
            )
