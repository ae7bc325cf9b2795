"""How fast neighbouring Langevin chains part: the maximal Lyapunov exponent, equation (12).

A network returns f = (tau^2 / 2) U, so the altered map of Hill et al. (2021), equation (13),

    T_eta(X) = X - (tau^2 / 2) dU/dX (X) + eta tau Z,    Z ~ N(0, I)

is the ordinary chain with step size eta tau. Beside each chain runs a second one with the same
noise, a small distance away; again and again the growth of the distance is noted and the second
chain pulled back along the line between the two (Benettin et al. 1976).
"""

import torch
from torch import Generator, Tensor

from defense.langevin import Chain, EnergyFn, LangevinConfig


def lyapunov_exponents(
    energy: EnergyFn,
    x: Tensor,
    *,
    eta: float,
    tau: float,
    steps: int,
    burn_in: int,
    every: int,
    separation: float,
    chain: Chain,
    generator: Generator,
    max_chains: int,
) -> tuple[Tensor, Tensor]:
    """Exponents per Langevin step, float64 (N,), and last states, from x (N,C,H,W) in net range.

    The mean logarithm of growth per step over ``steps`` steps, after ``burn_in`` uncounted ones,
    of a distance that starts in a random direction and is set back every ``every`` steps to
    ``separation``, l_2 over the image in net range. Above 0 neighbours part: chaos. Below 0 the
    noise that they share brings them together. Hill et al. (2021), Appendix C.2, equations (12)
    and (13).

    Choose ``separation`` far above the resolution eps |x| of a state, some 1e-6 for an 8x8 image in
    float32: rounding shifts an exponent by some (eps |x| / separation)^2, and a gradient computed
    in bfloat16 drowns as much as 1e-3. Choose it, and ``every``, so small that a distance stays far
    below the width over which the gradient bends, and neither matters. A piecewise linear energy
    (leaky ReLU) has no such width: gradients differ only where a corner lies between the two
    chains, the limit of equation (12) is 0, and an exponent belongs to the separation and ``every``
    that it was measured at.

    A distance below the resolution counts as the resolution: chains that meet exactly yield an
    upper bound instead of -inf, and are set apart again in their last direction. The exponent is
    NaN if either chain diverges, or if a state is so large that ``separation`` is lost in rounding.

    At most ``max_chains`` images run at a time. Each such piece draws from ``generator`` its
    directions, then the noise of the plain chain of burn_in + steps steps that its last states are
    the end of. `ValueError` for a number out of range, or steps that ``every`` does not divide.
    """
    least = {"eta": 0, "tau": 0, "burn_in": 0, "steps": 1, "every": 1, "max_chains": 1}
    given = (eta, tau, burn_in, steps, every, max_chains)
    for (name, lowest), number in zip(least.items(), given, strict=True):
        if not number >= lowest:
            raise ValueError(f"{name}: expected >= {lowest}, got {number}")
    if not separation > 0:
        raise ValueError(f"separation: expected > 0, got {separation}")
    for name, number in {"burn_in": burn_in, "steps": steps}.items():
        if number % every:
            raise ValueError(f"{name}: expected a multiple of every = {every}, got {number}")
    config = LangevinConfig(every, eta * tau)
    exponents, states = [], []
    for state in x.detach().split(max_chains):
        offset = torch.randn(
            state.shape, generator=generator, device=state.device, dtype=state.dtype
        )
        growth = state.new_zeros(len(state), dtype=torch.float64)
        for done in range(0, burn_in + steps, every):
            state, offset, logarithm = _leg(
                energy, state, offset, config, separation, chain, generator
            )
            if done >= burn_in:
                growth += logarithm
        exponents.append((growth / steps).where(growth.isfinite(), torch.nan))
        states.append(state)
    return torch.cat(exponents), torch.cat(states)


def _leg(
    energy: EnergyFn,
    state: Tensor,
    offset: Tensor,
    config: LangevinConfig,
    separation: float,
    chain: Chain,
    generator: Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """From a setting-back to the next: new states, new offsets (N,C,H,W), log of growth (N,)."""
    second = (state + offset * (separation / _length(offset))).to(state.dtype)
    start = _length(second - state)  # what rounding has left of separation
    resolution = torch.finfo(state.dtype).eps * _length(state).clamp(min=separation)

    same_noise = generator.clone_state()
    state = chain(energy, state, config, generator=generator)
    difference = chain(energy, second, config, generator=same_noise) - state

    distance = _length(difference)
    logarithm = (distance.maximum(resolution) / start).log().where(start > resolution, torch.nan)
    return state, difference.where(distance != 0, offset), logarithm.flatten()


def _length(x: Tensor) -> Tensor:
    """l_2 norm over an image: (N,C,H,W) -> float64 (N,1,1,1)."""
    length: Tensor = torch.linalg.vector_norm(x, dim=(1, 2, 3), keepdim=True, dtype=torch.float64)
    return length
