"""The input gradient of a `ConvEnergy`, written by hand instead of recorded by autograd.

The forward pass keeps what each activation's derivative needs. It never runs the last convolution,
whose input gradient is its weight. The backward pass is a chain of transposed convolutions.
Activations are (N,H,W,C) inside, channels last. On a CPU weights are prepacked for oneDNN once per
gradient function, and slow layers are rewritten as faster ones.
"""

from collections.abc import Callable
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defense.energy import ConvEnergy, SmoothLeakyReLU
from defense.fast.onednn import Map, convolution, lays_out, linear, transposed_convolution

MATRIX_STEPS = 8  # from this many on, a first layer on tiny images is worth turning into a matrix
VECTOR_BYTES = 64  # vector width of a CPU; narrower transposed convolutions are computed by blocks

aten = torch.ops.aten


class Slope(NamedTuple):
    """An activation, h -> ``forward(h)``, and its vector-Jacobian product, ``backward(g, h)``."""

    forward: Map
    backward: Callable[[Tensor, Tensor], Tensor]


def slope_of(activation: nn.Module) -> Slope:
    """Hand-written derivatives of `defense.energy.ACTIVATIONS`.

    Leaky ReLU works in place, forward and backward. Its output has the sign of its input, which is
    all that the derivative needs, and nothing reads it after that.
    """
    if isinstance(activation, nn.LeakyReLU):
        s = activation.negative_slope
        return Slope(
            lambda h: F.leaky_relu_(h, s),
            lambda g, h: aten.leaky_relu_backward(g, h, s, True, grad_input=h),
        )
    if isinstance(activation, nn.SiLU):
        return Slope(F.silu, lambda g, h: aten.silu_backward(g, h))
    if isinstance(activation, nn.Softplus):
        beta, threshold = activation.beta, activation.threshold
        return Slope(activation, lambda g, h: aten.softplus_backward(g, h, beta, threshold))
    if isinstance(activation, SmoothLeakyReLU):
        s, e = activation.negative_slope, activation.softness
        return Slope(
            activation,
            lambda g, h: g * (h * (h * h + e).rsqrt()).mul_(0.5 - 0.5 * s).add_(0.5 + 0.5 * s),
        )
    raise ValueError(f"activation: expected one with a written-out slope, got {activation}")


def _convolution(weight: Tensor, bias: Tensor | None, stride: int, inputs: list[int]) -> Map:
    """(N,H,W,in) -> (N,T,U,out) with padding 1; ``inputs`` is the typical shape (N,in,H,W)."""
    convolve = convolution(weight, bias, stride, inputs)
    return lambda h: convolve(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1).contiguous()


def _first_layer(
    conv: nn.Conv2d, inputs: list[int], dtype: torch.dtype, steps: int
) -> tuple[Map, Map]:
    """The 3x3 convolution and its transpose, images (N,C,H,W) -> (N,H,W,width) and back.

    For many steps on tiny images the whole layer becomes one dense matrix. Otherwise, if H and W
    are even, the transpose is a 4x4 convolution of stride 2 to 4C channels, one 2x2 block of pixels
    for each position, because convolutions to few channels are slow.
    """
    weight, bias = conv.weight.detach(), cast(Tensor, conv.bias).detach().to(dtype)
    _, c, h, w = inputs
    width = conv.out_channels
    if steps >= MATRIX_STEPS and c * h * w <= 64 and not weight.is_cuda:
        pixels = torch.eye(c * h * w).view(-1, c, h, w)
        matrix = F.conv2d(pixels, weight, None, 1, 1).permute(0, 2, 3, 1).flatten(1).to(dtype)
        rows, columns = linear(matrix.t(), bias.repeat(h * w)), linear(matrix, None)
        return (
            lambda x: rows(x.flatten(1)).view(-1, h, w, width),
            lambda g: columns(g.flatten(1)).view(-1, c, h, w),
        )
    forward = _convolution(weight.to(dtype), bias, 1, inputs)
    flipped = weight.flip(2, 3).transpose(0, 1).to(dtype)
    if h % 2 or w % 2:
        back = _convolution(flipped, None, 1, [inputs[0], width, h, w])
        return lambda x: forward(x.permute(0, 2, 3, 1)), lambda g: back(g).permute(0, 3, 1, 2)
    blocks = flipped.new_zeros(c, 2, 2, width, 4, 4)
    for a in range(2):
        for b in range(2):
            blocks[:, a, b, :, a : a + 3, b : b + 3] = flipped
    back = _convolution(blocks.view(4 * c, width, 4, 4), None, 2, [inputs[0], width, h, w])
    return (
        lambda x: forward(x.permute(0, 2, 3, 1)),
        lambda g: F.pixel_shuffle(back(g).permute(0, 3, 1, 2), 2),
    )


def _by_blocks(weight: Tensor, parts: int, t: int, u: int) -> Map:
    """The transpose as a 2x2 convolution to blocks of 2x2 pixels: see `_transposed`.

    It computes the rows -1 to 2T and the columns -1 to 2U of the image; the caller crops.
    """
    k, c = weight.shape[:2]
    # Row a of block i is image row 2i - 1 + a. There g[i - 1 + u] meets kernel row 2(1 - u) + a.
    taps = weight.reshape(k, c, 2, 2, 2, 2).flip(2, 4)
    taps = taps.permute(3, 5, 1, 0, 2, 4).reshape(4 * c, k, 2, 2)
    blocks = _convolution(taps, None, 1, [parts, k, t, u])

    def whole(g: Tensor) -> Tensor:
        pixels = blocks(g).view(-1, t + 1, u + 1, 2, 2, c).transpose(2, 3)
        return pixels.reshape(-1, 2 * t + 2, 2 * u + 2, c)

    return whole


def _transposed(weight: Tensor, parts: int, h: int, w: int) -> Map:
    """The transpose of a 4x4 convolution of stride 2, (N,T,U,K) -> (N,H,W,C), T = H // 2.

    On a CPU oneDNN's kernel is slow if the channels of a pixel fit into one vector register.
    """
    k, c = weight.shape[:2]
    t, u = h // 2, w // 2
    if lays_out(weight) and c * weight.element_size() <= VECTOR_BYTES:
        whole = _by_blocks(weight, parts, t, u)
        return lambda g: whole(g)[:, 1 : h + 1, 1 : w + 1]
    transpose = transposed_convolution(weight, [h - 2 * t, w - 2 * u], [parts, k, t, u])
    return lambda g: transpose(g.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class WrittenGradient:
    """df/dx of a `ConvEnergy` with the weights that it has now, computed in ``dtype``.

    ``inputs`` is the largest input shape (N,C,H,W). ``steps`` is the number of calls to expect,
    which decides what is worth preparing.
    """

    def __init__(
        self, energy: ConvEnergy, inputs: list[int], dtype: torch.dtype, steps: int
    ) -> None:
        first, activation, *rest = energy.layers
        self.dtype = dtype
        self.slope = slope_of(activation)
        self.layers = [_first_layer(cast(nn.Conv2d, first), inputs, dtype, steps)]
        parts, _, height, width = inputs
        for conv in cast(list[nn.Conv2d], rest[:-1:2]):
            weight = conv.weight.detach().to(dtype)
            bias = cast(Tensor, conv.bias).detach().to(dtype)
            forward = _convolution(weight, bias, 2, [parts, conv.in_channels, height, width])
            self.layers.append((forward, _transposed(weight, parts, height, width)))
            height, width = height // 2, width // 2
        last = cast(nn.Conv2d, rest[-1])
        self.last_bias = cast(Tensor, last.bias).detach()
        weight = last.weight.detach().permute(0, 2, 3, 1)
        self.last_row = weight.flatten()
        # One copy per image: elementwise kernels need contiguous memory, not an expanded view.
        self.last = weight.to(dtype).expand(parts, -1, -1, -1).contiguous()

    def __call__(self, x: Tensor, energies: Tensor | None = None) -> Tensor:
        """df/dx at x (N,C,H,W) float32, the same kind; f goes into ``energies`` (N,) if given."""
        kept = [self.layers[0][0](x.to(self.dtype))]
        for forward, _ in self.layers[1:]:
            kept.append(forward(self.slope.forward(kept[-1])))
        if energies is not None:
            top = self.slope.forward(kept[-1]).flatten(1).float()
            torch.addmv(self.last_bias, top, self.last_row, out=energies)
        g = self.last[: len(x)]
        for (_, backward), h in zip(reversed(self.layers), reversed(kept), strict=True):
            g = backward(self.slope.backward(g, h))
        return g.to(x.dtype)
