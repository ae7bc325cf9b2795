"""Stage 9: trained networks with a card that says what they are."""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import yaml

from defense.energy import ConvEnergy, count_parameters
from defense.nets.pretrained import load_classifier, load_energy
from defense.pixels import from_bytes
from stages import StageError
from stages.core import presets
from stages.core.artifacts import about_of, load_images, load_tensors
from stages.core.console import say
from stages.core.files import (
    PUBLISHED_INDEX,
    Paths,
    Whole,
    classifier_name,
    fingerprint,
    readable,
    refuse_foreign,
    write_text,
)
from stages.core.levels import LEVEL_IMAGES, level_of
from stages.core.params import INSPECTED, PGD_ATTACKS, SMOOTH, TRAININGS, Params, validate_params
from stages.core.records import AttackResult, check_networks
from stages.report import judged, study
from stages.reporting import pictures, rows, style
from stages.reporting.findings import convergence
from stages.reporting.provenance import import_of, is_imported

INDEX = PUBLISHED_INDEX  # what each file says of itself, and of the images and chains it is for

HOW_TO_LOAD = """\
```python
from defense import EOTDefense, FastLangevin, LangevinConfig, load_energy

energy, tau = load_energy("{path}")
defended = EOTDefense(
    classifier,
    energy,
    {config},
    replicas={H_def},
    chain={chain},
)
```
"""


def run(params: Params, out: Path) -> None:
    """Publish the weights of every trained network of the run, with a model card and pictures.

    Files of an earlier `publish` are replaced. A network that is not in artifacts/ keeps its
    published files and its section of the card. `StageError` if there is no network.
    """
    refuse_foreign(out, INDEX)
    with tempfile.TemporaryDirectory() as temporary:
        fresh = Path(temporary)
        index, sections = published_before(out)
        for dataset in params.datasets:
            paths = Paths(params.run, dataset)
            for phase in INSPECTED:
                if paths.model(f"ebm_{phase}").exists():
                    name = f"{dataset}_{phase}"
                    sections[name] = energy_card(params, paths, phase, fresh, out)
                    weights, published = paths.model(f"ebm_{phase}"), out / f"{name}.safetensors"
                    same = published.exists() and fingerprint(published) == fingerprint(weights)
                    before = index.get(name, {}) if same else {}
                    measured = measured_with(params, paths, weights, before)
                    index[name] = {**about_of(weights), **measured}
            for training in TRAININGS:
                if paths.classifier(training).exists():
                    name = f"{dataset}_{classifier_name(training)}"
                    sections[name] = classifier_card(params, paths, training, fresh, out)
                    index[name] = about_of(paths.classifier(training))
        if not any(fresh.iterdir()):
            raise StageError(f"artifacts/{params.run}/models: no networks to publish")
        write_text(fresh / "README.md", head(params) + "\n".join(sections.values()))
        write_text(fresh / INDEX, json.dumps(index, indent=2) + "\n")
        out.mkdir(parents=True, exist_ok=True)
        for path in fresh.iterdir():
            with Whole(out / path.name) as partial:
                shutil.copyfile(path, partial)
    say(f"publish: {out} ({readable(out)})")


def measured_with(
    params: Params, paths: Paths, weights: Path, before: dict[str, Any]
) -> dict[str, Any]:
    """The chain that an energy's numbers are of, and the level of its training images.

    The level is the mean and standard deviation of U. Where the images are not here, it is the
    one that was published ``before`` with the same weights, if any.
    """
    chain = {"K": params.langevin.K, "denoise": params.langevin.denoise}
    if not paths.images.exists():
        return {**chain, "level": before["level"]} if "level" in before else chain
    energy, tau = load_energy(weights)
    training = load_images(paths.images, "train", params.dataset(paths.dataset)).images
    return {**chain, "level": level_of(energy, from_bytes(training[:LEVEL_IMAGES]), tau)}


def published_before(out: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The index of the last `publish` into a folder, and the sections of its card, by network."""
    if not (out / INDEX).exists():
        return {}, {}
    index: dict[str, Any] = json.loads((out / INDEX).read_text())
    parts = (out / "README.md").read_text().split("\n## ")[1:]
    sections = {part.partition("\n")[0]: f"## {part.rstrip()}\n" for part in parts}
    return index, {name: sections[name] for name in index if name in sections}


def head(params: Params) -> str:
    """What the card begins with."""
    return (
        f"# Networks of run {params.run}\n\n"
        "`ConvEnergy` networks (Nijkamp et al. 2019), trained as Algorithm 2 of Hill et al. (2021) "
        "does. Each purifies images of its own dataset, with the tau that it was trained with and "
        "its file says. `classifier` is yours, pixels in [0, 1] to logits, or one of the Wide "
        f"ResNets below.\n\nRecipe: the workflow with the parameters {parameters(params)}.\n\n"
    )


def parameters(params: Params) -> str:
    """Where the numbers of the training are."""

    def training(p: Params) -> object:
        others = {"judged_on", "source", "path"}
        data = {name: section.model_dump(exclude=others) for name, section in p.data.items()}
        return p.seed, p.datasets, data, p.classifier, p.energy, p.ebm

    if params.run in presets.names():
        preset = validate_params(yaml.safe_load(presets.text(params.run)), Path(params.run))
        if training(preset) == training(params):
            return f"of `stochsec preset {params.run}`"
    return f"in reports/{params.run}/params.yaml"


def made_by(weights: Path, params: Params) -> str:
    """The commit whose code trained them."""
    imported = import_of(params.run)
    name = str(weights.relative_to(f"artifacts/{params.run}"))
    if is_imported(fingerprint(weights), name, imported):
        return f"{imported['commit'] or 'unknown'}, packed on {imported['device']}"
    return f"that of this folder, `git log -1 -- pretrained/{params.run}`"


def classifier_card(params: Params, paths: Paths, training: str, out: Path, shown: Path) -> str:
    """One classifier into ``out``; its section of the card, which calls the folder ``shown``."""
    name, section = f"{paths.dataset}_{classifier_name(training)}", params.data[paths.dataset]
    weights = paths.classifier(training)
    copy = out / f"{name}.safetensors"
    shutil.copyfile(weights, copy)
    count = count_parameters(load_classifier(weights))
    size, shared = params.classifier, section.training
    schedule = section.classifier if training == "natural" else section.adversarial
    facts = {
        "network": f"Wide ResNet {size.depth}-{size.width}, {count:,} parameters",
        "sha256": f"{fingerprint(copy)}... ({readable(copy)})",
        "commit": made_by(weights, params),
        "data": training_images(params, paths.dataset),
        "recipe": f"{schedule.epochs} epochs in batches of {shared.batch}, {schedule.schedule} "
        f"learning rate up to {schedule.learning_rate:g}; {shared.precision}",
    }
    if training == "adversarial":
        adversary = section.adversarial
        facts["recipe"] += (
            f"; every batch moved by {adversary.steps} steps of {adversary.step_255:g}/255 from a "
            f"random point of the l_inf ball of {adversary.eps_255:g}/255"
        )
    attack = {training: name for name, training in PGD_ATTACKS.items()}[training]
    attacked = judged(paths.record(attack), params, attack)
    if attacked is not None:
        check_networks(paths.record(attack), attacked.about, weights.parent)
        facts["natural images"], facts["PGD"] = stated(attacked, params.evaluate.draws)
    code = f'```python\nclassifier = load_classifier("{(shown / copy.name).as_posix()}")\n```\n'
    lines = [f"- {label}: {text}" for label, text in facts.items()]
    return "\n".join([f"## {name}", "", *lines, "", code])


def training_images(params: Params, dataset: str) -> str:
    """What the networks of a dataset were trained on."""
    section = params.data[dataset]
    number = f"{section.train_images:,}" if section.train_images else "all"
    held_out = f" but {section.held_out:,} held out" if section.held_out else ""
    return f"training images of {dataset} ({section.source}, {number}{held_out})"


def energy_card(params: Params, paths: Paths, phase: str, out: Path, shown: Path) -> str:
    """One energy into ``out``; its section of the card, which calls the folder ``shown``."""
    name, section = f"{paths.dataset}_{phase}", params.data[paths.dataset]
    weights = paths.model(f"ebm_{phase}")
    tensors, about = load_tensors(weights)
    copy = out / f"{name}.safetensors"
    copy.write_bytes(weights.read_bytes())
    network = ConvEnergy(**about["architecture"])
    count = sum(value.numel() for value in tensors.values())
    shape = "x".join(map(str, network.shape))
    facts = {
        "network": f"{count:,} parameters, images {shape}, {about['architecture']['activation']}",
        "sha256": f"{fingerprint(copy)}... ({readable(copy)})",
        "commit": made_by(weights, params),
        "data": f"{training_images(params, paths.dataset)}, with noise {section.data_noise:g}",
        "recipe": recipe(params, paths.dataset, phase),
    }
    inspected = study(params, paths, "inspect", phase)
    picture = ""
    if inspected is not None:
        path = paths.record(f"inspect_{phase}")
        check_networks(path, about_of(path), weights.parent)
        facts["long chains"] = verdict = convergence(inspected)
        history = rows.training(paths, phase)
        page = pictures.energy_page(history, inspected, params.langevin.K, f"{name}: {verdict}")
        style.save(page, out / f"{name}.png")
        picture = f"![Training, long chains and samples of {name}]({name}.png)\n"
    for label, accuracy in defended(params, paths, phase).items():
        facts[label] = accuracy
    langevin = params.langevin
    denoise = ", denoise=True" if langevin.denoise else ""
    low = "" if langevin.precision == "float32" else f'precision="{langevin.precision}"'
    code = HOW_TO_LOAD.format(
        path=(shown / copy.name).as_posix(),
        config=f"LangevinConfig({langevin.K}, tau{denoise})",
        H_def=langevin.H_def,
        chain=f"FastLangevin({low})",
    )
    lines = [f"- {label}: {text}" for label, text in facts.items()]
    return "\n".join([f"## {name}", "", *lines, "", code, picture])


def recipe(params: Params, dataset: str, phase: str) -> str:
    """How an energy was trained, in words."""
    ebm, update, section = params.ebm, params.ebm.update, params.data[dataset]
    chains = "chains from uniform noise, as many as training images"
    if update.bank:
        lives = f" that live {update.life} visits" if update.life else ""
        pairs = ", coupled with the data" if update.coupled else ""
        chains = f"{update.bank:,} chains from noisy images{lives}{pairs}"
    falling = ebm.phase_2 == "cosine"
    second = {
        "convergent": "Adam at a rate that falls to zero"
        if falling
        else f"SGD at {section.sgd_lr:g}",
        "nonconvergent": "the same",
    }[phase.removeprefix(SMOOTH)]
    more = "; mirrored images" if update.mirror else ""
    if update.average and phase != "nonconvergent":
        more += f"; averaged weights ({update.average:g})"
    return (
        f"batches of {update.batch}, {update.steps} Langevin steps each, tau {section.tau:g}; "
        f"{chains}; {ebm.phase_1_batches:,} with Adam at {section.adam_lr:g}, then "
        f"{ebm.phase_2_batches:,} with {second}{more}; {update.precision}"
    )


def defended(params: Params, paths: Paths, phase: str) -> dict[str, str]:
    """The accuracies that were measured with an energy."""
    if phase.startswith(SMOOTH):
        folder = paths.evaluation(phase)
        usual = [name for name, named in params.evaluate.attacks.items() if named.scale == 1]
        places = {name: folder / f"{name}.safetensors" for name in usual}
    elif phase == "convergent":
        places = {name: paths.record(name) for name in ("transfer_K", "bpda_eot")}
    else:
        places = {}
    said: dict[str, str] = {}
    for name, path in places.items():
        result = judged(path, params, name)
        if result is None:
            continue
        check_networks(path, result.about, paths.model("ebm").parent)
        attack = result.about["attack"]
        natural, attacked = stated(result, params.evaluate.draws)
        said.setdefault("defended, natural images", natural)
        said[f"defended, {attack}"] = attacked
    return said


def stated(result: AttackResult, draws: int) -> tuple[str, str]:
    """On natural and on attacked images, with n, chain and radius."""
    about, right = result.about, rows.accuracies(result, draws)
    chain = [f"K={about['K']}"] if "K" in about else []
    radius = [f"{about['norm']} {about['eps_255']:g}/255"]
    images = ["held-out images"] if about["judged_on"] == "held_out" else []

    def said(name: str, conditions: list[str]) -> str:
        return ", ".join([f"{right[name]} n={right[name].n}", *conditions, *images])

    return said("natural", chain), said("adversarial", chain + radius)
