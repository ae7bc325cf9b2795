"""Every attack of an evaluation on the defense with one energy."""

from pathlib import Path

from defense.gradient.chain import has_corners
from stages import attack
from stages.core.console import say
from stages.core.energies import load_energy
from stages.core.files import WholeFolder, energy_name
from stages.core.hardware import Hardware
from stages.core.params import TRANSFER, Params
from stages.core.records import AttackResult
from stages.core.resume import Scratch


def run(
    params: Params,
    dataset: str,
    hardware: Hardware,
    files: attack.Files,
    out: Path,
    *,
    afresh: bool = False,
) -> list[AttackResult]:
    """Run the transfer attack and the attacks of params.yaml; one record each in folder ``out``.

    Skipped are attacks meant for another energy, and "smoothed" ones if the energy has no corners.
    """
    whole = WholeFolder(out, f"{TRANSFER}.safetensors")
    corners = has_corners(load_energy(params, dataset, hardware, files.energy))
    names = [TRANSFER]
    for name, named in params.evaluate.attacks.items():
        why = named.left_out(energy_name(files.energy), corners=corners)
        if why:
            say(f"{name} {dataset}: left out, {why}")
        else:
            names.append(name)

    def key(p: Params) -> object:
        conditions = [(name, p.conditions(name)) for name in names]
        return conditions, p.evaluate.images, p.seed, p.data[dataset], p.attack

    inputs = dict(vars(files))
    title = f"evaluate-{dataset}-{files.energy.stem}"
    results: dict[str, AttackResult] = {}
    with Scratch(title, params, key, inputs, hardware, afresh=afresh) as scratch:
        for name in names:
            path = scratch.folder / f"{name}.safetensors"
            if not path.exists():
                scratch.check()
                attack.run(params, dataset, name, hardware, files, path, within=scratch)
            results[name] = AttackResult.load(path)
        with whole as partial:
            for name, result in results.items():
                result.save(partial / f"{name}.safetensors")
        scratch.done()
    say(f"evaluate {dataset}: {out}")
    return list(results.values())
