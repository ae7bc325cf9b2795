"""Stage 6: is an energy convergent? States and energies along long chains.

Long chains from test images, persistent states and noise should end at the same mean energy. Chains
from noisy images should keep the mean energy that they start with. If they do not,
`defense.studies.diagnostics.level_changes` says what it means.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.bank import CompactBank, NoisyImages
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.diagnostics import energies, states_at
from stages import StageError
from stages.core.artifacts import load_images, load_state, save_tensors
from stages.core.console import Track, say
from stages.core.energies import Energy, load_energy
from stages.core.engine import choose_chain
from stages.core.hardware import Hardware
from stages.core.levels import level_changes_of
from stages.core.params import Params
from stages.core.resume import Scratch
from stages.reporting.findings import STARTS, convergence

SPLITS = ("train", "test")
SAMPLES = 12  # chains in the picture
LEVELS = 500  # images, states and noise whose energies are compared


def run(
    params: Params,
    dataset: str,
    phase: str,
    hardware: Hardware,
    *,
    images: Path,
    energy: Path,
    state: Path,
    out: Path,
) -> None:
    """Follow chains from test images, persistent states and noise for ``inspect.long_steps``."""
    section, count = params.dataset(dataset), params.inspect.chains
    network = load_energy(params, dataset, hardware, energy)
    made_by = f"`stochsec train-ebm {dataset} {phase}`"
    saved = load_state(state, made_by, hardware.device)
    bank = persistent(saved, state, hardware, network.shape)
    all_train, all_test = (load_images(images, split, section).images for split in SPLITS)
    train, test = (to_net(from_bytes(x[:LEVELS])) for x in (all_train, all_test))
    sets = {"training images": train[:count], "test images": test[:count]}
    if "origins" in saved["bank"]:
        everything = NoisyImages(all_train, section.data_noise, mirror=params.ebm.update.mirror)
        shown = everything.clean(saved["bank"]["origins"][:count].cpu())
        sets["images of the bank"] = to_net(from_bytes(shown))
    generator = make_generator(params.seed, dataset, "inspect", device=hardware.device)
    noise = 2 * torch.rand(test.shape, generator=generator, device=hardware.device) - 1
    spread = torch.randn(train.shape, generator=generator, device=hardware.device)
    seen = train.to(hardware.device) + section.data_noise * spread  # as training sees it
    starts = dict(zip(STARTS, (test, bank, noise), strict=True))
    levels = {
        name: energies(network, x.to(hardware.device), tau=section.tau, batch=LEVELS)
        for name, x in {"training images": seen, **starts}.items()
    }

    def key(p: Params) -> object:
        return p.seed, dataset, phase, p.data[dataset], p.ebm.update.steps, p.langevin, p.inspect

    inputs = {"images": images, "energy": energy, "state": state}
    tensors: dict[str, Tensor] = {f"{name}/levels": value for name, value in levels.items()}
    with (
        Scratch(f"inspect-{dataset}-{phase}", params, key, inputs, hardware) as scratch,
        Track(f"inspect {dataset} {phase}", len(starts) + len(sets), unit="starts") as track,
    ):
        for name, x in starts.items():
            work = partial(follow, params, dataset, hardware, network, name, x[:count])
            tensors |= scratch.piece(name.replace(" ", "-"), work)
            track.advance(watch=name)
        for name, x in sets.items():
            work = partial(changes, params, dataset, hardware, network, name, x)
            tensors |= scratch.piece(f"{name.replace(' ', '-')}-levels", work)
            track.advance(watch=name)
        tensors["grid"] = torch.tensor(grid(params))
        tensors["levels_grid"] = torch.tensor(params.inspect.levels)
        about: dict[str, object] = {"run": params.run, "dataset": dataset, "phase": phase}
        about |= params.study("inspect", dataset)
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    say(f"inspect {dataset} {phase}: {convergence(tensors)}")


def changes(
    params: Params, dataset: str, hardware: Hardware, network: Energy, who: str, x: Tensor
) -> dict[str, Tensor]:
    """Change of mean U along chains from images x (N,C,H,W) plus noise: (G,) in nats."""
    return {f"{who}/changes": level_changes_of(params, dataset, hardware, network, x, who)}


def persistent(
    saved: dict[str, Any], state: Path, hardware: Hardware, shape: tuple[int, ...]
) -> Tensor:
    """The states of the persistent chains at the end of training, (M,C,H,W) in net range."""
    try:
        bank = CompactBank.from_state_dict(saved["bank"])
        states = bank.read(torch.arange(min(LEVELS, len(bank)), device=hardware.device))
    except (KeyError, IndexError, TypeError) as error:
        raise StageError(f"{state}: holds no bank of chains ({error})") from None
    if tuple(states.shape[1:]) != shape:
        raise StageError(
            f"{state}: expected chains of images {shape}, got {tuple(states.shape[1:])}"
        )
    return states


def grid(params: Params) -> list[int]:
    """Steps at which chains are recorded, in ascending order.

    0, the steps of training, the K of the defense, and inspect.long_steps with its repeated halves.
    """
    long = params.inspect.long_steps
    halves = [long >> i for i in range(long.bit_length())]
    named = {params.ebm.update.steps, params.langevin.K, long}
    return sorted({0, *(steps for steps in (*named, *halves) if 0 < steps <= long)})


def follow(
    params: Params,
    dataset: str,
    hardware: Hardware,
    network: Energy,
    start: str,
    x: Tensor,
) -> dict[str, Tensor]:
    """Energies (G,n) of chains at the steps of `grid`.

    And some states (3,S,C,H,W): at the start, after the defense's K, at the end.
    """
    tau, steps = params.dataset(dataset).tau, grid(params)
    states = states_at(
        network,
        x.to(hardware.device),
        steps,
        tau=tau,
        chain=choose_chain(network, max(steps), params.langevin.precision, hardware),
        generator=make_generator(params.seed, dataset, "inspect", start, device=hardware.device),
        max_chains=hardware.max_chains,
    )
    levels = [energies(network, state, tau=tau, batch=hardware.max_chains) for state in states]
    shown = [steps.index(after) for after in (0, params.langevin.K, params.inspect.long_steps)]
    return {
        f"{start}/energies": torch.stack(levels),
        f"{start}/states": states[shown, :SAMPLES],
    }
