"""Every attack of the suite on one system."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from defense.attack import AttackConfig, AttackRecord, run_attack, run_transfer
from defense.gradient.chain import GradientMode
from defense.known_noise import KnownNoise
from defense.rng import make_generator
from stages.attack import Plan, run_shards, so_far
from stages.core.artifacts import Images, load_images, save_tensors
from stages.core.build import attack_config, threat
from stages.core.console import said_warnings, say
from stages.core.files import WholeFolder, fingerprint
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch
from stages.core.sections import SystemAttack
from stages.reporting.flags import flags_of
from stages.systems import certificate
from stages.systems.build import Built, build, section_of, settings_of, system_of

PGD, TRANSFER, CERTIFICATE = "pgd", "transfer", "certificate"
BARE = 2.0  # cost of a gradient of the bare classifier: a forward pass, and as much on the way back


@dataclass(frozen=True)
class Files:
    """What is attacked; ``network`` None: where `train-system` writes it."""

    images: Path
    classifier: Path
    network: Path | None


def run(
    params: Params,
    name: str,
    hardware: Hardware,
    files: Files,
    out: Path,
    *,
    afresh: bool = False,
) -> list[AttackResult]:
    """Attack a system with the whole suite; one record for each attack in the folder ``out``.

    First PGD on the bare classifier, whose images are transferred to the defense; then the attacks
    of `systems.attacks` that are possible. A killed run resumes.
    """
    whole = WholeFolder(out, f"{PGD}.safetensors")
    section, dataset = section_of(params), params.compare_dataset
    data = load_images(files.images, "test", params.dataset(dataset), section.images)
    built = build(params, name, hardware, classifier=files.classifier, network=files.network)
    inputs = {"images": files.images, **built.files}

    def key(p: Params) -> object:
        settings = None if built.system is None else settings_of(system_of(p, name))
        return (
            p.seed,
            p.data[dataset],
            p.attack,
            section_of(p).model_dump(exclude={"settings"}),
            settings,
        )

    results: dict[str, AttackResult] = {}
    title = f"systems-{dataset}-{name.replace('/', '-')}"
    with said_warnings(), Scratch(title, params, key, inputs, hardware, afresh=afresh) as scratch:

        def attacked(attack: str, plan: Plan, images: Images = data) -> None:
            about = about_of(params, built, hardware, inputs) | {"attack": attack, **plan.defense}
            with Scratch(attack, params, key, inputs, hardware, within=scratch) as inner:
                parts = dict(enumerate(images.shards(params.attack.shard)))
                shards = run_shards(plan, f"{name} {attack}", parts, hardware, inner, about)
                results[attack] = AttackResult.concatenate(shards)
                results[attack].about["flags"] = flags_of(results[attack])
            say(f"{name} {attack}: {so_far(shards)}")

        attacked(PGD, pgd(params, built))
        attacked(TRANSFER, transfer(params, built, results[PGD]))
        for attack, settings in section.attacks.items():
            why = left_out(settings, built)
            if why:
                say(f"{name} {attack}: left out, {why}")
            else:
                attacked(attack, suite(params, built, attack, settings), first(data, settings))
        certified = certificate.measure(params, built, data, hardware, scratch)
        with whole as partial:
            for attack, result in results.items():
                result.save(partial / f"{attack}.safetensors")
            if certified is not None:
                about = about_of(params, built, hardware, inputs)
                save_tensors(partial / f"{CERTIFICATE}.safetensors", certified, about)
        scratch.done()
    say(f"attack-system {name}: {out}")
    return list(results.values())


def first(data: Images, attack: SystemAttack) -> Images:
    """The images that an attack is run on."""
    count = attack.images or len(data.labels)
    return data.shards(count)[0]


def about_of(
    params: Params, built: Built, hardware: Hardware, inputs: dict[str, Path]
) -> dict[str, object]:
    """What every record of a system says."""
    system = built.system
    return {
        "run": params.run,
        "dataset": params.compare_dataset,
        "system": built.name,
        "settings": settings_of(system) if system else {},
        "judged_on": params.dataset(params.compare_dataset).judged_on,
        "random": built.random,
        "prediction_cost": round(built.cost(section_of(params).H_def, None), 1),
        **hardware.conditions(),
        "files": {role: fingerprint(path) for role, path in inputs.items()},
    }


def left_out(attack: SystemAttack, built: Built) -> str | None:
    """Why an attack is not possible; None if it is."""
    if attack.noise == "known" and not built.random:
        return "the purifier draws no noise"
    if attack.gradient == "exact" and not built.has_gradient:
        return "the purifier has no gradient of its own"
    return None


def config_of(params: Params, attack: SystemAttack) -> AttackConfig:
    """One of systems.attacks as the library has it."""
    return attack_config(
        params,
        attack.steps,
        early=params.evaluate.early_verdicts,
        ball=threat(params, attack.scale),
        restarts=attack.restarts,
        stop_at_break=attack.stop_at_break,
        rule=attack.rule,
        loss=attack.loss,
    )


def conditions(config: AttackConfig, cost: float, **more: object) -> dict[str, object]:
    """What the record of one attack says, with the ``cost`` of one look at an image."""
    return {
        "norm": config.threat.norm,
        "eps_255": config.threat.eps_255,
        **({"step_255": config.step_255} if config.rule == "pgd" else {}),
        "steps": config.steps,
        "restarts": config.restarts,
        "rule": config.rule,
        "loss": config.loss,
        "early_verdicts": config.early_verdicts,
        "cost": round(cost, 1),
        **more,
    }


def pgd(params: Params, built: Built) -> Plan:
    """PGD on the bare classifier, the same for every system; each image goes through all steps."""
    size, bare = params.attack.pgd, built.bare
    config = attack_config(
        params, size.steps, early=False, restarts=size.restarts, stop_at_break=False
    )

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        generator = make_generator(params.seed, "systems", PGD, shard, device=x.device)
        return run_attack(bare, bare, x, y, config, generator=generator, on_step=on_step)

    said = conditions(config, BARE)
    return Plan(size.restarts * (size.steps + 1), {}, evaluate, said)


def transfer(params: Params, built: Built, made: AttackResult) -> Plan:
    """The images of PGD, judged by the defense."""
    section, size = section_of(params), params.attack.pgd
    config = attack_config(params, size.steps, early=params.evaluate.early_verdicts)
    places = {place: i for i, place in enumerate(made.images.index.tolist())}

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        rows = torch.tensor([places[place] for place in images.index.tolist()])
        target = built.defense(section.H_def, f"{TRANSFER}/{shard}/target")
        return run_transfer(target, x, made.record.adversarial[rows].to(x.device), y, config)

    said = conditions(config, BARE, **({"H_def": section.H_def} if built.random else {}))
    return Plan(1, {}, evaluate, said)


def suite(params: Params, built: Built, name: str, attack: SystemAttack) -> Plan:
    """An attack of `systems.attacks`."""
    section, config = section_of(params), config_of(params, attack)
    own = attack.gradient in ("exact", "best") and built.has_gradient
    gradient: GradientMode = "exact" if own else "identity"
    asked = attack.gradient != "none"
    known = attack.noise == "known"
    replicas = section.H_def if known else attack.H_adv or section.H_adv

    def evaluate(
        shard: int, images: Images, x: Tensor, y: Tensor, on_step: Callable[[int], None]
    ) -> AttackRecord:
        surrogate = built.defense(replicas, f"{name}/{shard}/surrogate", gradient)
        target = built.defense(section.H_def, f"{name}/{shard}/target")
        generator = make_generator(params.seed, "systems", built.name, name, shard, device=x.device)
        if known:
            fixed = KnownNoise(surrogate, f"{params.seed}/{name}")
            return run_attack(fixed, fixed, x, y, config, generator=generator, on_step=on_step)
        return run_attack(surrogate, target, x, y, config, generator=generator, on_step=on_step)

    said = conditions(
        config,
        built.cost(replicas, gradient if asked else None),
        gradient=gradient if asked else "none",
        noise=attack.noise,
        **({"H_adv": replicas, "H_def": section.H_def} if built.random else {}),
    )
    return Plan(attack.restarts * (attack.steps + 1), {}, evaluate, said)
