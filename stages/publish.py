"""Stage 9: trained energies with a card that says what they are."""

import json
from pathlib import Path

from defense.energy import ConvEnergy
from stages import figures, presets, rows
from stages.artifacts import AttackResult, load_tensors
from stages.console import say
from stages.files import Paths, fingerprint, readable, write_text
from stages.findings import convergence
from stages.params import EVALUATED, SMOOTH, Params
from stages.provenance import IMPORTED
from stages.report import finite, found, judged

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
    cards = [
        card(params, Paths(params.run, dataset), phase, out)
        for dataset in params.datasets
        for phase in EVALUATED
        if Paths(params.run, dataset).model(f"ebm_{phase}").exists()
    ]
    lines = [
        f"# Energies of run {params.run}",
        "",
        "`ConvEnergy` networks (Nijkamp et al. 2019) trained by Algorithm 2 of Hill et al. (2021). "
        "Each purifies images of its own dataset and needs the tau it was trained with, which the "
        "file says. `classifier` is yours: pixels in [0, 1] to logits.",
        "",
        made_by(params),
        "",
    ]
    write_text(out / "README.md", "\n".join([*lines, *cards]))
    say(f"publish: {out} ({readable(out)})")


def made_by(params: Params) -> str:
    """The commands and the commit."""
    imported = Path(f"artifacts/{params.run}/records/{IMPORTED}")
    preset = f"of `stochsec preset {params.run}` " if params.run in presets.names() else ""
    recipe = (
        f"Recipe: the workflow with the parameters {preset}in reports/{params.run}/params.yaml. "
    )
    if imported.exists():
        about = json.loads(imported.read_text())
        return f"{recipe}Commit {about['commit']}, on {about['device']}, torch {about['torch']}."
    return f"{recipe}Commit: that of this folder, `git log -1 -- pretrained/{params.run}`."


def card(params: Params, paths: Paths, phase: str, out: Path) -> str:
    """One energy into ``out``; its section of the card."""
    name, section = f"{paths.dataset}_{phase}", params.data[paths.dataset]
    weights = paths.model(f"ebm_{phase}")
    tensors, about = load_tensors(weights)
    copy = out / f"{name}.safetensors"
    copy.parent.mkdir(parents=True, exist_ok=True)
    copy.write_bytes(weights.read_bytes())
    network, ebm = ConvEnergy(**about["architecture"]), params.ebm
    count = sum(value.numel() for value in tensors.values())
    shape = "x".join(map(str, network.shape))
    facts = {
        "network": f"{count:,} parameters, images {shape}, {about['architecture']['activation']}",
        "sha256": f"{fingerprint(copy)}... ({readable(copy)})",
        "data": f"training images of {paths.dataset} ({section.source}"
        f"{f', {section.train_images:,}' if section.train_images else ', all'}), with noise "
        f"{section.data_noise:g}",
        "recipe": f"batches of {ebm.batch}, {ebm.steps} Langevin steps each, tau {section.tau:g}; "
        f"{ebm.adam_batches:,} with Adam at {section.adam_lr:g}, then {ebm.sgd_batches:,} with SGD "
        f"at {section.sgd_lr:g}; {ebm.precision}",
    }
    inspected = finite(paths.record(f"inspect_{phase}"))
    picture = ""
    if inspected is not None:
        facts["long chains"] = verdict = convergence(inspected)
        history = rows.training(paths, phase)
        page = figures.energy_page(history, inspected, params.langevin.K, f"{name}: {verdict}")
        figures.save(page, out / name, kinds=("png",))
        picture = f"![Training, long chains and samples of {name}]({name}.png)\n"
    for label, accuracy in defended(params, paths, phase).items():
        facts[label] = accuracy
    langevin = params.langevin
    code = HOW_TO_LOAD.format(path=copy.as_posix(), K=langevin.K, H_def=langevin.H_def)
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
