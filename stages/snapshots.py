"""Short-run and long-run samples over training (Hill et al. 2021, Figure 2)."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.energy import ConvEnergy
from defense.inference import freeze
from defense.langevin import LangevinConfig
from defense.rng import make_generator
from defense.studies.diagnostics import energies
from stages import StageError
from stages.core.artifacts import load_tensors, save_tensors
from stages.core.console import Track, say
from stages.core.energies import new_energy
from stages.core.engine import choose_chain
from stages.core.files import require
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.resume import Scratch

Moment = tuple[ConvEnergy, Tensor]
"""The energy and the training's own chains (n,C,H,W), as they were after some batch."""


def run(
    params: Params, dataset: str, hardware: Hardware, snapshots: dict[str, Path], out: Path
) -> None:
    """Go on with the training's own chains, under the weights of each moment, for many steps."""
    moments = {
        phase: read(params, dataset, phase, hardware, path) for phase, path in snapshots.items()
    }

    def key(p: Params) -> object:
        return p.seed, dataset, p.snapshots, p.data[dataset].tau, p.langevin.precision

    inputs = {f"{phase} snapshots": path for phase, path in snapshots.items()}
    tensors: dict[str, Tensor] = {}
    with (
        Scratch(f"snapshots-{dataset}", params, key, inputs, hardware) as scratch,
        Track(f"snapshots {dataset}", sum(map(len, moments.values())), unit="moments") as track,
    ):
        for phase, some in moments.items():
            parts = []
            for batch, moment in some.items():
                work = partial(go_on, params, dataset, f"{phase}/{batch}", moment)
                parts.append(scratch.piece(f"{phase}-{batch:08d}", partial(work, hardware)))
                track.advance(watch=f"{phase}, batch {batch}")
            tensors |= {f"{phase}/{n}": torch.stack([part[n] for part in parts]) for n in parts[0]}
            tensors[f"{phase}/batches"] = torch.tensor(list(some))
        about = {"run": params.run, "dataset": dataset, **params.study("snapshots", dataset)}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    for phase in moments:
        changes = ", ".join(f"{u:+.1f}" for u in tensors[f"{phase}/energy_change"].mean(1).tolist())
        say(f"snapshots {dataset} {phase}: energy of long-run less short-run: {changes} nats")


def read(
    params: Params, dataset: str, phase: str, hardware: Hardware, path: Path
) -> dict[int, Moment]:
    """The moments of a phase by their batch; `StageError` for another file or network."""
    require(path, f"`stochsec train-ebm {dataset} {phase}`")
    kept, about = load_tensors(path)
    moments: dict[int, Moment] = {}
    try:
        for batch in about["batches"]:
            own = {n.removeprefix(f"{batch}/"): kept[n] for n in kept if n.startswith(f"{batch}/")}
            chains = own.pop("chains").to(hardware.device)
            energy = new_energy(params, dataset, phase)
            energy.load_state_dict({n.removeprefix("energy/"): own[n] for n in own})
            moments[int(batch)] = freeze(energy.to(hardware.device)), chains
    except KeyError as error:
        raise StageError(f"{path}: holds no snapshots of a training ({error})") from None
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise StageError(f"{path}: not of the energy in params.yaml: {reason}") from None
    return moments


def go_on(
    params: Params, dataset: str, purpose: str, moment: Moment, hardware: Hardware
) -> dict[str, Tensor]:
    """Chains (n,C,H,W) before and after the long run, and the change of U (n,) in nats."""
    energy, short = moment
    tau, steps = params.dataset(dataset).tau, params.snapshots.long_steps
    chain = choose_chain(energy, steps, params.langevin.precision, hardware)
    generator = make_generator(params.seed, dataset, "snapshots", purpose, device=hardware.device)
    long = chain(energy, short, LangevinConfig(steps, tau), generator=generator)
    before, after = (energies(energy, x, tau=tau, batch=len(x)) for x in (short, long))
    return {"short": short, "long": long, "energy_change": after - before}
