"""Stage 7: the spread of the defense's logits over replicas (Figure 3); the data of Figure 1."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.inference import classify
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.diagnostics import states_at
from defense.verdict import safe_and_borderline
from stages.core.artifacts import Images, load_images, save_tensors
from stages.core.build import Nets
from stages.core.console import say
from stages.core.energies import pixels_shown
from stages.core.files import energy_name
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch

COPIES = 4  # whose states are kept for the picture of the idea


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    energy: Path,
    pgd: Path,
    out: Path,
) -> None:
    """Replica logits of a safe and a borderline image; one attacked image on its whole way."""
    nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
    data = load_images(images, "test", params.dataset(dataset), params.diagnose.images)

    def key(p: Params) -> object:
        data = p.data[dataset]
        return p.seed, dataset, data, p.langevin, p.diagnose

    adversarial = AttackResult.load(pgd).of_pgd(data, pgd, classifier, params.conditions("pgd"))
    inputs = {"images": images, "classifier": classifier, "energy": energy, "pgd": pgd}
    with Scratch(f"diagnose-{dataset}", params, key, inputs, hardware) as scratch:
        tensors = scratch.piece("logits", partial(logits, nets, data))
        way = scratch.piece("idea", partial(idea, nets, data, adversarial))
        tensors |= {f"idea/{name}": value for name, value in way.items()}
        about: dict[str, object] = {"run": params.run, "dataset": dataset}
        about["energy"] = energy_name(energy)
        about |= params.study("diagnose", dataset)
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


@torch.no_grad()
def idea(nets: Nets, data: Images, adversarial: Tensor) -> dict[str, Tensor]:
    """Data of Figure 1: a PGD image that fools the classifier, H_adv chains from it, their logits.

    It is the image among ``adversarial`` (B,C,H,W) on which the defense is most certain.
    """
    params, device, batch = nets.params, nets.hardware.device, nets.hardware.max_chains
    langevin, tau = params.langevin, params.dataset(nets.dataset).tau
    pixels, labels = from_bytes(data.images).to(device), data.labels.to(device)
    adversarial = adversarial.to(device)
    bare = classify(nets.classifier, adversarial, batch=batch)
    fooled = (bare.argmax(1) != labels).nonzero().flatten()
    if len(fooled) == 0:  # nothing to be secured from: any image will do
        fooled = torch.arange(len(labels), device=device)
    screen = nets.defense(langevin.K, langevin.H_adv, "diagnose/idea")
    screened = screen.replica_logits(adversarial[fooled])
    chosen = fooled[safe_and_borderline(screened, labels[fooled])[0]]
    copies = to_net(adversarial[chosen]).expand(langevin.H_adv, -1, -1, -1)
    states = states_at(
        nets.energy,
        copies,
        idea_grid(langevin.K),
        tau=tau,
        chain=nets.chain(langevin.K),
        generator=make_generator(params.seed, nets.dataset, "diagnose", "chains", device=device),
        max_chains=batch,
    )
    ends = pixels_shown(params, nets.dataset, nets.hardware, nets.energy, states[-1], langevin.K)
    return {
        "natural": to_net(pixels[chosen]),
        "adversarial": to_net(adversarial[chosen]),
        "label": labels[chosen],
        "natural_logits": classify(nets.classifier, pixels[chosen][None], batch=1)[0],
        "adversarial_logits": bare[chosen],
        "states": states[:, :COPIES],
        "replica_logits": classify(nets.classifier, ends, batch=batch),
        "grid": torch.tensor(idea_grid(langevin.K)),
    }


def idea_grid(steps: int) -> list[int]:
    """Steps at which the picture of the idea shows the chains."""
    return sorted({0, steps // 6, steps // 3, steps})
