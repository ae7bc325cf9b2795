"""The certificate of a smoothed classifier, and an attack that must not break it.

Cohen et al. (2019): within its certified l_2 radius of an image, the majority vote over all noise
cannot change. So an attack that stays inside and still changes a clear vote shows a fault, in the
certificate, the vote or the attack.
"""

import torch
from torch import Tensor

from defense.attack import run_attack
from defense.pixels import from_bytes
from defense.rng import make_generator
from defense.systems.smoothing import (
    ABSTAIN,
    DenoisedSmoothing,
    RandomizedSmoothing,
    certified_radius,
    vote,
)
from defense.threat import ThreatModel
from stages.core.artifacts import Images
from stages.core.build import attack_config
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.resume import Scratch
from stages.systems.build import Built, section_of


def measure(
    params: Params, built: Built, data: Images, hardware: Hardware, scratch: Scratch
) -> dict[str, Tensor] | None:
    """Votes and radii of the images, and votes on the same images attacked in a small l_2 ball.

    ``predicted`` and ``attacked`` (n,) int64: the vote, or `ABSTAIN`; ``radius`` (n,) in pixels;
    ``labels`` (n,). None for systems without a certificate.
    """
    system = built.system
    if not isinstance(system, RandomizedSmoothing | DenoisedSmoothing):
        return None
    size, sigma = section_of(params).certificate, system.sigma
    device, purpose = hardware.device, f"{built.name}/certificate"
    x, y = from_bytes(data.images).to(device), data.labels.to(device)

    def compute() -> dict[str, Tensor]:
        chosen = counts(built, x, size.select, f"{purpose}/select")
        estimated = counts(built, x, size.estimate, f"{purpose}/estimate")
        radius = [
            certified_radius(votes, int(first.argmax()), sigma, size.alpha)
            for first, votes in zip(chosen, estimated, strict=True)
        ]
        ball = ThreatModel("l2", size.l2_255)
        config = attack_config(params, size.steps, early=True, ball=ball)
        replicas = section_of(params)
        record = run_attack(
            built.defense(replicas.H_adv, f"{purpose}/surrogate", "exact"),
            built.defense(replicas.H_def, f"{purpose}/target"),
            x,
            y,
            config,
            generator=make_generator(params.seed, purpose, device=device),
        )
        after = counts(built, record.adversarial, size.estimate, f"{purpose}/attacked")
        return {
            "labels": y,
            "predicted": torch.tensor([vote(votes, size.alpha) for votes in estimated]),
            "radius": torch.tensor(radius),
            "attacked": torch.tensor([vote(votes, size.alpha) for votes in after]),
        }

    return scratch.piece("certificate", compute)


def counts(built: Built, x: Tensor, replicas: int, purpose: str) -> Tensor:
    """How many of so many noisy copies are predicted as each class: (B,C,H,W) -> (B, classes)."""
    with torch.no_grad():
        logits = built.defense(replicas, purpose).replica_logits(x)
    return torch.nn.functional.one_hot(logits.argmax(2), logits.shape[2]).sum(0).cpu()


def broken_inside(certified: dict[str, Tensor], l2_255: float) -> tuple[int, int]:
    """How many images have a certificate at least as wide as the attack, and lost a clear vote."""
    inside = certified["radius"] >= l2_255 / 255
    changed = certified["attacked"] != certified["predicted"]
    changed &= (certified["attacked"] != ABSTAIN) & (certified["predicted"] != ABSTAIN)
    return int(inside.sum()), int((inside & changed).sum())
