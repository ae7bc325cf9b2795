"""How fast neighbouring Langevin chains separate: the maximal Lyapunov exponent, equation (12).

A network returns f = (tau^2 / 2) U, so the altered map of Hill et al. (2021), equation (13),

    T_eta(X) = X - (tau^2 / 2) dU/dX (X) + eta tau Z,    Z ~ N(0, I)

is the ordinary chain with step size eta tau. Each chain has a neighbour a small distance away that
gets the same noise. At regular intervals the growth of the distance is recorded, and the neighbour
is moved back to the initial distance, along the line between the two (Benettin et al. 1976).
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

    An exponent is the mean log growth per step of the distance between the two chains, over
    ``steps`` steps after ``burn_in`` uncounted ones. The distance (l_2 over the image, net range)
    starts in a random direction and is reset to ``separation`` every ``every`` steps. A positive
    exponent means that neighbours separate: chaos. A negative one means that the shared noise
    brings them together. Hill et al. (2021), Appendix C.2, equations (12) and (13).

    Choose ``separation`` far above the resolution eps |x| of a state, about 1e-6 for an 8x8 image
    in float32: rounding shifts an exponent by about (eps |x| / separation)^2. A gradient in
    bfloat16 hides even a separation of 1e-3. Choose ``separation`` and ``every`` so small that the
    distance stays far below the scale on which the gradient varies; then the exponent depends on
    neither. A piecewise linear energy (leaky ReLU) has no such scale: gradients differ only where a
    kink lies between the two chains, and the limit in equation (12) is 0. Its exponents hold only
    for the ``separation`` and ``every`` that they were measured with.

    A distance below the resolution counts as the resolution. So chains that meet exactly give an
    upper bound instead of -inf, and are separated again in their last direction. The exponent is
    NaN if either chain diverges, or if a state is so large that ``separation`` is lost in rounding.

    At most ``max_chains`` images run at a time. Each such piece draws its directions from
    ``generator``, then the noise of burn_in + steps steps; its last states are those of the plain
    chain with that noise. `ValueError` for a number out of range, or steps that ``every`` does not
    divide.
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
    """The steps between two resets: new states, new offsets (N,C,H,W), log of growth (N,)."""
    second = (state + offset * (separation / _length(offset))).to(state.dtype)
    start = _length(second - state)  # ``separation`` up to rounding
    resolution = torch.finfo(state.dtype).eps * _length(state).clamp(min=separation)

    # With the same noise the distance grows by the gradient alone: the noise terms cancel.
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
