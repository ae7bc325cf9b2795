"""Stage 6: what the defense's randomness looks like, and where its chains go."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.diagnostics import safe_and_borderline, states_at
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from stages.artifacts import Images, load_images, load_state, save_tensors
from stages.console import Track, say
from stages.hardware import Hardware
from stages.models import Nets
from stages.params import Params
from stages.resume import Scratch

SAMPLES = 12  # chains in the picture


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    energy: Path,
    state: Path,
    out: Path,
) -> None:
    """Replica logits of a safe and a borderline image; states of short and long chains."""
    nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
    data = load_images(images, "test", params.dataset(dataset), params.diagnose.images)
    bank = load_state(state, f"`stochsec train-ebm {dataset} convergent`", hardware.device)["bank"]

    def key(p: Params) -> object:
        data = p.data[dataset]
        return p.seed, dataset, data, p.classifier, p.energy, p.ebm.steps, p.langevin, p.diagnose

    tensors: dict[str, Tensor] = {}
    with (
        Scratch(
            f"diagnose-{dataset}", params, key, [images, classifier, energy, state], hardware
        ) as scratch,
        Track(f"diagnose {dataset}", 2, unit="parts") as track,
    ):
        for name, compute in (("logits", logits), ("samples", samples)):
            tensors |= scratch.piece(name, partial(compute, nets, data))
            track.advance(watch=name)
        about = {"run": params.run, "dataset": dataset, "K": params.langevin.K}
        save_tensors(out, {**tensors, "bank": bank[:SAMPLES]}, {**about, **hardware.conditions()})
        scratch.done()
    say(f"diagnose {dataset}: safe image {tensors['chosen'][0]}, borderline {tensors['chosen'][1]}")


@torch.no_grad()
def logits(nets: Nets, data: Images) -> dict[str, Tensor]:
    """A safe and a borderline image among the test images, and their logits (R,2,classes)."""
    steps, device = nets.params.langevin.K, nets.hardware.device
    pixels, labels = from_bytes(data.images).to(device), data.labels.to(device)
    screen = nets.defense(steps, nets.params.langevin.H_adv, "diagnose/screen")
    chosen = safe_and_borderline(screen.replica_logits(pixels), labels)
    judge = nets.defense(steps, nets.params.diagnose.replicas, "diagnose/judge")
    return {
        "chosen": chosen,
        "labels": labels[chosen],
        "replica_logits": judge.replica_logits(pixels[chosen]),
    }


def samples(nets: Nets, data: Images) -> dict[str, Tensor]:
    """States (K,S,C,H,W) of chains from the first test images, at the steps ``grid`` (K,)."""
    params, device = nets.params, nets.hardware.device
    grid = sorted({0, params.ebm.steps, params.langevin.K, params.diagnose.long_steps})
    states = states_at(
        nets.energy,
        to_net(from_bytes(data.images[:SAMPLES])).to(device),
        grid,
        tau=params.dataset(nets.dataset).tau,
        chain=nets.chain(max(grid)),
        generator=make_generator(params.seed, nets.dataset, "diagnose", device=device),
        max_chains=nets.hardware.max_chains,
    )
    return {"grid": torch.tensor(grid), "states": states}
