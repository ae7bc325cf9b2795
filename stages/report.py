"""Stage 8: rows, Tables 1-3, figures and provenance, all pure functions of the records."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from defense.pixels import from_bytes
from defense.threat import ThreatModel
from stages import StageError, figures, page, provenance, rows, tables
from stages.artifacts import AttackResult, load_tensors
from stages.console import say
from stages.files import Paths, WholeFolder, write_text
from stages.findings import active_test, convergence, findings, verification
from stages.params import EVALUATED, INSPECTED, MODELS, TABLE_ATTACKS, TRANSFER, Params


def run(params: Params, out: Path, root: Path = Path()) -> None:
    """Judge the records under ``root``, print the tables, write all into a new folder ``out``.

    A record that is not there is a row, a cell or a figure "not run".
    """
    with WholeFolder(out, "provenance.json") as partial:
        write(params, partial, root)


def write(params: Params, out: Path, root: Path) -> None:
    """Tables, figures, findings and provenance into an empty folder."""
    compared_paths = Paths(params.run, params.compare_dataset, root)
    results = found(
        judged(Paths(params.run, dataset, root).record(attack), params, attack)
        for dataset in params.datasets
        for attack in TABLE_ATTACKS
    )
    evaluations = {
        energy: evaluation(params, compared_paths.evaluation(energy)) for energy in EVALUATED
    }
    evaluations = {energy: records for energy, records in evaluations.items() if records}
    every = results + [one for records in evaluations.values() for one in records]
    if not every:
        raise StageError(f"{compared_paths.record('pgd').parent}: no records of attacks")
    draws, usual = params.evaluate.draws, params.attack.eps_255
    measured = rows.rows(every, draws)
    rows.write(measured, out / "rows.csv")
    metrics = rows.summarise(params, measured)

    compared = record(compared_paths.record("compare"), params.compare.model_dump())
    if compared is not None:
        curve = rows.accuracy_over_steps(finite(compared, "compare"), params)
        rows.write(curve, out / "accuracy_over_steps.csv")
        rows.write(rows.curves(curve), out / "curves.csv")
        metrics |= rows.lost_at_longest(curve)
        figures.save(figures.over_steps(curve, params.langevin.K), out / "figures/figure4_accuracy")
        figures.save(figures.two_models(compared), out / "figures/figure4_samples")
        figures.save(figures.energy_over_steps(compared), out / "figures/figure4_energies")
        if levels := energies_of_images(compared, compared_paths):
            figures.save(figures.energies_of_images(levels), out / "figures/figure7_energies")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    tables.write(params, measured[measured.attack.isin(TABLE_ATTACKS)], out)

    said = [
        f"{energy}: {line}"
        for energy, some in evaluations.items()
        for line in findings(some, usual)
    ]
    defended = [result for result in results if "H_def" in result.about]
    said += [f"Tables 1-3: {verification(defended)}"] if defended else []
    tested = params.evaluate.active_test
    planted = record(
        compared_paths.record("active_test"),
        {**tested.model_dump(), **params.conditions(tested.attack)},
    )
    if planted is not None:
        said.append(f"convergent: {active_test(finite(planted, 'active_test'), tested.attack)}")
    if evaluations:
        figures.save(figures.evaluation(evaluations, draws), out / "figures/evaluation")
        searched = {energy: stepping(some, usual) for energy, some in evaluations.items()}
        figures.save(figures.over_attack_steps(searched), out / "figures/figure6_steps")
    for dataset in params.datasets:
        said += pictures(params, Paths(params.run, dataset, root), out / "figures")
    tables.write_attacks(every, draws, said, out)
    for finding in said:
        say(finding)
    provenance.write(params, root, out)
    write_text(out / "README.md", captions(out))
    page.write(out, CAPTIONS)


def found(records: Iterable[AttackResult | None]) -> list[AttackResult]:
    """Those that are there."""
    return [record for record in records if record is not None]


def stepping(results: list[AttackResult], usual: float) -> list[AttackResult]:
    """The attacks of the usual radius that search step by step."""
    return [r for r in results if r.about.get("rule") and r.about["eps_255"] == usual]


def energies_of_images(compared: dict[str, Tensor], paths: Paths) -> dict[str, dict[str, Tensor]]:
    """Energies of natural, PGD and noise images, by model; of the models that were inspected."""
    levels = {}
    for model in MODELS:
        inspected = paths.record(f"inspect_{model}")
        if inspected.exists():
            levels[model] = {
                "natural images": compared[f"{model}/natural/energies"][0],
                "PGD images": compared[f"{model}/transfer/energies"][0],
                "noise": finite(load_tensors(inspected)[0], inspected.name)["noise/levels"],
            }
    return levels


def pictures(params: Params, paths: Paths, out: Path) -> list[str]:
    """The figures of one dataset; what its energies' long chains say."""
    said, steps = [], {"K": params.langevin.K}
    diagnosed = record(paths.record("diagnose"), steps)
    if diagnosed is not None:
        histogram = figures.logit_histograms(finite(diagnosed, "diagnose"), params.diagnose.H)
        figures.save(histogram, out / f"figure3_logits_{paths.dataset}")
    for phase in INSPECTED:
        inspected = record(paths.record(f"inspect_{phase}"), steps)
        if inspected is not None:
            verdict = f"Energy of {paths.dataset}, {phase}: {convergence(inspected)}"
            history = rows.training(paths, phase)
            page = figures.energy_page(history, inspected, params.langevin.K, verdict)
            figures.save(page, out / f"energy_{paths.dataset}_{phase}")
            said.append(verdict)
    return said


def evaluation(params: Params, folder: Path) -> list[AttackResult]:
    """The records of all attacks on the defense with one energy, in the order of params.yaml."""
    names = (TRANSFER, *params.evaluate.attacks)
    return found(judged(folder / f"{name}.safetensors", params, name) for name in names)


CAPTIONS = {
    "evaluation": "Every attack on the defense, with a piecewise linear and a smooth energy: "
    "Algorithm 1's accuracy with its 95 % interval, and what fresh noise makes of the saved "
    "images. What gradients through the chain take from the accuracy under BPDA (identity) is what "
    "BPDA did not see.",
    "energy_*": "One energy: its training, the energies along long chains from three starts, the "
    "energies of images and chains, samples. Convergent means that long chains come to one level, "
    "that of the persistent chains and of the (noisy) training images, and still look like data.",
    "figure3_logits_*": "Mean logits over H replicas, drawn again and again, for an image that the "
    "defense gets right safely and one that it barely gets right. Where the two classes overlap, a "
    "verdict from so few replicas is partly chance.",
    "figure4_accuracy": "Accuracy over the length of the chain, with 95 % Wilson intervals. Does "
    "accuracy on natural images survive long chains? At K=0 there is no defense, and BPDA+EOT is "
    "not run.",
    "figure6_steps": "What each attack leaves after so many steps. A curve that still falls at its "
    "end says that more steps would break more images.",
    "figure7_energies": "Energies of natural images, of the same images after PGD on the bare "
    "classifier, and of uniform noise. Attacked images lie higher, in the paper (eps = 8/255) "
    "marginally so; where the first two hardly overlap, a threshold on the energy would tell them.",
    "figure4_samples": "The same test images under both energies.",
    "figure4_energies": "Energy along these chains; bands hold 80 % of the images. Chains of a "
    "convergent energy reach one level from natural and from adversarial images, and stay there.",
}


def captions(out: Path) -> str:
    """A page that shows every figure and table with what to see in it."""
    lines = ["# Results", "", (out / "summary.md").read_text()]
    lines += [
        "Numbers with all conditions are in rows.csv; `adversarial_afresh` there judges the "
        "saved adversarial images once more, with fresh noise.",
        "",
    ]
    lines += [(out / f"table{number}.md").read_text() for number in (1, 2, 3)]
    lines += ["## All attacks", "", (out / "attacks.md").read_text()]
    for pattern, caption in CAPTIONS.items():
        for path in sorted((out / "figures").glob(f"{pattern}.png")):
            lines += [f"![{path.stem}](figures/{path.name})", "", f"*{caption}*", ""]
    return "\n".join(lines)


def record(path: Path, expected: dict[str, Any]) -> dict[str, Tensor] | None:
    """The tensors of a record, if it is there; `StageError` if it was made of other parameters."""
    if not path.exists():
        return None
    tensors, about = load_tensors(path)
    check_conditions(path, about, expected)
    return tensors


def check_conditions(path: Path, about: dict[str, Any], expected: dict[str, Any]) -> None:
    """What a record says of itself against the parameters."""
    for name, value in json.loads(json.dumps(expected)).items():
        if about.get(name) != value:
            found = about.get(name)
            raise StageError(f"{path}: expected {name} = {value} as in params.yaml, got {found}")


def finite(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same; `StageError` if a value is not finite."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise StageError(f"record {name}: {key}: values that are not finite")
    return tensors


def judged(path: Path, params: Params, attack: str) -> AttackResult | None:
    """A record whose conditions, ball, box and finiteness were checked on the file itself.

    None if it is not there.
    """
    if not path.exists():
        return None
    result = AttackResult.load(path)
    check_conditions(path, result.about, params.conditions(attack))
    found, expected = len(result.images.labels), params.images(attack)
    if found != expected or result.about.get("subset"):
        raise StageError(f"{path}: expected the first {expected} test images, got {found}")
    x, x_adv = from_bytes(result.images.images), result.record.adversarial
    threat = ThreatModel(params.attack.norm, float(result.about["eps_255"]))
    for name in ("adversarial", "clean_logits", "adversarial_logits"):
        if not torch.isfinite(getattr(result.record, name)).all():
            raise StageError(f"{path}: {name}: values that are not finite")
    if x_adv.min() < 0 or x_adv.max() > 1:
        raise StageError(f"{path}: adversarial pixels outside [0, 1]")
    farthest = float(threat.distance(x_adv, x).max())
    if farthest > threat.eps + 1e-6:
        raise StageError(f"{path}: expected distance <= {threat.eps:.6f}, got {farthest:.6f}")
    return result
