"""`stochsec cost`: an upper bound on the cost of an experiment, counted from its parameters.

Every image goes through all steps and restarts of an attack, and every verdict draws all replicas.
The target judges the clean image, the final image, and suspects. The number of suspects is an
assumption, not a bound: `SUSPECT_SHARE` of the steps.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pandas as pd

from defense.energy import ACTIVATIONS
from defense.gradient.chain import has_corners
from defense.studies.active_test import PlantConfig
from stages import StageError
from stages.core.console import say
from stages.core.params import (
    EVALUATED,
    INSPECTED,
    MODELS,
    NORMS,
    PGD_ATTACKS,
    PHASES,
    SMOOTH,
    TRAININGS,
    NamedAttack,
    Params,
)
from stages.reporting.findings import STARTS
from stages.reporting.tables import show
from stages.train_ebm import SAMPLES

SUSPECT_SHARE = 0.1
"""Assumed share of attack steps whose iterate the target verifies; at most 0.05 on digits."""

STEP_BACK = 3
"""Cost of backpropagation through one Langevin step, in steps: 1 to recompute it, 2 for the
Hessian-vector product (value and tangent, forward and backward)."""

LEARN = 3
"""Cost of the weight gradient for one pair of images (data and chain), in Langevin steps."""

SIZES = {
    "digits": (1_297, 500),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
}
"""Training and test images of the sources that come with some."""

HOW_TO_READ = f"""\
An upper bound, as if no image broke and every verdict drew all replicas. One number is assumed: \
the target verifies suspects at {SUSPECT_SHARE:.0%} of an attack's steps. An image-step is one \
Langevin step of one image; backpropagation through it counts {STEP_BACK}. A classifier pass is \
one image forward; with a gradient it counts 3."""


@dataclass(frozen=True)
class Work:
    """What is counted, all of single images."""

    steps: int = 0  # Langevin steps
    passes: int = 0  # through a classifier

    def __add__(self, other: "Work") -> "Work":
        return Work(self.steps + other.steps, self.passes + other.passes)

    def __rmul__(self, times: int) -> "Work":
        return Work(times * self.steps, times * self.passes)


LOOK, SLOPE = Work(passes=1), Work(passes=3)  # logits, and logits with a gradient


class Cost(NamedTuple):
    """What a stage takes on a dataset."""

    dataset: str
    stage: str
    work: Work


def run(params: Params, rate: float | None) -> None:
    """Print what every stage takes; in hours too, at ``rate`` image-steps a second."""
    rows = costs(params)
    lines = []
    for dataset in params.datasets:
        own = [row for row in rows if row.dataset == dataset]
        lines += [*own, Cost(dataset, "total", sum((row.work for row in own), Work()))]
    if len(params.datasets) > 1:
        lines.append(Cost("all", "total", sum((row.work for row in rows), Work())))
    table = pd.DataFrame(
        {
            "dataset": row.dataset,
            "stage": row.stage,
            "image-steps": f"{row.work.steps:,}",
            "classifier passes": f"{row.work.passes:,}",
            **({"hours of steps": f"{row.work.steps / rate / 3600:,.3g}"} if rate else {}),
        }
        for row in lines
    )
    show(table, f"What the experiment {params.run} takes at most")
    say(HOW_TO_READ)


def costs(params: Params) -> list[Cost]:
    """Costs of all computing stages of dvc.yaml; the first word of ``stage`` is its name there."""
    return [
        Cost(dataset, stage, work)
        for dataset in params.datasets
        for stage, work in works(params, dataset)
    ]


def works(params: Params, dataset: str) -> Iterator[tuple[str, Work]]:
    """The work of every stage on a dataset."""
    ebm, attack, langevin = params.ebm, params.attack, params.langevin
    compared = dataset == params.compare_dataset
    train, test = sizes(params, dataset)
    data = params.data[dataset]
    epoch = train * SLOPE + test * LOOK
    yield "train_classifier", data.classifier.epochs * epoch
    adversary = data.adversarial.steps * train * SLOPE
    yield "train_adversarially", data.adversarial.epochs * (epoch + adversary)
    for phase in PHASES:
        if compared or phase in ("adam", "convergent"):
            batches = ebm.phase_1_batches if phase.endswith("adam") else ebm.phase_2_batches
            yield f"ebm_{phase}", Work(batches * ebm.update.batch * (ebm.update.steps + LEARN))
    for name in PGD_ATTACKS:
        bare = attacked(attack.pgd.steps, attack.pgd.restarts, SLOPE, LOOK)
        yield f"attack_{name}", attack.pgd.images * bare
    for name, steps in (("K", langevin.K), ("K_short", langevin.K_short)):
        both = 2 * attack.transfer.images  # clean and adversarial
        yield f"attack_transfer {name}", both * judged(steps, attack.transfer.replicas)
    algorithm_1 = params.named("bpda_eot")
    assert algorithm_1 is not None
    yield "attack_bpda_eot", attack.bpda_eot.images * defended(params, "convergent", algorithm_1)
    if compared:
        for phase in EVALUATED:
            yield f"evaluate {phase}", evaluation(params, phase)
        yield "active_test", active_test(params)
        yield "compare", comparison(params)
        yield "sweep", sweep(params)
        # The chains of every snapshot, of phase 1 and of both energies that follow it.
        chains = (1 + len(MODELS)) * ebm.snapshots * SAMPLES
        yield "snapshots", Work(chains * params.snapshots.long_steps)
        yield "lyapunov", lyapunov(params)
        yield "fid", fid(params)
    inspected = len(STARTS) * params.inspect.chains * params.inspect.long_steps
    inspected += (2 + bool(ebm.update.bank)) * params.inspect.chains * max(params.inspect.levels)
    yield f"inspect {INSPECTED[0]}", Work(inspected)
    for phase in INSPECTED[1:] if compared else ():
        yield f"inspect_others {phase}", Work(inspected)
    screened = params.diagnose.images * judged(langevin.K, langevin.H_adv)
    shown = 2 * params.diagnose.images * LOOK + judged(langevin.K, langevin.H_adv)
    yield "diagnose", 2 * screened + 2 * judged(langevin.K, params.diagnose.replicas) + shown


def sizes(params: Params, dataset: str) -> tuple[int, int]:
    """Training and test images."""
    data = params.dataset(dataset)
    name = {"embedded": "digits", "torchvision": dataset}.get(data.source, "")
    known = SIZES.get(name, (0, 0))
    train, test = data.train_images or known[0], data.test_images or known[1]
    if not (train and test):
        raise StageError(
            f"data.{dataset}: expected numbers train_images and test_images, which source "
            f"{data.source} does not tell beforehand, got null"
        )
    return train, test


def has_smooth_chains(params: Params, phase: str) -> bool:
    """Whether the energy of a phase has a Hessian."""
    energy = params.energy
    name = energy.smooth_activation if phase.startswith(SMOOTH) else energy.activation
    return not has_corners(ACTIVATIONS[name]())


def judged(steps: int, replicas: int) -> Work:
    """Work of one prediction of the defense for one image."""
    return Work(replicas * steps, replicas)


def asked(steps: int, replicas: int, gradient: str, *, smooth: bool) -> Work:
    """Work of one surrogate query for one image: logits, and the gradient if there is one.

    An exact gradient through a piecewise linear energy recomputes the steps, but needs no
    Hessian-vector product. The classifier's activations are recomputed too, as for many replicas.
    """
    if gradient == "none":
        return judged(steps, replicas)
    back = 0 if gradient == "identity" else STEP_BACK if smooth or gradient == "smoothed" else 1
    return replicas * (Work((1 + back) * steps) + LOOK + SLOPE)


def attacked(steps: int, restarts: int, surrogate: Work, target: Work) -> Work:
    """Work of an attack on one image: surrogate queries; target on clean, final and suspects."""
    questions = restarts * (steps + 1)
    return questions * surrogate + (2 + math.ceil(SUSPECT_SHARE * questions)) * target


def defended(params: Params, phase: str, named: NamedAttack) -> Work:
    """One image under an attack on the defense."""
    langevin, smooth = params.langevin, has_smooth_chains(params, phase)
    replicas = named.H_adv or langevin.H_adv
    surrogate = asked(langevin.K, replicas, named.gradient, smooth=smooth)
    return attacked(named.steps, named.restarts, surrogate, judged(langevin.K, langevin.H_def))


def evaluation(params: Params, phase: str) -> Work:
    """Transferred images, and every attack that the energy allows."""
    work = 2 * judged(params.langevin.K, params.langevin.H_def)
    for named in params.evaluate.attacks.values():
        if not named.left_out(phase, corners=not has_smooth_chains(params, phase)):
            work += defended(params, phase, named)
    return params.evaluate.images * work


def active_test(params: Params) -> Work:
    """Active test: inner points, the planted point (fit, decision), verdicts; then the attack."""
    section, langevin = params.evaluate.active_test, params.langevin
    verdicts = (PlantConfig.random_points + 2) * langevin.H_def
    planted = judged(langevin.K, 3 * section.points + verdicts)
    planted += 2 * LOOK  # are the logits those of the last layer?
    named = params.evaluate.attacks[section.attack]
    return section.images * (planted + defended(params, "convergent", named))


def comparison(params: Params) -> Work:
    """Natural and transferred images along the whole grid; an attack at each number of steps."""
    compare, size = params.compare, params.compare.bpda_eot
    work = 2 * compare.images * compare.replicas * Work(max(compare.K), len(compare.K))
    for steps in filter(None, compare.K):
        surrogate = asked(steps, size.H_adv, "identity", smooth=False)
        work += size.images * attacked(size.steps, 1, surrogate, judged(steps, size.H_def))
    return len(MODELS) * work


def sweep(params: Params) -> Work:
    """Every radius in both norms, on the defense and on two bare classifiers; every H."""
    section, steps = params.sweep, params.langevin.K

    def one(attacker: int, defender: int) -> Work:
        surrogate = asked(steps, attacker, "identity", smooth=False)
        return attacked(section.steps, 1, surrogate, judged(steps, defender))

    bare = attacked(section.steps, 1, SLOPE, LOOK)
    radii = sum(len(section.radii(norm)) for norm in NORMS)
    work = radii * (one(section.H_adv, section.H_def) + len(TRAININGS) * bare)
    for count in section.attacker_replicas:
        work += one(count, section.H_def)
    for count in section.defender_replicas:
        work += one(section.H_adv, count)
    return section.images * work


def lyapunov(params: Params) -> Work:
    """Two trajectories for each strength, separation and energy."""
    section = params.lyapunov
    settings = len(section.eta) * len(section.separations) * len(EVALUATED)
    return Work(2 * settings * section.chains * (section.burn_in + section.steps))


def fid(params: Params) -> Work:
    """Chains from training images, and features of all that is compared."""
    section = params.fid
    along = len(MODELS) * section.images * Work(max(section.K), len(section.K))
    return along + 2 * section.images * LOOK
