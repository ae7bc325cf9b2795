"""Stage 6: what the defense's randomness looks like, and where its chains go."""

from pathlib import Path

import torch
from torch import Tensor

from defense.diagnostics import energies, safe_and_borderline, states_at
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from stages.artifacts import load_images, load_state, load_tensors, save_tensors
from stages.console import Track, say
from stages.engine import choose_chain
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
    diagnose, langevin, device = params.diagnose, params.langevin, hardware.device
    data = load_images(images, "test", diagnose.images)
    pixels, labels = from_bytes(data.images).to(device), data.labels.to(device)
    grid = sorted({0, params.ebm.steps, langevin.K, diagnose.long_steps})
    bank = load_state(state, f"`stochsec train-ebm {dataset} convergent`", device)["bank"]

    def logits() -> dict[str, Tensor]:
        screen = nets.defense(langevin.K, langevin.H_adv, "diagnose/screen")
        chosen = safe_and_borderline(screen.replica_logits(pixels), labels)
        judge = nets.defense(langevin.K, diagnose.replicas, "diagnose/judge")
        return {
            "chosen": chosen,
            "labels": labels[chosen],
            "replica_logits": judge.replica_logits(pixels[chosen]),
        }

    def samples() -> dict[str, Tensor]:
        tau = params.dataset(dataset).tau
        states = states_at(
            nets.energy,
            to_net(pixels[:SAMPLES]),
            grid,
            tau=tau,
            chain=choose_chain(),
            generator=make_generator(params.seed, dataset, "diagnose", device=device),
            max_chains=hardware.max_chains,
        )
        levels = [energies(nets.energy, s, tau=tau, batch=hardware.max_chains) for s in states]
        return {"states": states, "energies": torch.stack(levels), "bank": bank[:SAMPLES]}

    def key(p: Params) -> object:
        data = p.data[dataset]
        return p.seed, dataset, data, p.classifier, p.energy, p.ebm.steps, p.langevin, p.diagnose

    tensors: dict[str, Tensor] = {"grid": torch.tensor(grid), "images": pixels}
    with (
        Scratch(
            f"diagnose-{dataset}", params, key, [images, classifier, energy, state], hardware
        ) as scratch,
        Track(f"diagnose {dataset}", 2, unit="parts") as track,
        torch.no_grad(),
    ):
        for name, compute in (("logits", logits), ("samples", samples)):
            path = scratch.folder / f"{name}.safetensors"
            if not path.exists():
                save_tensors(path, compute(), {})
            tensors |= load_tensors(path)[0]
            track.advance(watch=name)
            scratch.check()
        about = {"run": params.run, "dataset": dataset, "K": langevin.K, **hardware.conditions()}
        save_tensors(out, tensors, about)
        scratch.done()
    say(f"diagnose {dataset}: safe image {tensors['chosen'][0]}, borderline {tensors['chosen'][1]}")
