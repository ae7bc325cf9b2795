"""Stage 9: trained energies with a card that says what they are."""

import json
from pathlib import Path

import yaml

from defense.energy import ConvEnergy
from stages import StageError, pictures, presets, rows, style
from stages.artifacts import AttackResult, about_of, load_tensors
from stages.console import say
from stages.files import Paths, WholeFolder, fingerprint, readable, write_text
from stages.findings import convergence
from stages.params import EVALUATED, SMOOTH, Params, validate_params
from stages.provenance import import_of, is_imported
from stages.report import found, judged, record

INDEX = "energies.json"  # what each file says of itself

HOW_TO_LOAD = """\
```python
from defense import CompiledLangevin, EOTDefense, LangevinConfig, load_energy

energy, tau = load_energy("{path}")
defended = EOTDefense(
    classifier, energy, LangevinConfig({K}, tau), replicas={H_def}, chain=CompiledLangevin()
)
```
"""


def run(params: Params, out: Path) -> None:
    """Weights, picture and card of every convergent energy of the run that was trained."""
    trained = [
        (paths, phase)
        for paths in (Paths(params.run, dataset) for dataset in params.datasets)
        for phase in EVALUATED
        if paths.model(f"ebm_{phase}").exists()
    ]
    if not trained:
        raise StageError(f"artifacts/{params.run}/models: no energies to publish")
    with WholeFolder(out, INDEX) as partial:
        index, sections = {}, []
        for paths, phase in trained:
            name = f"{paths.dataset}_{phase}"
            sections.append(card(params, paths, phase, partial, out))
            index[name] = about_of(paths.model(f"ebm_{phase}"))
        lines = [
            f"# Energies of run {params.run}",
            "",
            "`ConvEnergy` networks (Nijkamp et al. 2019) trained by Algorithm 2 of Hill et al. "
            "(2021). Each purifies images of its own dataset, with the tau it was trained with, "
            "which the file says. `classifier` is yours: pixels in [0, 1] to logits.",
            "",
            f"Recipe: the workflow with {parameters(params)}.",
            "",
        ]
        write_text(partial / "README.md", "\n".join([*lines, *sections]))
        write_text(partial / INDEX, json.dumps(index, indent=2) + "\n")
    say(f"publish: {out} ({readable(out)})")


def parameters(params: Params) -> str:
    """Where the numbers of the experiment are."""
    where = f"the parameters in reports/{params.run}/params.yaml"
    if params.run in presets.names():
        preset = yaml.safe_load(presets.text(params.run))
        if validate_params(preset, Path(params.run)).model_dump() == params.model_dump():
            return f"{where}, those of `stochsec preset {params.run}`"
    return where


def made_by(weights: Path, params: Params) -> str:
    """The commit whose code trained them."""
    imported = import_of(params.run)
    name = str(weights.relative_to(f"artifacts/{params.run}"))
    if is_imported(weights, name, imported):
        return f"{imported['commit'] or 'unknown'}, packed on {imported['device']}"
    return f"that of this folder, `git log -1 -- pretrained/{params.run}`"


def card(params: Params, paths: Paths, phase: str, out: Path, shown: Path) -> str:
    """One energy into ``out``; its section of the card, which calls the folder ``shown``."""
    name, section = f"{paths.dataset}_{phase}", params.data[paths.dataset]
    weights = paths.model(f"ebm_{phase}")
    tensors, about = load_tensors(weights)
    copy = out / f"{name}.safetensors"
    copy.write_bytes(weights.read_bytes())
    network, ebm = ConvEnergy(**about["architecture"]), params.ebm
    count = sum(value.numel() for value in tensors.values())
    shape = "x".join(map(str, network.shape))
    facts = {
        "network": f"{count:,} parameters, images {shape}, {about['architecture']['activation']}",
        "sha256": f"{fingerprint(copy)}... ({readable(copy)})",
        "commit": made_by(weights, params),
        "data": f"training images of {paths.dataset} ({section.source}"
        f"{f', {section.train_images:,}' if section.train_images else ', all'}), with noise "
        f"{section.data_noise:g}",
        "recipe": f"batches of {ebm.batch}, {ebm.steps} Langevin steps each, tau {section.tau:g}; "
        f"{ebm.adam_batches:,} with Adam at {section.adam_lr:g}, then {ebm.sgd_batches:,} with SGD "
        f"at {section.sgd_lr:g}; {ebm.precision}",
    }
    inspected = record(paths.record(f"inspect_{phase}"), {"K": params.langevin.K})
    picture = ""
    if inspected is not None:
        facts["long chains"] = verdict = convergence(inspected)
        history = rows.training(paths, phase)
        page = pictures.energy_page(history, inspected, params.langevin.K, f"{name}: {verdict}")
        style.save(page, out / name, kinds=("png",))
        picture = f"![Training, long chains and samples of {name}]({name}.png)\n"
    for label, accuracy in defended(params, paths, phase).items():
        facts[label] = accuracy
    langevin = params.langevin
    code = HOW_TO_LOAD.format(
        path=(shown / copy.name).as_posix(), K=langevin.K, H_def=langevin.H_def
    )
    lines = [f"- {label}: {text}" for label, text in facts.items()]
    return "\n".join([f"## {name}", "", *lines, "", code, picture])


def defended(params: Params, paths: Paths, phase: str) -> dict[str, str]:
    """The accuracies that were measured with an energy."""
    if phase.startswith(SMOOTH):
        folder = paths.evaluation(phase)
        usual = [name for name, named in params.evaluate.attacks.items() if named.scale == 1]
        places = {name: folder / f"{name}.safetensors" for name in usual}
    else:
        places = {name: paths.record(name) for name in ("transfer_K", "bpda_eot")}
    results = found(judged(path, params, name) for name, path in places.items())
    said: dict[str, str] = {}
    for result in results:
        attack = result.about["attack"]
        right = rows.accuracies(result, params.evaluate.draws)
        said.setdefault("defended, natural images", with_conditions(right["natural"], result))
        said[f"defended, {attack}"] = with_conditions(right["adversarial"], result)
    return said


def with_conditions(accuracy: rows.Accuracy, result: AttackResult) -> str:
    """An accuracy with its n and the radius it holds at."""
    about = result.about
    return f"{accuracy} n={accuracy.n}, K={about['K']}, {about['norm']} {about['eps_255']:g}/255"
