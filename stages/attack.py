"""Stage 5: attacks, shard by shard; a shard has its own random streams and its own file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from defense.attack import AttackConfig, AttackRecord, run_attack, run_transfer
from defense.pixels import from_bytes
from defense.rng import make_generator
from stages import StageError
from stages.artifacts import AttackResult, Images, load_images
from stages.classifiers import load_classifier
from stages.console import Track, say
from stages.hardware import Hardware
from stages.models import Nets, threat
from stages.params import ATTACKS, PGD, Params
from stages.resume import Scratch


@dataclass(frozen=True)
class Plan:
    """One attack, ready to be run shard by shard."""

    count: int  # images
    steps: int  # of the progress line, in one shard
    evaluate: Callable[[int, Tensor, Tensor, Callable[[int], None]], AttackRecord]
    """(shard, pixels (B,C,H,W), labels (B,), on_step) -> record."""


def run(
    params: Params,
    dataset: str,
    attack: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    energy: Path,
    pgd: Path,
    out: Path,
) -> None:
    """Attack the first test images; ``pgd`` is the record whose images a transfer judges."""
    if attack not in ATTACKS:
        raise StageError(f"attack: expected one of {list(ATTACKS)}, got {attack!r}")
    inputs = [images, classifier]
    if attack == "pgd":
        plan = plan_pgd(params, dataset, hardware, classifier)
    else:
        nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
        inputs.append(energy)
        if attack == "bpda_eot":
            plan = plan_bpda_eot(nets)
        else:
            count = params.attack.transfer.images
            data = load_images(images, "test", params.dataset(dataset), count)
            plan = plan_transfer(nets, attack, AttackResult.load(pgd).of_pgd(data, pgd))
            inputs.append(pgd)
    run_shards(
        plan,
        params,
        dataset,
        attack,
        hardware,
        load_images(images, "test", params.dataset(dataset), plan.count),
        inputs,
        out,
    )


def run_shards(
    plan: Plan,
    params: Params,
    dataset: str,
    attack: str,
    hardware: Hardware,
    data: Images,
    inputs: list[Path],
    out: Path,
) -> None:
    """Evaluate every shard that has no file yet; join the files into one record."""
    about = {
        "run": params.run,
        "dataset": dataset,
        "attack": attack,
        **params.conditions(attack),
        **hardware.conditions(),
    }

    def key(p: Params) -> object:
        return p.seed, attack, p.classifier, p.energy, p.data[dataset], p.langevin, p.attack

    parts = data.shards(params.attack.shard)
    shards: list[AttackResult] = []
    with (
        Scratch(f"attack-{dataset}-{attack}", params, key, inputs, hardware) as scratch,
        Track(
            f"{attack} {dataset}",
            plan.steps * len(parts),
            unit="steps",
            done=plan.steps * len(list(scratch.folder.glob("shard-*"))),
        ) as track,
    ):
        for number, part in enumerate(parts):
            scratch.check()
            path = scratch.folder / f"shard-{number:04d}.safetensors"

            def on_step(robust: int, shown: str = f"of {len(part.labels)} in this shard") -> None:
                track.advance(watch=f"{robust} robust {shown}")

            if not path.exists():
                pixels = from_bytes(part.images).to(hardware.device)
                record = plan.evaluate(number, pixels, part.labels.to(hardware.device), on_step)
                AttackResult(part, record, about).save(path)
            shards.append(AttackResult.load(path))
            track.advance(max(0, (number + 1) * plan.steps - track.done), so_far(shards))
        AttackResult.concatenate(shards).save(out)
        scratch.done()
    say(f"{attack} {dataset}: {so_far(shards)}")


def so_far(shards: list[AttackResult]) -> str:
    """Natural and robust accuracy over the shards that are done."""
    clean = torch.cat([s.record.clean_correct(s.images.labels) for s in shards])
    robust = torch.cat([s.record.robust(s.images.labels) for s in shards])
    natural, attacked = float(clean.float().mean()), float(robust.float().mean())
    return f"natural {natural:.3f}  robust {attacked:.3f}  (n={len(clean)})"


def plan_pgd(params: Params, dataset: str, hardware: Hardware, weights: Path) -> Plan:
    """PGD on the bare classifier: surrogate and target are one deterministic network."""
    classifier = load_classifier(params, dataset, hardware, weights)
    size = params.attack.pgd
    # Every image goes through all steps: transferred images should be as strong as they can be.
    config = attack_config(params, size, stop_at_break=False)

    def evaluate(shard: int, x: Tensor, y: Tensor, on_step: Callable[[int], None]) -> AttackRecord:
        generator = make_generator(params.seed, dataset, "pgd", shard, device=x.device)
        return run_attack(
            classifier, classifier, x, y, config, generator=generator, on_step=on_step
        )

    return Plan(size.images, steps_of(size), evaluate)


def plan_bpda_eot(nets: Nets) -> Plan:
    """Algorithm 1: gradients from H_adv replicas, verdicts from H_def."""
    params, langevin = nets.params, nets.params.langevin
    size = params.attack.bpda_eot
    config = attack_config(params, size, stop_at_break=True)

    def evaluate(shard: int, x: Tensor, y: Tensor, on_step: Callable[[int], None]) -> AttackRecord:
        purpose = f"bpda_eot/{shard}"
        return run_attack(
            nets.defense(langevin.K, langevin.H_adv, f"{purpose}/surrogate"),
            nets.defense(langevin.K, langevin.H_def, f"{purpose}/target"),
            x,
            y,
            config,
            generator=make_generator(params.seed, nets.dataset, purpose, device=x.device),
            on_step=on_step,
        )

    return Plan(size.images, steps_of(size), evaluate)


def plan_transfer(nets: Nets, attack: str, adversarial: Tensor) -> Plan:
    """Images of the PGD on the bare classifier, judged by the defense with K or K_short steps."""
    params = nets.params
    size, replicas = params.attack.pgd, params.attack.transfer.replicas
    steps = params.langevin.K if attack == "transfer_K" else params.langevin.K_short

    def evaluate(shard: int, x: Tensor, y: Tensor, on_step: Callable[[int], None]) -> AttackRecord:
        first = shard * params.attack.shard
        x_adv = adversarial[first : first + len(x)].to(x.device)
        target = nets.defense(steps, replicas, f"{attack}/{shard}")
        return run_transfer(target, x, x_adv, y, steps=size.steps)

    return Plan(len(adversarial), 1, evaluate)


def attack_config(params: Params, size: PGD, *, stop_at_break: bool) -> AttackConfig:
    """The library's configuration of one attack."""
    return AttackConfig(
        threat(params),
        size.steps,
        params.attack.step_255,
        size.restarts,
        stop_at_break=stop_at_break,
    )


def steps_of(size: PGD) -> int:
    """Iterates that an attack judges at most."""
    return size.restarts * (size.steps + 1)
