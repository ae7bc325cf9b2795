"""Order and chaos of the chain over the strength of its noise (Hill et al. 2021, Figure 8).

With the piecewise linear energy of the defense and with the smooth one: only the latter has an
exponent that does not depend on the separation at which it is measured
(`defense.studies.lyapunov`).
"""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.lyapunov import lyapunov_exponents
from stages.core.artifacts import load_images, save_tensors
from stages.core.console import Track, say
from stages.core.energies import Energy, load_energy
from stages.core.engine import choose_chain
from stages.core.hardware import Hardware
from stages.core.params import EVALUATED, Params
from stages.core.resume import Scratch


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    energy: Path,
    smooth: Path,
    out: Path,
) -> None:
    """Exponents (E,n) over eta of chains from test images, for each energy and separation."""
    section, energies = params.lyapunov, dict(zip(EVALUATED, (energy, smooth), strict=True))
    test = load_images(images, "test", params.dataset(dataset), section.chains)
    x = to_net(from_bytes(test.images)).to(hardware.device)

    def key(p: Params) -> object:
        return p.seed, dataset, p.data[dataset].tau, p.study("lyapunov", dataset)

    tensors = {"eta": torch.tensor(section.eta, dtype=torch.float64)}
    settings = [(name, distance) for name in EVALUATED for distance in section.separations]
    with (
        Scratch(
            f"lyapunov-{dataset}", params, key, {"images": images, **energies}, hardware
        ) as scratch,
        Track(f"lyapunov {dataset}", len(settings) * len(section.eta), unit="runs") as track,
    ):
        for name, distance in settings:
            network = load_energy(params, dataset, hardware, energies[name])
            found = []
            for eta in section.eta:
                work = partial(at, params, dataset, hardware, network, eta, distance, x)
                found.append(scratch.piece(f"{name}-{distance:.12g}-{eta:.12g}", work))
                track.advance(watch=f"{name}, eta {eta:g}")
            curve = torch.stack([part["exponents"] for part in found])
            tensors[f"{name}/{distance:.12g}"] = curve
            tensors.setdefault(f"{name}/states", torch.stack([part["states"] for part in found]))
            said = zip(section.eta, curve.mean(1).tolist(), strict=True)
            line = "  ".join(f"{eta:g}: {mean:+.4f}" for eta, mean in said)
            say(f"lyapunov {dataset} {name}, {distance:g} apart, a step over eta: {line}")
        about = {"run": params.run, "dataset": dataset, **params.study("lyapunov", dataset)}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()


def at(
    params: Params,
    dataset: str,
    hardware: Hardware,
    network: Energy,
    eta: float,
    separation: float,
    x: Tensor,
) -> dict[str, Tensor]:
    """Exponents (n,) of chains from x (n,C,H,W) with noise of strength eta, and where they end.

    In float32 always: the rounding of a lower precision would pass for chaos.
    """
    section = params.lyapunov
    purpose = f"{eta:.12g}/{separation:.12g}"
    exponents, states = lyapunov_exponents(
        network,
        x,
        eta=eta,
        tau=params.dataset(dataset).tau,
        steps=section.steps,
        burn_in=section.burn_in,
        every=section.every,
        separation=separation,
        chain=choose_chain(network, section.every, "float32", hardware),
        generator=make_generator(params.seed, dataset, "lyapunov", purpose, device=x.device),
        max_chains=hardware.max_chains,
    )
    return {"exponents": exponents, "states": states}
