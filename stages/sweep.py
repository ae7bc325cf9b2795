"""Accuracy over the radius, and over the replicas of both sides (Hill et al. 2021, Figures 5, 6).

The radius is swept in both norms, for the defense (BPDA+EOT) and, with as many steps of PGD, for
the naturally and the adversarially trained classifier by themselves; the replicas of the attacker
and of the defender at the usual radius.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.attack import AttackConfig, run_attack
from defense.pixels import from_bytes
from defense.rng import make_generator
from defense.threat import ThreatModel
from stages.attack import bpda_eot, verdicts
from stages.core.artifacts import Images, load_images, save_tensors
from stages.core.build import Nets, attack_config
from stages.core.classifiers import load_classifier
from stages.core.console import Track, say
from stages.core.files import energy_name
from stages.core.hardware import Hardware
from stages.core.params import NORMS, TRAININGS, Params
from stages.core.resume import Scratch

Attack = Callable[[str, Images], dict[str, Tensor]]
"""(name of its random streams, images) -> "natural" and "robust" as in `attack.verdicts`."""

DEFENSE = "defense"


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    adversarial: Path,
    energy: Path,
    out: Path,
) -> None:
    """Attack the same test images in every setting."""
    section = params.sweep
    data = load_images(images, "test", params.dataset(dataset), section.images)
    nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
    hardened = load_classifier(params, dataset, hardware, adversarial)
    networks = dict(zip(TRAININGS, (nets.classifier, hardened), strict=True))
    inputs = {"images": images, "energy": energy, "natural": classifier, "adversarial": adversarial}

    def key(p: Params) -> object:
        return p.seed, dataset, p.data[dataset], p.study("sweep", dataset)

    settings, shards = settings_of(nets, networks), data.shards(params.attack.shard)
    found: dict[str, list[dict[str, Tensor]]] = {setting: [] for setting in settings}
    with (
        Scratch(f"sweep-{dataset}", params, key, inputs, hardware) as scratch,
        Track(f"sweep {dataset}", len(settings) * len(shards), unit="attacks") as track,
    ):
        for setting, attack in settings.items():
            for number, shard in enumerate(shards):
                name = f"{setting}/{number}"
                work = partial(attack, f"sweep/{name}", shard)
                found[setting].append(scratch.piece(name.replace("/", "-"), work))
                track.advance(watch=setting)
        tensors = {
            f"{setting}/{name}": torch.cat([part[name] for part in parts])
            for setting, parts in found.items()
            for name in parts[0]
        }
        about = {"run": params.run, "dataset": dataset, **params.study("sweep", dataset)}
        about |= {"energy": energy_name(energy)}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    for setting in settings:
        if setting.endswith(DEFENSE):
            robust = float(tensors[f"{setting}/robust"].float().mean())
            say(f"sweep {dataset}: {setting} {robust:.3f} (n={section.images})")


def settings_of(nets: Nets, classifiers: dict[str, nn.Module]) -> dict[str, Attack]:
    """The attacks by setting: NORM/RADIUS/WHO, then H_adv/NUMBER/defense, H_def/NUMBER/defense."""
    params, section = nets.params, nets.params.sweep
    early = params.evaluate.early_verdicts
    usual = (params.langevin.K, section.H_adv, section.H_def)
    settings: dict[str, Attack] = {}
    for norm in NORMS:
        for radius in section.radii(norm):
            ball = ThreatModel(norm, radius)
            config = attack_config(params, section.steps, early=early, ball=ball)
            for training, network in classifiers.items():
                settings[f"{norm}/{radius:.12g}/{training}"] = partial(pgd, nets, network, config)
            settings[f"{norm}/{radius:.12g}/{DEFENSE}"] = partial(bpda_eot, nets, usual, config)
    steps, attacker, defender = usual
    config = attack_config(params, section.steps, early=early)
    for count in section.attacker_replicas:
        sizes = (steps, count, defender)
        settings[f"H_adv/{count}/{DEFENSE}"] = partial(bpda_eot, nets, sizes, config)
    # No early verdicts: this sweep measures the effect of the number of replicas.
    config = attack_config(params, section.steps, early=False)
    for count in section.defender_replicas:
        sizes = (steps, attacker, count)
        settings[f"H_def/{count}/{DEFENSE}"] = partial(bpda_eot, nets, sizes, config)
    return settings


def pgd(
    nets: Nets, network: nn.Module, config: AttackConfig, purpose: str, data: Images
) -> dict[str, Tensor]:
    """PGD on a classifier by itself."""
    device = nets.hardware.device
    labels = data.labels.to(device)
    generator = make_generator(nets.params.seed, nets.dataset, purpose, device=device)
    pixels = from_bytes(data.images).to(device)
    record = run_attack(network, network, pixels, labels, config, generator=generator)
    return verdicts(record, labels)
