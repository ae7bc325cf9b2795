"""Gradients through the Langevin chain: vector-Jacobian products without a tape over the chain.

One step is X_{k+1} = X_k - df/dX (X_k) + tau Z_k, so a cotangent goes back through it as

    v_k = v_{k+1} - H(X_k) v_{k+1},    H the Hessian of f

(which is symmetric). The states are found again from a few that were kept and from the noise that
is drawn again: K steps need the memory of 2 sqrt(K) states. BPDA is H = 0, and so is the exact
product of a piecewise linear energy, almost everywhere; ``smoothed`` rounds its corners.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Literal, NamedTuple

import torch
from torch import Generator, Tensor, nn

from defense.energy import SmoothLeakyReLU
from defense.langevin import Chain, EnergyFn, LangevinConfig

GradientMode = Literal["identity", "exact", "smoothed"]
"""How an attack differentiates the purifier: BPDA, the chain itself, the chain made smooth."""

CORNERS = (nn.LeakyReLU, nn.ReLU)

HessianProduct = Callable[[Tensor, Tensor], Tensor]
"""x, v (N,C,H,W) -> H(x) v, the same shape."""

MakeProduct = Callable[[nn.Module, Tensor, int], HessianProduct]
"""An energy, images like those to come, how often it will be asked -> its Hessian product."""


class Segment(NamedTuple):
    """A run of steps that can be made again: where it starts, and the generator's state there."""

    x: Tensor
    noise: Tensor
    steps: int


def hessian_product(energy: EnergyFn, x: Tensor, v: Tensor) -> Tensor:
    """H(x) v for the Hessian of f at every image, by autograd twice: x, v (N,C,H,W).

    Zero where f is piecewise linear.
    """
    with torch.inference_mode(False), torch.enable_grad():
        x = x.clone().detach().requires_grad_(True)
        (gradient,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
        if not gradient.requires_grad:
            return torch.zeros_like(x)
        (product,) = torch.autograd.grad(gradient, x, v.clone(), allow_unused=True)
    return torch.zeros_like(x) if product is None else product


def autograd_product(energy: nn.Module, like: Tensor, times: int) -> HessianProduct:
    """`hessian_product` of an energy; needs no preparation."""
    return lambda x, v: hessian_product(energy, x, v)


def smoothed(energy: nn.Module, softness: float) -> nn.Module:
    """A copy of an energy with the corner of every leaky ReLU rounded over about sqrt(softness).

    `ValueError` if there is none: such an energy is to be differentiated as it is.
    """
    if not has_corners(energy):
        raise ValueError("energy: expected one with a ReLU or leaky ReLU to smooth")
    smooth = copy.deepcopy(energy)
    for parent in list(smooth.modules()):
        for name, child in list(parent._modules.items()):  # one module may stand in two places
            if isinstance(child, CORNERS):
                slope = child.negative_slope if isinstance(child, nn.LeakyReLU) else 0.0
                setattr(parent, name, SmoothLeakyReLU(slope, softness))
    if has_corners(smooth):
        raise ValueError("energy: expected its ReLUs to be modules inside it")
    return smooth


def has_corners(energy: nn.Module) -> bool:
    """Is there a ReLU or leaky ReLU in it?"""
    return any(isinstance(module, CORNERS) for module in energy.modules())


def run_in_segments(
    chain: Chain,
    energy: EnergyFn,
    x: Tensor,
    config: LangevinConfig,
    *,
    generator: Generator,
    length: int | None = None,
) -> tuple[Tensor, list[Segment]]:
    """The chain from x (N,C,H,W) with what is needed to go back; ``length`` steps a segment.

    Up to rounding the end does not depend on ``length``; None is about sqrt(K), the least memory.
    """
    length = length or max(1, round(math.sqrt(config.steps)))
    segments = []
    for first in range(0, config.steps, length):
        steps = min(length, config.steps - first)
        segments.append(Segment(x, generator.get_state(), steps))
        x = chain(energy, x, replace(config, steps=steps), generator=generator)
    return x, segments


def pull_back(
    chain: Chain,
    energy: EnergyFn,
    config: LangevinConfig,
    segments: list[Segment],
    v: Tensor,
    *,
    product: HessianProduct,
) -> Tensor:
    """v^T J (N,C,H,W), J = dX_K / dX_0 of the chain that `run_in_segments` ran.

    ``product`` is that of the energy, or of another one that takes its place on the way back.
    """
    generator = Generator(v.device)
    for segment in reversed(segments):
        states: list[Tensor] = []
        generator.set_state(segment.noise)
        again = replace(config, steps=segment.steps - 1)
        last = chain(energy, segment.x, again, generator=generator, states=states)
        for x in reversed([*states, last]):
            v = v - product(x, v)
    return v
