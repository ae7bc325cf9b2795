"""Stage 7: what the defense's randomness looks like."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.diagnostics import safe_and_borderline
from defense.pixels import from_bytes
from stages.artifacts import Images, load_images, save_tensors
from stages.console import say
from stages.hardware import Hardware
from stages.models import Nets
from stages.params import Params
from stages.resume import Scratch


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    energy: Path,
    out: Path,
) -> None:
    """Replica logits of a safe and a borderline image."""
    nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
    data = load_images(images, "test", params.dataset(dataset), params.diagnose.images)

    def key(p: Params) -> object:
        data = p.data[dataset]
        return p.seed, dataset, data, p.langevin, p.diagnose

    inputs = {"images": images, "classifier": classifier, "energy": energy}
    with Scratch(f"diagnose-{dataset}", params, key, inputs, hardware) as scratch:
        tensors = scratch.piece("logits", partial(logits, nets, data))
        about = {"run": params.run, "dataset": dataset, "K": params.langevin.K}
        save_tensors(out, tensors, {**about, **scratch.about()})
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
