"""`stochsec tune`: chain length, denoising and replicas for somebody's classifier and images.

They are chosen on half of the images, and reported on the other half.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from defense.inference import classify
from defense.langevin import denoised
from defense.pixels import from_bytes, to_net, to_pixels
from defense.rng import make_generator
from defense.studies.diagnostics import states_at
from stages import StageError, attack
from stages.core.artifacts import Images, save_images
from stages.core.build import Nets, attack_config
from stages.core.console import Track, said_warnings, say
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch
from stages.custom.given import Given
from stages.reporting import rows, style
from stages.reporting.rows import Accuracy, count
from stages.reporting.tuning import over_settings

MAY_COST = 0.05  # natural accuracy that a setting may lose against the best one
AS_GOOD = 0.02  # fewer replicas are taken if they lose no more than this
FEWER = (1, 5)  # replicas that are tried besides all of them
ATTACKED = 2  # settings that BPDA+EOT is run on
LEAST = 20  # images in each half


@dataclass(frozen=True)
class Setting:
    """A chain of K steps, denoised or not, and the replicas of a prediction."""

    steps: int
    denoise: bool
    replicas: int

    def __str__(self) -> str:
        denoise = str(self.denoise).lower()
        return f"--set langevin.K={self.steps} --set langevin.denoise={denoise}"


@dataclass(frozen=True)
class Measured:
    """A setting and its accuracies; that under BPDA+EOT is None if it was not attacked."""

    setting: Setting
    natural: Accuracy
    transfer: Accuracy
    bpda_eot: Accuracy | None = None


@dataclass(frozen=True)
class Half:
    """Half of the images, and the same images after PGD on the bare classifier."""

    name: str
    images: Images
    adversarial: Tensor


def run(given: Given, out: Path, *, afresh: bool) -> Setting:
    """Choose a setting and report it; write ``out``/tune.csv and tune.png.

    The same chains from natural and from transferred images give every length, denoising and number
    of replicas. The `ATTACKED` best settings are attacked by BPDA+EOT on some images. Sizes are
    those of ``compare`` in the parameters. A killed run resumes.
    """
    params, size = given.params, given.params.compare
    sample = given.pictures.sample(2 * size.images)
    half = len(sample.labels) // 2
    if half < LEAST:
        raise StageError(f"images: expected at least {2 * LEAST} labelled ones, got {2 * half}")
    save_images(out / "images.npz", {"test": sample})
    with said_warnings():
        nets = given.nets()
        given.say_unlike(nets)
    inputs = {"images": out / "images.npz", **given.inputs}

    def key(p: Params) -> object:
        return p.seed, p.data, p.compare, p.attack, p.langevin

    with (
        said_warnings(),
        Scratch("tune", params, key, inputs, given.hardware, afresh=afresh) as scratch,
    ):
        first, second = halves(given, out / "images.npz", sample, half, scratch)
        found = over_chains(nets, first, size.K, (False, True), scratch)
        tried = [attacked(nets, first, one, scratch) for one in best(found)[:ATTACKED]]
        chosen = max(tried, key=lambda one: one.bpda_eot.value if one.bpda_eot else 0.0).setting
        [reported] = [
            one
            for one in over_chains(nets, second, (chosen.steps,), (chosen.denoise,), scratch)
            if one.setting == chosen
        ]
        reported = attacked(nets, second, reported, scratch)
        table = pd.DataFrame(
            [row("tuning", one) for one in with_attacked(found, tried)]
            + [row("reporting", reported)]
        )
        rows.write(table, out / "tune.csv")
        style.save(over_settings(table, chosen.steps), out / "tune.png")
        scratch.done()
    say_result(reported, nets, out)
    if chosen.steps == max(size.K):
        say("the longest chain that was tried is the best one: add longer ones to compare.K")
    return chosen


def halves(
    given: Given, images: Path, sample: Images, half: int, scratch: Scratch
) -> tuple[Half, Half]:
    """Both halves of the images, attacked by PGD on the bare classifier."""
    pgd, classifier = scratch.folder / "pgd.safetensors", given.classifier
    if not pgd.exists():
        files = attack.Files(images, classifier, classifier, pgd)
        whole, params = (0, 2 * half), given.params
        attack.run(
            params, given.dataset, "pgd", given.hardware, files, pgd, subset=whole, within=scratch
        )
    adversarial = AttackResult.load(pgd).record.adversarial

    def part(name: str, places: slice) -> Half:
        fields = (sample.images, sample.labels, sample.index)
        return Half(name, Images(*(field[places] for field in fields)), adversarial[places])

    return part("tuning", slice(0, half)), part("reporting", slice(half, 2 * half))


def over_chains(
    nets: Nets, half: Half, grid: tuple[int, ...], ends: tuple[bool, ...], scratch: Scratch
) -> list[Measured]:
    """Natural and transferred accuracy for every length, with and without denoising."""
    size = nets.params.compare
    if nets.energy.sigma is None:
        ends = (False,)
    block = max(1, nets.hardware.max_chains // size.replicas)
    sets = {"natural": from_bytes(half.images.images), "transfer": half.adversarial}
    logits: dict[str, Tensor] = {}
    with Track(f"tune, {half.name}", 2 * len(half.images.labels), unit="images") as track:
        for name, pixels in sets.items():
            pieces = []
            for number, part in enumerate(pixels.split(block)):
                purpose = f"{half.name}-{name}-{number:05d}"
                compute = partial(along, nets, part, grid, ends, purpose)
                pieces.append(scratch.piece(purpose, compute)["logits"])
                track.advance(len(part), name)
            logits[name] = torch.cat(pieces, dim=3)
    found = []
    for i, denoise in enumerate(ends):
        for j, steps in enumerate(grid):
            for replicas in sorted({*FEWER, size.replicas}):
                if replicas > size.replicas or (denoise and not steps):
                    continue
                right = {
                    name: value[i, j, :replicas].mean(0).argmax(1) == half.images.labels
                    for name, value in logits.items()
                }
                both = right["natural"] & right["transfer"]
                setting = Setting(steps, denoise, replicas)
                found.append(Measured(setting, count(right["natural"]), count(both)))
    return found


def along(
    nets: Nets, pixels: Tensor, grid: tuple[int, ...], ends: tuple[bool, ...], purpose: str
) -> dict[str, Tensor]:
    """Logits (ends,K,replicas,n,classes) along chains from pixels (n,C,H,W)."""
    device, tau = nets.hardware.device, nets.params.dataset(nets.dataset).tau
    replicas, batch = nets.params.compare.replicas, nets.hardware.max_chains
    chain = nets.chain(max(grid))
    states = states_at(
        nets.energy,
        to_net(pixels).to(device).repeat(replicas, 1, 1, 1),
        grid,
        tau=tau,
        chain=chain,
        generator=make_generator(nets.params.seed, "tune", purpose, device=device),
        max_chains=batch,
    )
    logits = []
    for denoise in ends:
        for steps, state in zip(grid, states, strict=True):
            clean = denoise and steps
            shown = denoised(nets.energy, state, tau, chain=chain) if clean else state
            answers = classify(nets.classifier, to_pixels(shown), batch=batch)
            logits.append(answers.unflatten(0, (replicas, len(pixels))))
    return {"logits": torch.stack(logits).unflatten(0, (len(ends), len(grid)))}


def best(found: list[Measured]) -> list[Measured]:
    """The settings of each chain that cost little natural accuracy, the most robust first.

    Each with as few replicas as are about `AS_GOOD` as all of them.
    """
    most = max(one.setting.replicas for one in found)
    whole = [one for one in found if one.setting.replicas == most and one.setting.steps]
    limit = max(one.natural.value for one in whole) - MAY_COST
    good = [one for one in whole if one.natural.value >= limit]
    good.sort(key=lambda one: (-one.transfer.value, one.setting.steps))

    def cheapest(chosen: Measured) -> Measured:
        same = [one for one in found if replace(one.setting, replicas=most) == chosen.setting]
        enough = [
            one
            for one in same
            if one.natural.value >= chosen.natural.value - AS_GOOD
            and one.transfer.value >= chosen.transfer.value - AS_GOOD
        ]
        return min(enough, key=lambda one: one.setting.replicas)

    return [cheapest(one) for one in good]


def attacked(nets: Nets, half: Half, one: Measured, scratch: Scratch) -> Measured:
    """The same with its accuracy under BPDA+EOT, on the first images of the half."""
    params, size, setting = nets.params, nets.params.compare.bpda_eot, one.setting
    langevin = params.langevin.model_copy(update={"K": setting.steps, "denoise": setting.denoise})
    defended = replace(nets, params=params.model_copy(update={"langevin": langevin}))
    few = Images(*(field[: size.images] for field in vars(half.images).values()))
    config = attack_config(params, size.steps, early=params.evaluate.early_verdicts)
    robust = []
    name = f"{half.name}-bpda-{setting.steps}-{setting.denoise}"
    with Track(f"tune, BPDA+EOT at K={setting.steps}", len(few.labels), unit="images") as track:
        for number, shard in enumerate(few.shards(params.attack.shard)):
            purpose = f"{name}-{number}"
            defense = setting.steps, size.H_adv, size.H_def
            compute = partial(attack.bpda_eot, defended, defense, config, purpose, shard)
            robust.append(scratch.piece(purpose, compute)["robust"].cpu())
            track.advance(len(shard.labels))
    return replace(one, bpda_eot=count(torch.cat(robust)))


def with_attacked(found: list[Measured], tried: list[Measured]) -> list[Measured]:
    """All that was measured; the attacked settings in all numbers of replicas."""
    known = {(one.setting.steps, one.setting.denoise): one.bpda_eot for one in tried}
    return [
        replace(one, bpda_eot=known.get((one.setting.steps, one.setting.denoise))) for one in found
    ]


def row(half: str, one: Measured) -> dict[str, object]:
    """A line of tune.csv."""
    setting = one.setting
    line: dict[str, object] = {"half": half, "K": setting.steps, "denoise": setting.denoise}
    line["replicas"] = setting.replicas
    for name in ("natural", "transfer", "bpda_eot"):
        accuracy = getattr(one, name)
        low, high = accuracy.interval if accuracy else (None, None)
        line |= {name: accuracy.value if accuracy else None, f"{name}_low": low}
        line |= {f"{name}_high": high, f"{name}_n": accuracy.n if accuracy else 0}
    return line


def say_result(reported: Measured, nets: Nets, out: Path) -> None:
    """The recommendation, with accuracies of images that it was not chosen on."""
    setting, attack_n = reported.setting, reported.bpda_eot
    say(
        f"on images that nothing was chosen on: natural {reported.natural}, PGD of the bare "
        f"classifier {reported.transfer} n={reported.natural.n}, BPDA+EOT {attack_n} "
        f"n={attack_n.n if attack_n else 0}"
    )
    price = nets.cost(setting.steps, setting.replicas)
    say(f"a prediction of {setting.replicas} copies costs {price:,.0f} bare ones (multiplications)")
    say(f"use: {setting}, and --replicas {setting.replicas} of secure; {out / 'tune.png'}")
