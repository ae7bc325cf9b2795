"""Stage 4: convergent against non-convergent learning, over the number of Langevin steps."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.inference import classify
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.diagnostics import energies, states_at
from stages.attack import bpda_eot
from stages.core.artifacts import Images, load_images, save_tensors
from stages.core.build import Nets, attack_config
from stages.core.console import Track, say
from stages.core.energies import pixels_shown
from stages.core.hardware import Hardware
from stages.core.params import MODELS, Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch

Piece = Callable[[], dict[str, Tensor]]

SAMPLES = 12  # images whose states are kept for the picture


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    pgd: Path,
    out: Path,
    **models: Path,
) -> None:
    """Accuracy on natural, transferred and attacked images, energies and samples, at every K."""
    compare = params.compare
    data = load_images(images, "test", params.dataset(dataset), compare.images)
    adversarial = AttackResult.load(pgd).of_pgd(data, pgd, classifier, params.conditions("pgd"))
    about = {"run": params.run, "dataset": dataset, **params.study("compare", dataset)}
    inputs = {"images": images, "classifier": classifier, "pgd": pgd, **models}

    def key(p: Params) -> object:
        data, early = p.data[dataset], p.evaluate.early_verdicts
        nets = p.classifier, p.energy, p.langevin.precision, p.langevin.denoise
        return p.seed, dataset, data, nets, p.attack, p.compare, early

    work: list[tuple[str, Piece]] = []
    for model in MODELS:
        nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=models[model])
        work += pieces_of(nets, model, data, adversarial)
    pieces: dict[str, list[dict[str, Tensor]]] = {}
    with (
        Scratch(f"compare-{dataset}", params, key, inputs, hardware) as scratch,
        Track(f"compare {dataset}", len(work), unit="pieces") as track,
    ):
        for number, (curve, compute) in enumerate(work):
            pieces.setdefault(curve, []).append(scratch.piece(f"{number:05d}", compute))
            track.advance(watch=curve)
        tensors = {"K": torch.tensor(compare.K), "labels": data.labels, **joined(pieces)}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    for model in MODELS:
        right = tensors[f"{model}/natural/logits"].argmax(2) == data.labels
        means = right.float().mean(1).tolist()
        curve = "  ".join(f"{K}: {value:.3f}" for K, value in zip(compare.K, means, strict=True))
        say(f"compare {dataset} {model}, natural accuracy over K: {curve}")


def pieces_of(nets: Nets, model: str, data: Images, adversarial: Tensor) -> list[tuple[str, Piece]]:
    """The work on one energy, shard by shard: (name of the curve, what computes a piece of it)."""
    compare, block = nets.params.compare, nets.params.attack.shard
    work: list[tuple[str, Piece]] = []
    for number, (shard, adv) in enumerate(
        zip(data.shards(block), adversarial.split(block), strict=True)
    ):
        for images, pixels in (("natural", from_bytes(shard.images)), ("transfer", adv)):
            curve = f"{model}/{images}"
            work.append((curve, partial(along, nets, f"{curve}/{number}", pixels)))
    params, size = nets.params, compare.bpda_eot
    config = attack_config(params, size.steps, early=params.evaluate.early_verdicts)
    count = size.images
    attacked = Images(data.images[:count], data.labels[:count], data.index[:count])
    for steps in compare.K if count else ():
        for number, shard in enumerate(attacked.shards(block) if steps else ()):
            curve = f"{model}/bpda_eot/{steps}"
            purpose, defense = f"compare/{curve}/{number}", (steps, size.H_adv, size.H_def)
            work.append((curve, partial(bpda_eot, nets, defense, config, purpose, shard)))
    return work


def joined(pieces: dict[str, list[dict[str, Tensor]]]) -> dict[str, Tensor]:
    """The shards of every curve as one; of the samples, the first few."""
    tensors = {}
    for curve, parts in pieces.items():
        for name in parts[0]:
            if name == "samples" and curve.endswith("transfer"):
                continue  # in no picture
            axis = 0 if name in ("natural", "robust") else 1  # the axis of the images
            whole = torch.cat([part[name] for part in parts], dim=axis)
            tensors[f"{curve}/{name}"] = whole[:, :SAMPLES] if name == "samples" else whole
    return tensors


def along(nets: Nets, purpose: str, pixels: Tensor) -> dict[str, Tensor]:
    """Mean logits (K,B,classes), mean energies (K,B) and some states (K,S,C,H,W) along chains."""
    params, device = nets.params, nets.hardware.device
    compare, tau = params.compare, params.dataset(nets.dataset).tau
    count, batch = len(pixels), nets.hardware.max_chains
    states = states_at(
        nets.energy,
        to_net(pixels).to(device).repeat(compare.replicas, 1, 1, 1),
        compare.K,
        tau=tau,
        chain=nets.chain(max(compare.K)),
        generator=make_generator(params.seed, nets.dataset, "compare", purpose, device=device),
        max_chains=batch,
    )
    logits, levels = [], []
    for steps, state in zip(compare.K, states, strict=True):
        pixels = pixels_shown(params, nets.dataset, nets.hardware, nets.energy, state, steps)
        replicas = classify(nets.classifier, pixels, batch=batch)
        logits.append(replicas.view(compare.replicas, count, -1).mean(0))
        level = energies(nets.energy, state, tau=tau, batch=batch)
        levels.append(level.view(compare.replicas, count).mean(0))
    return {
        "logits": torch.stack(logits),
        "energies": torch.stack(levels),
        "samples": states[:, :SAMPLES],
    }
