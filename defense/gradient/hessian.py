"""Hessian-vector products H(x) v of a `ConvEnergy`, by hand: forward mode over `WrittenGradient`.

`defense.gradient.chain.hessian_product` is the plain reference for any energy, by double backward.
Here image and direction go through the same convolutions side by side, forward and backward, at
twice the cost of a gradient. Activations are (N,H,W,C) inside, as in `WrittenGradient`.
"""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from defense.energy import ConvEnergy, SmoothLeakyReLU
from defense.fast.langevin import images_at_once
from defense.fast.precision import Precision, check_precision, tensor_cores, usable
from defense.fast.written_gradient import WrittenGradient
from defense.gradient.chain import HessianProduct

Bend = Callable[[Tensor], tuple[Tensor, Tensor]]
"""First and second derivative of an activation at h."""


def bend_of(activation: nn.Module) -> Bend | None:
    """Derivatives of `defense.energy.ACTIVATIONS`; None for one that is piecewise linear."""
    if isinstance(activation, nn.LeakyReLU):
        return None
    if isinstance(activation, SmoothLeakyReLU):
        s, e = activation.negative_slope, activation.softness

        def smooth_leaky_relu(h: Tensor) -> tuple[Tensor, Tensor]:
            inverse = (h * h + e).rsqrt()
            slope = 0.5 * (1.0 + s) + 0.5 * (1.0 - s) * h * inverse
            return slope, 0.5 * (1.0 - s) * e * inverse**3

        return smooth_leaky_relu
    if isinstance(activation, nn.SiLU):

        def silu(h: Tensor) -> tuple[Tensor, Tensor]:
            gate = h.sigmoid()
            change = gate * (1.0 - gate)
            return gate + h * change, change * (2.0 + h * (1.0 - 2.0 * gate))

        return silu
    if isinstance(activation, nn.Softplus):
        beta = float(activation.beta)

        def softplus(h: Tensor) -> tuple[Tensor, Tensor]:
            gate = (beta * h).sigmoid()
            return gate, beta * gate * (1.0 - gate)

        return softplus
    raise ValueError(f"activation: expected one with a written-out bend, got {activation}")


class WrittenHessian(WrittenGradient):
    """H(x) v of a `ConvEnergy` with the weights that it has now, computed in ``precision``.

    ``like`` is an example batch (N,C,H,W) of the largest size to come; ``times`` is the number of
    calls to expect. The images go through the network in pieces, as in the chain.
    """

    def __init__(
        self, energy: ConvEnergy, like: Tensor, times: int, precision: Precision = "float32"
    ) -> None:
        self.precision = usable(check_precision(precision), like.device)
        dtype = torch.bfloat16 if self.precision == "bfloat16" else torch.float32
        most = images_at_once(energy, self.precision, like.device) // 2
        self.most = max(1, min(len(like), most))
        super().__init__(energy, [2 * self.most, *like.shape[1:]], dtype, times)
        convolutions = cast(list[nn.Conv2d], energy.layers[:-1:2])
        self.biases = [cast(Tensor, conv.bias).detach().to(dtype) for conv in convolutions]
        self.bend = bend_of(energy.layers[1])

    @torch.no_grad()
    def product(self, x: Tensor, v: Tensor) -> Tensor:
        """H(x) v: x, v (N,C,H,W) float32 -> the same kind."""
        if self.bend is None:
            return torch.zeros_like(v)
        parts = zip(x.split(self.most), v.split(self.most), strict=True)
        with tensor_cores(self.precision), torch.autocast(x.device.type, enabled=False):
            return torch.cat([self._product(*part, self.bend) for part in parts])

    def _product(self, x: Tensor, v: Tensor, bend: Bend) -> Tensor:
        """Forward mode over backward: value and tangent of every layer, then of every gradient."""
        count, kept = len(x), []
        pair = torch.cat([x, v]).to(self.dtype)
        for (forward, _), bias in zip(self.layers, self.biases, strict=True):
            pair = forward(pair)
            # The layer added its bias to the tangent, too; a derivative has none.
            h, tangent = pair[:count], pair[count:].sub_(bias)
            slope, second = bend(h)
            kept.append((slope, second * tangent))
            pair = torch.cat([self.slope.forward(h), slope * tangent])
        g, g_tangent = self.last[:count], torch.zeros_like(self.last[:count])
        for (_, backward), (slope, change) in zip(
            reversed(self.layers), reversed(kept), strict=True
        ):
            # Product rule on g slope(h): ``change`` is the derivative of slope(h) along v.
            both = backward(torch.cat([g * slope, g_tangent * slope + g * change]))
            g, g_tangent = both[:count], both[count:]
        return g_tangent.to(x.dtype)


def written_product(
    energy: nn.Module, like: Tensor, times: int, *, precision: Precision = "float32"
) -> HessianProduct:
    """The fast `defense.gradient.chain.autograd_product`, of a `ConvEnergy` only."""
    if not isinstance(energy, ConvEnergy):
        raise ValueError(f"energy: expected a ConvEnergy, got {type(energy).__name__}")
    return WrittenHessian(energy, like, times, precision).product
