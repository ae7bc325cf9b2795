"""`stochsec cost`: what an experiment costs, counted from its parameters before anybody runs it.

An upper bound but for one assumption. Every image goes through all steps and restarts of an attack
(none is wrong when clean, none breaks early), and every verdict takes all its replicas. Assumed is
how often the target judges on the way: an image when clean, at its end, and as a suspect at
`SUSPECT_SHARE` of the steps. Left out are energies that are only looked at (under 2 % of a stage in
the presets) and all that no network does.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch

from defense.active_test import PlantConfig
from defense.chain_gradient import has_corners
from defense.energy import ACTIVATIONS
from defense.inference import flops
from stages import StageError
from stages.classifiers import new_classifier
from stages.console import say
from stages.energies import new_energy
from stages.findings import STARTS
from stages.params import (
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
from stages.tables import show
from stages.train_ebm import SAMPLES

SUSPECT_SHARE = 0.1
"""Of an attack's steps, those whose iterate the target judges. No attack on digits exceeds 0.05."""

PRODUCT = 2
"""Gradients that a Hessian product costs: value and tangent side by side, forward and back. The
way back also makes each step again, one gradient: with the products it is three chains."""

SIZES = {
    "digits": (1_297, 500),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "svhn": (73_257, 26_032),
}
"""Training and test images of the sources that come with some."""

HOW_TO_READ = """\
An upper bound, as if no image broke and every verdict took all replicas, but for one assumption: \
the target judges suspects at {:.0%} of an attack's steps. Left out are denoising, one step more \
for every chain, and the levels that a training tells. A classifier pass is one image forward; \
with a gradient it counts 3. PFLOP: 10^15 multiplications and additions, the way back through \
chains among them."""
HOW_LONG = """ Hours: operations at the rates that {} has of the nearest image size; of a \
classifier, the rate of its training."""


@dataclass(frozen=True)
class Work:
    """What is counted, all of single images."""

    chain: int = 0  # Langevin steps of the defense
    replay: int = 0  # those made again on the way back through a chain
    product: int = 0  # Hessian products there
    sample: int = 0  # Langevin steps of a training
    learn: int = 0  # energies with a gradient in the weights
    look: int = 0  # logits
    slope: int = 0  # logits with a gradient in the image
    train: int = 0  # logits with a gradient in the weights
    slope_in_training: int = 0  # logits with a gradient in the image, for adversarial training

    def __add__(self, other: "Work") -> "Work":
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __rmul__(self, times: int) -> "Work":
        return Work(*(times * count for count in astuple(self)))


class Timed(NamedTuple):
    """What has a rate of its own: a task of `stochsec bench`, a precision, the side of images."""

    task: str
    precision: str
    side: int


@dataclass(frozen=True)
class Cost:
    """What a stage costs on a dataset."""

    dataset: str
    stage: str
    work: Work
    flop: Counter[Timed]

    @property
    def image_steps(self) -> int:
        """Langevin steps times images; the way back through a chain is none."""
        return self.work.chain + self.work.sample

    @property
    def classifier_passes(self) -> int:
        """Images forward; with a gradient they count 3."""
        return self.work.look + 3 * (
            self.work.slope + self.work.train + self.work.slope_in_training
        )

    @property
    def pflop(self) -> float:
        """10^15 multiplications and additions."""
        return self.flop.total() / 1e15

    def hours(self, rates: Mapping[Timed, float]) -> float:
        """At measured operations per second, those of the nearest image size."""
        seconds = 0.0
        for timed, count in self.flop.items():
            alike = [one for one in rates if one[:2] == timed[:2]]
            if not alike:
                raise StageError(
                    f"bench: expected a row of compiled {timed.task} in {timed.precision}, got "
                    + (", ".join(sorted({" in ".join(one[:2]) for one in rates})) or "none")
                )
            seconds += count / rates[min(alike, key=lambda one: abs(one.side - timed.side))]
        return seconds / 3600


def run(params: Params, bench: Path | None) -> None:
    """Print what every stage costs; in hours too, if there is a file of `stochsec bench`."""
    rates = read_rates(bench) if bench else None
    rows, lines = costs(params), []
    for dataset in params.datasets:
        own = [row for row in rows if row.dataset == dataset]
        lines += [*own, total(dataset, own)]
    if len(params.datasets) > 1:
        lines.append(total("all", rows))
    table = pd.DataFrame(
        {
            "dataset": row.dataset,
            "stage": row.stage,
            "image-steps": f"{row.image_steps:,}",
            "classifier passes": f"{row.classifier_passes:,}",
            "PFLOP": short(row.pflop),
            **({"hours": short(row.hours(rates))} if rates is not None else {}),
        }
        for row in lines
    )
    show(table, f"What the experiment {params.run} costs at most")
    say(HOW_TO_READ.format(SUSPECT_SHARE) + (HOW_LONG.format(bench) if bench else ""))


def short(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def total(dataset: str, rows: list[Cost]) -> Cost:
    """The sum of some rows."""
    work, flop = (row.work for row in rows), (row.flop for row in rows)
    return Cost(dataset, "total", sum(work, Work()), sum(flop, Counter()))


def costs(params: Params) -> list[Cost]:
    """Of every stage of dvc.yaml that computes, on every dataset; the first word is its name."""
    rows = []
    for dataset in params.datasets:
        prices = prices_of(params, dataset)
        for stage, work in works(params, dataset):
            flop = Counter[Timed]()
            for unit, times in asdict(work).items():
                timed, price = prices[unit]
                flop[timed] += times * price
            rows.append(Cost(dataset, stage, work, +flop))  # without zeros
    return rows


def prices_of(params: Params, dataset: str) -> dict[str, tuple[Timed, int]]:
    """Operations of each unit of `Work`, and what its rate is; counted on no device."""
    data = params.dataset(dataset)
    with torch.device("meta"):
        energy = new_energy(params, dataset, "convergent")
        classifier = new_classifier(params, dataset).eval()
        x = torch.rand(1, data.channels, data.image_size, data.image_size)
    step = flops(energy, x)
    chain = Timed("langevin", params.langevin.precision, data.image_size)
    update = Timed("ebm_update", params.ebm.precision, data.image_size)
    asked = Timed("classifier_step", "tf32", data.image_size)  # torch's default
    trained = asked._replace(precision=data.classifier.precision)
    return {
        "chain": (chain, step),
        "replay": (chain, step),
        "product": (chain, PRODUCT * step),
        "sample": (update, step),
        "learn": (update, flops(energy, x, weights=True)),
        "look": (asked, flops(classifier, x, back=False)),
        "slope": (asked, flops(classifier, x)),
        "train": (trained, flops(classifier, x, weights=True)),
        "slope_in_training": (trained, flops(classifier, x)),
    }


def works(params: Params, dataset: str) -> Iterator[tuple[str, Work]]:
    """The work of every stage on a dataset."""
    ebm, attack, langevin = params.ebm, params.attack, params.langevin
    compared = dataset == params.compare_dataset
    train, test = sizes(params, dataset)
    data = params.data[dataset]
    yield "train_classifier", data.classifier.epochs * Work(train=train, look=test)
    adversary = Work(slope_in_training=data.adversarial.steps * train)
    yield (
        "train_adversarially",
        data.adversarial.epochs * (Work(train=train, look=test) + adversary),
    )
    for phase in PHASES:
        if compared or phase in ("adam", "convergent"):
            batches = ebm.phase_1_batches if phase.endswith("adam") else ebm.phase_2_batches
            update = ebm.batch * Work(sample=ebm.steps, learn=2)  # from data and from chains
            yield f"ebm_{phase}", batches * update
    bare = attacked(attack.pgd.steps, attack.pgd.restarts, Work(slope=1), Work(look=1))
    for name in PGD_ATTACKS:
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
        yield "snapshots", snapshots(params)
        yield "lyapunov", lyapunov(params)
        yield "fid", fid(params)
    inspected = len(STARTS) * params.inspect.chains * Work(chain=params.inspect.long_steps)
    levels = params.inspect.chains * Work(chain=max(params.inspect.levels))
    inspected += (2 + bool(ebm.bank)) * levels
    yield f"inspect {INSPECTED[0]}", inspected
    for phase in INSPECTED[1:] if compared else ():
        yield f"inspect_others {phase}", inspected
    screened = params.diagnose.images * judged(langevin.K, langevin.H_adv)
    shown = Work(look=2 * params.diagnose.images) + judged(langevin.K, langevin.H_adv)
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
    """What the defense says of one image."""
    return replicas * Work(chain=steps, look=1)


def asked(steps: int, replicas: int, gradient: str, *, smooth: bool) -> Work:
    """What the surrogate says of one image, with its gradient.

    An exact gradient through a piecewise linear energy makes the steps again, for no product. The
    classifier's activations are made again too, as they are for many replicas.
    """
    if gradient == "none":
        return judged(steps, replicas)
    replay = 0 if gradient == "identity" else steps
    product = replay if smooth or gradient == "smoothed" else 0
    return replicas * Work(chain=steps, replay=replay, product=product, look=1, slope=1)


def attacked(steps: int, restarts: int, surrogate: Work, target: Work) -> Work:
    """One image: answers of the surrogate, and the target's at both ends and on suspects."""
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
    """Random points, a planted one for the fit and for the decision, verdicts; then the attack."""
    section, langevin = params.evaluate.active_test, params.langevin
    verdicts = (PlantConfig.random_points + 2) * langevin.H_def
    bare = Work(look=2)  # are the logits those of the last layer?
    planted = judged(langevin.K, 3 * section.points + verdicts) + bare
    named = params.evaluate.attacks[section.attack]
    return section.images * (planted + defended(params, "convergent", named))


def comparison(params: Params) -> Work:
    """Natural and transferred images along the whole grid; an attack at each number of steps."""
    compare, size = params.compare, params.compare.bpda_eot
    along = compare.replicas * Work(chain=max(compare.K), look=len(compare.K))
    work = 2 * compare.images * along
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

    bare = attacked(section.steps, 1, Work(slope=1), Work(look=1))
    radii = sum(len(section.radii(norm)) for norm in NORMS)
    work = radii * (one(section.H_adv, section.H_def) + len(TRAININGS) * bare)
    for count in section.attacker_replicas:
        work += one(count, section.H_def)
    for count in section.defender_replicas:
        work += one(section.H_adv, count)
    return section.images * work


def snapshots(params: Params) -> Work:
    """The chains of every snapshot, of phase 1 and of both energies that follow it."""
    chains = (1 + len(MODELS)) * params.ebm.snapshots * SAMPLES
    return chains * Work(chain=params.snapshots.long_steps)


def lyapunov(params: Params) -> Work:
    """Two trajectories for each strength, separation and energy."""
    section = params.lyapunov
    settings = len(section.eta) * len(section.separations) * len(EVALUATED)
    return 2 * settings * section.chains * Work(chain=section.burn_in + section.steps)


def fid(params: Params) -> Work:
    """Chains from training images, and features of all that is compared."""
    section = params.fid
    along = len(MODELS) * section.images * Work(chain=max(section.K), look=len(section.K))
    return along + 2 * section.images * Work(look=1)


def read_rates(path: Path) -> dict[Timed, float]:
    """Operations per second of the fast engine; on a CPU, where tf32 is float32, of both.

    A row's rate is its share of the machine's convolution rate. The largest batch counts.
    """
    rates: dict[Timed, float] = {}
    try:
        result = json.loads(path.read_text())
        limits = {limit["precision"]: 1e9 * limit["conv_gflops"] for limit in result["limits"]}
        for row in sorted(result["rows"], key=lambda row: row["batch"]):
            side, precision = int(row["image"].split("x")[-1]), row["precision"]
            rate = row["limit_fraction"] * limits[precision]
            same = ("tf32",) if (row["device"], precision) == ("cpu", "float32") else ()
            if row["engine"] == "compiled" and rate > 0:
                rates |= {Timed(row["task"], name, side): rate for name in (precision, *same)}
    except OSError as error:
        raise StageError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise StageError(f"{path}: expected what `stochsec bench` writes ({reason})") from None
    return rates
