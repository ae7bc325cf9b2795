"""`stochsec bench-attack`: how much work the scheduling of the attack saves, on a trained model.

Four variants of Algorithm 1 with the same chains take turns on every block of images: as printed
(`defense.plain_attack`), as scheduled by `defense.attack`, with verdicts that stop early, and with
the fresh evaluation of the saved images that a record also needs.
"""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from defense.attack import run_attack, search
from defense.pixels import from_bytes
from defense.plain_attack import algorithm_1
from defense.rng import make_generator
from defense.verdict import wrong
from stages.attack import Files
from stages.bench.speed import machine
from stages.core.artifacts import Images, load_images
from stages.core.build import Nets, attack_config, threat
from stages.core.console import Track, say
from stages.core.engine import counted
from stages.core.files import write_text
from stages.core.hardware import Hardware
from stages.core.params import Params
from stages.reporting.rows import count

HOW_TO_READ = """\
Algorithm 1 on the trained defense, the same chains and networks in every row. *as printed*: every
image goes to the last step, every suspect is verified by itself with all {H_def} replicas.
*scheduled*: only images not yet broken are attacked, suspects of a step are verified together.
*with early verdicts*: the defense also draws no more replicas than a clear verdict takes (error
{error:g}). *and judged afresh*: the saved images once more, which the printed algorithm does not
do. Every block of {block} images went through all ways in turn.
"""


Way = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]
"""(block, pixels (B,C,H,W), labels (B,)) -> correct on clean images, robust; both (B,) bool."""


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    files: Files,
    *,
    images: int,
    steps: int,
    block: int,
    out: Path,
) -> None:
    """Time all ways on ``images`` test images, N = ``steps``."""
    nets = Nets.load(params, dataset, hardware, classifier=files.classifier, energy=files.energy)
    data = load_images(files.images, "test", params.dataset(dataset), images)
    spent = list[int]()
    ways = ways_of(replace(nets, counted=lambda chain: counted(chain, spent.append)), steps)
    rows = measure(ways, data, hardware, block, spent)
    langevin = params.langevin
    result = {
        "machine": machine(hardware.device),
        "dataset": dataset,
        "K": langevin.K,
        "N": steps,
        "H_adv": langevin.H_adv,
        "H_def": langevin.H_def,
        "rows": rows,
    }
    write_text(out / "attack.json", json.dumps(result, indent=1) + "\n")
    text = table(result, params, block)
    write_text(out / "attack.md", text)
    say(text)


def ways_of(nets: Nets, steps: int) -> dict[str, Way]:
    """Algorithm 1 as printed, scheduled, with early verdicts, and all that `attack` does."""
    params, langevin = nets.params, nets.params.langevin
    ball, step_255 = threat(params), params.attack.threat.step_255

    def pair(block: int) -> dict[str, Any]:
        return {
            "surrogate": nets.defense(langevin.K, langevin.H_adv, f"bench/{block}/surrogate"),
            "target": nets.defense(langevin.K, langevin.H_def, f"bench/{block}/target"),
            "generator": make_generator(params.seed, "bench", block, device=nets.hardware.device),
        }

    def printed(block: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        right, broken_at = algorithm_1(
            x=x, y=y, threat=ball, steps=steps, step_255=step_255, **pair(block)
        )
        return right, right & (broken_at < 0)

    def scheduled(early: bool) -> Way:
        config = attack_config(params, steps, early=early)

        def way(block: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
            nets_of_block = pair(block)
            right = ~wrong(nets_of_block["target"], x, y, config.early())
            finds = search(x=x, y=y, right=right, config=config, **nets_of_block)
            return right, right & finds.unbroken()

        return way

    def whole(block: int, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        record = run_attack(
            x=x, y=y, config=attack_config(params, steps, early=True), **pair(block)
        )
        return record.clean_correct(y), record.robust(y)

    return {
        "as printed": printed,
        "scheduled": scheduled(False),
        "with early verdicts": scheduled(True),
        "and judged afresh": whole,
    }


def measure(
    ways: dict[str, Way], data: Images, hardware: Hardware, block: int, spent: list[int]
) -> list[dict[str, Any]]:
    """Wall time, Langevin steps and verdicts of every way, block by block in turn."""
    parts = data.shards(block)
    seconds = dict.fromkeys(ways, 0.0)
    steps = dict.fromkeys(ways, 0)
    verdicts: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in ways}
    with Track("bench-attack", len(ways) * len(parts), unit="runs") as track:
        for number, part in enumerate(parts):
            x = from_bytes(part.images).to(hardware.device)
            y = part.labels.to(hardware.device)
            for name, way in ways.items():
                spent.clear()
                start = now(hardware)
                verdicts[name].append(way(number, x, y))
                seconds[name] += now(hardware) - start
                steps[name] += sum(spent)
                track.advance(watch=f"{name} {seconds[name]:.0f} s")
    rows = []
    for name in ways:
        right, robust = (torch.cat(found) for found in zip(*verdicts[name], strict=True))
        accuracy = count(robust)
        rows.append(
            {
                "way": name,
                "seconds": round(seconds[name], 2),
                "speedup": round(seconds["as printed"] / seconds[name], 2),
                "image_steps": steps[name],
                "fewer_steps": round(steps["as printed"] / steps[name], 2),
                "natural": count(right).value,
                "robust": accuracy.value,
                "interval": [round(end, 3) for end in accuracy.interval],
                "n": accuracy.n,
            }
        )
    return rows


def now(hardware: Hardware) -> float:
    """Seconds, once the device has done what it was asked."""
    if hardware.device.type == "cuda":
        torch.cuda.synchronize(hardware.device)
    return time.perf_counter()


def table(result: dict[str, Any], params: Params, block: int) -> str:
    """The rows as people read them."""
    about = ", ".join(f"{key} {value}" for key, value in result["machine"].items())
    rows = pd.DataFrame(result["rows"])
    how = HOW_TO_READ.format(
        H_def=result["H_def"], error=params.attack.sequential.error, block=block
    )
    setting = (
        f"{result['dataset']}, K={result['K']}, N={result['N']}, H_adv={result['H_adv']}, "
        f"H_def={result['H_def']}. Machine: {about}."
    )
    return f"# Scheduling\n\n{setting}\n\n{how}\n{rows.to_markdown(index=False)}\n"
