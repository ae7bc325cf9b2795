"""Stage 4: convergent against non-convergent learning, over the number of Langevin steps."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.attack import AttackConfig, run_attack
from defense.diagnostics import energies, states_at
from defense.inference import classify
from defense.pixels import from_bytes, to_net, to_pixels
from defense.rng import make_generator
from stages.artifacts import AttackResult, Images, load_images, load_tensors, save_tensors
from stages.console import Track, say
from stages.engine import choose_chain
from stages.hardware import Hardware
from stages.models import Nets, threat
from stages.params import Params
from stages.resume import Scratch

MODELS = ("convergent", "nonconvergent")
SAMPLES = 12  # images whose states are kept for the picture


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    models: dict[str, Path],
    pgd: Path,
    out: Path,
) -> None:
    """Accuracy on natural, transferred and attacked images, energies and samples, at every K."""
    compare = params.compare
    data = load_images(images, "test", compare.images)
    adversarial = AttackResult.load(pgd).record.adversarial[: compare.images]
    about = {"run": params.run, "dataset": dataset, **compare.model_dump()}
    key = (params.seed, params.attack.model_dump(), hardware.max_chains, about)
    inputs = [images, classifier, pgd, *models.values()]
    tensors: dict[str, Tensor] = {"K": torch.tensor(compare.K), "labels": data.labels}
    attacked = [steps for steps in compare.K if steps and compare.bpda_eot.images]
    with (
        Scratch(f"compare-{dataset}", key, inputs) as scratch,
        Track(f"compare {dataset}", 2 * (2 + len(attacked)), unit="curves") as track,
    ):
        for model in MODELS:
            nets = Nets.load(params, dataset, hardware, classifier=classifier, energy=models[model])
            curves: dict[str, Callable[[], dict[str, Tensor]]] = {
                "natural": partial(along, nets, f"{model}/natural", from_bytes(data.images)),
                "transfer": partial(along, nets, f"{model}/transfer", adversarial),
            }
            for steps in attacked:
                curves[f"bpda_eot/{steps}"] = partial(bpda_eot, nets, model, steps, data)
            for curve, compute in curves.items():
                path = scratch.folder / f"{model}-{curve.replace('/', '-')}.safetensors"
                if not path.exists():
                    save_tensors(path, compute(), {})
                pieces, _ = load_tensors(path)
                tensors |= {f"{model}/{curve}/{name}": value for name, value in pieces.items()}
                track.advance(watch=model)
                scratch.check()
        save_tensors(out, tensors, about)
        scratch.done()
    for model in MODELS:
        right = tensors[f"{model}/natural/logits"].argmax(2) == data.labels
        curve = "  ".join(
            f"{K}: {value:.3f}" for K, value in zip(compare.K, right.float().mean(1), strict=True)
        )
        say(f"compare {dataset} {model}, natural accuracy over K: {curve}")


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
        chain=choose_chain(),
        generator=make_generator(params.seed, nets.dataset, "compare", purpose, device=device),
        max_chains=batch,
    )
    logits, levels = [], []
    for state in states:
        replicas = classify(nets.classifier, to_pixels(state), batch=batch)
        logits.append(replicas.view(compare.replicas, count, -1).mean(0))
        level = energies(nets.energy, state, tau=tau, batch=batch)
        levels.append(level.view(compare.replicas, count).mean(0))
    return {
        "logits": torch.stack(logits),
        "energies": torch.stack(levels),
        "samples": states[:, :SAMPLES],
    }


def bpda_eot(nets: Nets, model: str, steps: int, data: Images) -> dict[str, Tensor]:
    """Who is right when clean, and who survives BPDA+EOT, on the first images; both (B,) bool."""
    params, device = nets.params, nets.hardware.device
    size = params.compare.bpda_eot
    labels = data.labels[: size.images].to(device)
    purpose = f"compare/{model}/{steps}"
    record = run_attack(
        nets.defense(steps, size.H_adv, f"{purpose}/surrogate"),
        nets.defense(steps, size.H_def, f"{purpose}/target"),
        from_bytes(data.images[: size.images]).to(device),
        labels,
        AttackConfig(threat(params), size.steps, params.attack.step_255),
        generator=make_generator(params.seed, nets.dataset, purpose, device=device),
    )
    return {"natural": record.clean_correct(labels), "robust": record.robust(labels)}
