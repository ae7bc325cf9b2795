"""Stage 5: attacks, shard by shard; a shard has its own random streams and its own file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.attack import AttackConfig, AttackRecord, run_attack, run_transfer
from defense.gradient.chain import has_corners
from defense.pixels import from_bytes
from defense.rng import make_generator
from stages import StageError
from stages.core.artifacts import Images, load_images
from stages.core.build import Nets, attack_config, named_attack
from stages.core.classifiers import load_classifier
from stages.core.console import Track, said_warnings, say
from stages.core.files import energy_name, fingerprint
from stages.core.hardware import Hardware
from stages.core.params import PGD_ATTACKS, NamedAttack, Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch
from stages.reporting.flags import flags_of

Evaluate = Callable[[int, Images, Tensor, Tensor, Callable[[int], None]], AttackRecord]
"""(shard, its images, pixels (B,C,H,W), labels (B,), on_step) -> record."""


@dataclass(frozen=True)
class Files:
    """What an attack reads; ``pgd`` is the record whose images a transfer judges."""

    images: Path
    classifier: Path
    energy: Path
    pgd: Path


@dataclass(frozen=True)
class Plan:
    """One attack, ready to be run shard by shard."""

    steps: int  # of the progress line, in one shard
    inputs: dict[str, Path]  # by role
    evaluate: Evaluate
    defense: dict[str, object]  # what the record says of it


def run(
    params: Params,
    dataset: str,
    attack: str,
    hardware: Hardware,
    files: Files,
    out: Path,
    *,
    subset: tuple[int, int] | None = None,
    afresh: bool = False,
    within: Scratch | None = None,
) -> AttackResult:
    """Attack the first test images, or a ``subset`` [start, stop); write and return one record.

    Shards that an earlier run of the same command has finished are reused, unless ``afresh``. An
    attack of an evaluation keeps its unfinished work ``within`` that of the evaluation.
    """
    plan = make_plan(params, dataset, attack, hardware, files)
    start, stop = subset or (0, params.images(attack))
    if not 0 <= start < stop:
        raise StageError(f"subset: expected start < stop, got {start}:{stop}")
    data = load_images(files.images, "test", params.dataset(dataset), stop)
    about = {
        "run": params.run,
        "dataset": dataset,
        "attack": attack,
        **plan.defense,
        **params.conditions(attack),
        "judged_on": params.dataset(dataset).judged_on,
        **hardware.conditions(),
        "subset": subset,
        "files": {role: fingerprint(path) for role, path in plan.inputs.items()},
    }

    def key(p: Params) -> object:
        size = (p.images(attack), p.attack.shard, subset)
        return p.seed, attack, size, p.conditions(attack), p.data[dataset]

    name = f"attack-{dataset}-{attack}"
    parts = {
        number: part
        for number, part in enumerate(data.shards(params.attack.shard, start))
        if len(part.labels)
    }
    with (
        said_warnings(),
        Scratch(name, params, key, plan.inputs, hardware, afresh=afresh, within=within) as scratch,
    ):
        shards = run_shards(plan, name, parts, hardware, scratch, about)
        joined = AttackResult.concatenate(shards)
        joined.about["flags"] = flags_of(joined)
        joined.save(out)
        scratch.done()
    say(f"{attack} {dataset}: {so_far(shards)}")
    return joined


def run_shards(
    plan: Plan,
    name: str,
    parts: dict[int, Images],
    hardware: Hardware,
    scratch: Scratch,
    about: dict[str, object],
) -> list[AttackResult]:
    """Evaluate every shard that has no file yet."""
    shards: list[AttackResult] = []
    finished = len(list(scratch.folder.glob("shard-*.safetensors")))
    with Track(name, plan.steps * len(parts), unit="steps", done=plan.steps * finished) as track:
        for done, (number, part) in enumerate(parts.items(), start=1):
            path = scratch.folder / f"shard-{number:04d}.safetensors"

            def on_step(robust: int, shown: str = f"of {len(part.labels)} in this shard") -> None:
                scratch.check_clock()
                track.advance(watch=f"{robust} robust {shown}")

            if not path.exists():
                scratch.check()
                pixels = from_bytes(part.images).to(hardware.device)
                labels = part.labels.to(hardware.device)
                record = plan.evaluate(number, part, pixels, labels, on_step)
                AttackResult(part, record, about).save(path)
                scratch.lap()
            shards.append(AttackResult.load(path))
            track.advance(max(0, done * plan.steps - track.done), so_far(shards))
    return shards


def so_far(shards: list[AttackResult]) -> str:
    """Natural and robust accuracy over the shards that are done."""
    clean = torch.cat([s.record.clean_correct(s.images.labels) for s in shards])
    robust = torch.cat([s.record.robust(s.images.labels) for s in shards])
    natural, attacked = float(clean.float().mean()), float(robust.float().mean())
    return f"natural {natural:.3f}  robust {attacked:.3f}  (n={len(clean)})"


def make_plan(params: Params, dataset: str, attack: str, hardware: Hardware, files: Files) -> Plan:
    """The attack of that name, or `StageError` with the names that there are."""
    if attack not in params.attacks():
        raise StageError(f"attack: expected one of {params.attacks()}, got {attack!r}")
    inputs = {"images": files.images, "classifier": files.classifier}
    if attack in PGD_ATTACKS:
        classifier = load_classifier(params, dataset, hardware, files.classifier)
        evaluate = attack_classifier(params, dataset, attack, classifier)
        size = params.attack.pgd
        said = {"training": PGD_ATTACKS[attack], **described(classifier=classifier)}
        return Plan(size.restarts * (size.steps + 1), inputs, evaluate, said)
    nets = Nets.load(params, dataset, hardware, classifier=files.classifier, energy=files.energy)
    inputs["energy"] = files.energy
    conditions = params.conditions(attack)
    steps, replicas = int(str(conditions["K"])), int(str(conditions["H_def"]))
    defense: dict[str, object] = {
        **described(classifier=nets.classifier, energy=nets.energy),
        "energy": energy_name(files.energy),
        "activation": nets.energy.architecture["activation"],
        "cost": round(nets.cost(steps, replicas), 1),
    }
    named = params.named(attack)
    if named is not None:
        if named.gradient == "smoothed" and not has_corners(nets.energy):
            raise StageError(
                f"{attack}: {files.energy} has no corners to smooth; use gradient exact"
            )
        asked = named.restarts * (named.steps + 1)
        return Plan(asked, inputs, attack_defense(nets, attack, named), defense)
    pgd = AttackResult.load(files.pgd)
    inputs["pgd"] = files.pgd
    judge = judge_transferred(nets, attack, pgd, files)
    return Plan(1, inputs, judge, defense)


def described(**networks: nn.Module) -> dict[str, object]:
    """What converted networks say they were made of."""
    said = {f"{role}_made_of": getattr(net, "about", {}) for role, net in networks.items()}
    return {name: about for name, about in said.items() if about}


def attack_classifier(params: Params, dataset: str, attack: str, classifier: nn.Module) -> Evaluate:
    """PGD on the bare classifier: surrogate and target are one deterministic network."""
    size = params.attack.pgd
    # Every image goes through all steps: transferred images should be as strong as they can be.
    config = attack_config(
        params, size.steps, early=False, restarts=size.restarts, stop_at_break=False
    )

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        generator = make_generator(params.seed, dataset, attack, shard, device=x.device)
        return run_attack(
            classifier, classifier, x, y, config, generator=generator, on_step=on_step
        )

    return evaluate


def attack_defense(nets: Nets, attack: str, named: NamedAttack) -> Evaluate:
    """Algorithm 1 and its variants: loss gradients from H_adv replicas, verdicts from H_def."""
    params, langevin = nets.params, nets.params.langevin
    replicas = named.H_adv or langevin.H_adv
    config = named_attack(params, named, early=params.early_verdicts(attack))

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        purpose = f"{attack}/{shard}"
        return run_attack(
            nets.defense(langevin.K, replicas, f"{purpose}/surrogate", named.mode()),
            nets.defense(langevin.K, langevin.H_def, f"{purpose}/target"),
            x,
            y,
            config,
            generator=make_generator(params.seed, nets.dataset, purpose, device=x.device),
            on_step=on_step,
        )

    return evaluate


def bpda_eot(
    nets: Nets, defense: tuple[int, int, int], config: AttackConfig, purpose: str, data: Images
) -> dict[str, Tensor]:
    """Algorithm 1 against the ``defense`` (K, H_adv, H_def), for sweeps of a reduced size.

    Returns ``natural`` (correct on the clean image) and ``robust`` (never broken), both (B,) bool.
    """
    steps, surrogate, target = defense
    device = nets.hardware.device
    labels = data.labels.to(device)
    record = run_attack(
        nets.defense(steps, surrogate, f"{purpose}/surrogate"),
        nets.defense(steps, target, f"{purpose}/target"),
        from_bytes(data.images).to(device),
        labels,
        config,
        generator=make_generator(nets.params.seed, nets.dataset, purpose, device=device),
    )
    return verdicts(record, labels)


def verdicts(record: AttackRecord, labels: Tensor) -> dict[str, Tensor]:
    """Which images are classified correctly when clean, and which are robust; both (B,) bool."""
    return {"natural": record.clean_correct(labels), "robust": record.robust(labels)}


def judge_transferred(nets: Nets, attack: str, pgd: AttackResult, files: Files) -> Evaluate:
    """Images of the PGD on the bare classifier, judged by the defense."""
    params = nets.params
    conditions = params.conditions(attack)
    steps, replicas = int(str(conditions["K"])), int(str(conditions["H_def"]))
    config = attack_config(params, params.attack.pgd.steps, early=params.early_verdicts(attack))

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        made = params.conditions("pgd")
        x_adv = pgd.of_pgd(images, files.pgd, files.classifier, made).to(x.device)
        target = nets.defense(steps, replicas, f"{attack}/{shard}")
        try:
            return run_transfer(target, x, x_adv, y, config)
        except ValueError as error:
            raise StageError(f"{files.pgd}: {error}") from None

    return evaluate
