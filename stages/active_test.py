"""Would an attack find an adversarial image that is known to be there?"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from defense.attack import NEVER, run_attack
from defense.eot import EOTDefense
from defense.pixels import from_bytes
from defense.rng import make_generator
from defense.studies.active_test import PlantConfig, plant
from stages import StageError
from stages.core.artifacts import load_images, save_tensors
from stages.core.build import Nets, named_attack, sequential, threat
from stages.core.console import Track, say
from stages.core.files import energy_name
from stages.core.hardware import Hardware
from stages.core.params import NamedAttack, Params
from stages.core.resume import Scratch


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
    """Plant a point in the ball of each image and attack it (Zimmermann et al. 2022)."""
    section = params.evaluate.active_test
    named = params.evaluate.attacks[section.attack]
    nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=energy)
    data = load_images(images, "test", params.dataset(dataset), section.images)
    inputs = {"images": images, "classifier": classifier, "energy": energy}
    about: dict[str, object] = {"run": params.run, "dataset": dataset}
    about["energy"] = energy_name(energy)
    about |= params.study("active_test", dataset)

    def key(p: Params) -> object:
        section, data = p.evaluate.active_test, p.data[dataset]
        return p.seed, section, p.conditions(section.attack), data

    rows: list[dict[str, Tensor]] = []
    with (
        Scratch(f"active-test-{dataset}", params, key, inputs, hardware) as scratch,
        Track(f"active test {dataset}", len(data.labels), unit="images") as track,
    ):
        for place, image in enumerate(from_bytes(data.images).split(1)):
            work = partial(
                hide_and_seek, nets, named, place, image.to(hardware.device), scratch.check_clock
            )
            rows.append(scratch.piece(f"{place:05d}", work))
            track.advance(watch=seen_so_far(rows))
        tensors = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    say(f"active test {dataset}, {section.attack}: {seen_so_far(rows)}")


def seen_so_far(rows: list[dict[str, Tensor]]) -> str:
    """Progress text: how many of the planted images the attack has found."""
    planted = sum(bool(row["planted"]) for row in rows)
    return f"found {sum(bool(row['found']) for row in rows)} of {planted} planted"


def hide_and_seek(
    nets: Nets, named: NamedAttack, place: int, x: Tensor, on_step: Callable[[], None]
) -> dict[str, Tensor]:
    """Active test of one image x (1,C,H,W) in [0, 1]: plant an adversarial point, then attack.

    The result has three scalars: ``planted`` (bool), ``found`` (bool) and ``random_hits``, the
    share of random points of the ball that are adversarial. ``on_step`` is called at every step
    of the attack. `StageError` for a classifier that the test cannot handle.
    """
    params, langevin = nets.params, nets.params.langevin
    section = params.evaluate.active_test

    def defend(network: nn.Module, purpose: str) -> EOTDefense:
        theirs = replace(nets, classifier=network)
        seeking = purpose == "seek"
        return theirs.defense(
            langevin.K,
            (named.H_adv or langevin.H_adv) if seeking else langevin.H_def,
            f"active/{place}/{purpose}",
            named.mode() if seeking else "identity",
        )

    generator = make_generator(params.seed, nets.dataset, "active", place, device=x.device)
    config = PlantConfig(
        threat(params, named.scale),
        inner_points=section.points,
        replicas=section.points,
        sequential=sequential(params),
    )
    try:
        planted = plant(nets.classifier, defend, x, config, generator=generator)
    except ValueError as error:
        raise StageError(f"active test: {error}") from None
    found, hits = False, 0.0
    if planted is not None:
        record = run_attack(
            defend(planted.readout, "seek"),
            defend(planted.readout, "judge"),
            x,
            torch.zeros(1, dtype=torch.int64, device=x.device),
            named_attack(params, named, early=params.evaluate.early_verdicts),
            generator=generator,
            on_step=lambda robust: on_step(),
        )
        found, hits = bool(record.broken_at != NEVER), planted.random_hits
    return {
        "planted": torch.tensor(planted is not None),
        "found": torch.tensor(found),
        "random_hits": torch.tensor(hits),
    }
