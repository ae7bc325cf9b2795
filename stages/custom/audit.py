"""`stochsec audit`: how robust is somebody's classifier, and how robust is it once defended?"""

import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from defense.attack import NEVER
from defense.gradient.chain import has_corners
from defense.losses import margin
from defense.pixels import from_bytes
from defense.verdict import is_right
from stages import attack
from stages.core.artifacts import save_images
from stages.core.build import Nets
from stages.core.console import say
from stages.core.params import Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch
from stages.custom.given import Given
from stages.reporting import audit_page, portraits, rows, style
from stages.reporting.audit_page import Audit, Cost

BARE, TRANSFERRED, BPDA = "pgd", "transfer_K", "bpda_eot"
COLLAPSED = 0.25  # natural accuracy that a fitting energy does not cost
SHOWN = 8  # images that an attack broke
REPLICAS = 15  # of the prediction that is timed


def run(given: Given, out: Path, *, quick: bool, afresh: bool) -> list[AttackResult]:
    """Attack the bare classifier and the defended one; write ``out``/index.html after each attack.

    ``quick`` runs PGD, its transfer and BPDA+EOT only; otherwise every attack of the parameters
    that fits the energy. Records go to ``out``/records. A killed run resumes.
    """
    params, hardware = given.params, given.hardware
    sample = given.pictures.sample(params.attack.pgd.images)
    save_images(out / "images.npz", {"test": sample})
    nets = given.nets() if given.energy else None
    names, left_out = chosen(params, nets, quick=quick)
    inputs = {"images": out / "images.npz", **given.inputs}

    def key(p: Params) -> object:
        return p.seed, p.data, [(name, p.images(name), p.conditions(name)) for name in names]

    results: list[AttackResult] = []
    with Scratch("audit", params, key, inputs, hardware, afresh=afresh) as scratch:
        energy = given.energy.name if given.energy else None
        page = Audit(given.classifier.name, energy, params, quick=quick)
        page.not_run = {**dict.fromkeys(names, "not yet"), **left_out}
        unlike = given.say_unlike(nets) if nets else None
        page.warnings = [unlike] if unlike else []
        files = attack.Files(
            inputs["images"],
            given.classifier,
            given.energy or given.classifier,
            scratch.folder / f"{BARE}.safetensors",
        )
        for name in names:
            path = scratch.folder / f"{name}.safetensors"
            if not path.exists():
                scratch.check()
                attack.run(params, given.dataset, name, hardware, files, path, within=scratch)
            results.append(AttackResult.load(path))
            del page.not_run[name]
            page.warnings += collapsed(results) if name == TRANSFERRED else []
            page.results = results
            audit_page.write(page, out)
        page.cost = cost(nets) if nets else None
        draw_failures(results, given, out)
        audit_page.write(page, out)
        for name, result in zip(names, results, strict=True):
            result.save(out / f"records/{name}.safetensors")
        rows.write(rows.rows(results, params.evaluate.draws), out / "rows.csv")
        scratch.done()
    for line in page.summary():
        say(line)
    say(f"audit: {out / 'index.html'}")
    return results


def chosen(params: Params, nets: Nets | None, *, quick: bool) -> tuple[list[str], dict[str, str]]:
    """The attacks to run, and why others are not; ``nets`` is None without an energy."""
    named = params.evaluate.attacks
    if nets is None:
        return [BARE], dict.fromkeys([TRANSFERRED, BPDA, *named], "no energy given")
    names, left_out = [BARE, TRANSFERRED, BPDA], dict[str, str]()
    corners = has_corners(nets.energy)
    for name, attack_named in named.items():
        # Attacks for one of the workflow's energies are for every energy of its kind.
        kind = "convergent" if corners else "smooth_convergent"
        why = "--quick" if quick else attack_named.left_out(kind, corners=corners)
        if why:
            left_out[name] = why
        else:
            names.append(name)
    return names, left_out


def collapsed(results: list[AttackResult]) -> list[str]:
    """A warning if the defense costs far more natural accuracy than a fitting energy does."""
    natural = []
    for result in results[:2]:
        right = result.record.clean_correct(result.images.labels)
        natural.append(float(right.float().mean()))
    bare, defended = natural
    if defended >= bare - COLLAPSED:
        return []
    return [
        f"natural accuracy falls from {bare:.2f} to {defended:.2f}: the energy does not fit these "
        "images, or its chain is too long"
    ]


def cost(nets: Nets) -> Cost:
    """Seconds of one prediction of one image, bare and defended, and of an image in a batch."""
    hardware, section = nets.hardware, nets.params.dataset(nets.dataset)
    x = torch.rand(1, *section.shape.image, device=hardware.device)
    defense = nets.defense(nets.params.langevin.K, REPLICAS, "cost")
    with torch.no_grad():
        bare = seconds(lambda: nets.classifier(x))
        defended = seconds(lambda: defense(x))
        many = x.repeat(max(1, hardware.max_chains // REPLICAS), 1, 1, 1)
        batch = seconds(lambda: defense(many)) / len(many)
    return Cost(bare, defended, batch, REPLICAS, hardware.device.type)


def seconds(call: Callable[[], Tensor]) -> float:
    """Wall-clock seconds of a call that has been made once before."""
    call()
    began = time.perf_counter()
    call().sum().item()  # waits for a GPU
    return time.perf_counter() - began


def draw_failures(results: list[AttackResult], given: Given, out: Path) -> None:
    """The images that the strongest attack broke most surely, on the defense if there is one."""
    attacked = [result for result in results if "H_def" in result.about] or results
    worst = min(attacked, key=lambda result: float(robust(result).float().mean()))
    record, labels = worst.record, worst.images.labels
    fooled = (record.broken_at != NEVER) & record.clean_correct(labels)
    fooled &= ~is_right(record.adversarial_logits, labels)  # with fresh noise, too
    broken = fooled.nonzero().flatten()
    if not len(broken):
        return
    sure = margin(record.adversarial_logits[broken], labels[broken]).argsort(descending=True)
    shown = broken[sure[:SHOWN]]
    said = [
        f"{given.pictures.called(label)} -> {given.pictures.called(now)}"
        for label, now in zip(
            labels[shown].tolist(),
            record.adversarial_logits[shown].argmax(1).tolist(),
            strict=True,
        )
    ]
    before, after = from_bytes(worst.images.images[shown]), record.adversarial[shown]
    style.save(portraits.failures(before, after, said), out / "failures.png")


def robust(result: AttackResult) -> Tensor:
    """(n,) bool: right on the natural image, and never broken."""
    return result.record.robust(result.images.labels)
