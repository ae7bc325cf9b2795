"""Stage 7: rows, Tables 1-3 and figures, all pure functions of the records."""

import json
from pathlib import Path

import torch

from defense.pixels import from_bytes
from defense.threat import ThreatModel
from stages import StageError, figures, rows, tables
from stages.artifacts import AttackResult, load_tensors
from stages.console import say
from stages.files import Paths, write_text
from stages.findings import active_test, findings, verification
from stages.params import EVALUATED, TABLE_ATTACKS, TRANSFER, Params


def run(params: Params, out: Path) -> None:
    """Judge the records, write tables and figures, print the tables."""
    results = [
        judged(Paths(params.run, dataset).record(attack), params, attack)
        for dataset in params.datasets
        for attack in TABLE_ATTACKS
    ]
    evaluations = {energy: evaluation(params, energy) for energy in EVALUATED}
    compared, _ = load_tensors(Paths(params.run, params.compare_dataset).record("compare"))
    diagnosed = {
        dataset: load_tensors(Paths(params.run, dataset).record("diagnose"))[0]
        for dataset in params.datasets
    }
    every = results + [one for found in evaluations.values() for one in found]
    measured = rows.rows(every, params.evaluate.draws)
    curve = rows.accuracy_over_steps(compared, params)
    for name, frame in (
        ("rows", measured),
        ("accuracy_over_steps", curve),
        ("curves", rows.curves(curve)),
    ):
        write_text(out / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    metrics = rows.summarise(params, measured, curve)
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    tables.write(params, rows.rows(results, params.evaluate.draws), out)
    said = [
        f"{energy}: {finding}"
        for energy, found in evaluations.items()
        for finding in findings(found)
    ]
    tables_of_defense = [result for result in results if "H_def" in result.about]
    said.append(f"Tables 1-3: {verification(tables_of_defense)}")
    tested, about = load_tensors(Paths(params.run, params.compare_dataset).record("active_test"))
    said.append(f"convergent: {active_test(tested, about)}")
    tables.write_attacks(every, params.evaluate.draws, said, out)
    for finding in said:
        say(finding)
    chart = figures.evaluation(evaluations, params.evaluate.draws)
    figures.save(chart, out / "figures/evaluation")

    for dataset, tensors in diagnosed.items():
        histogram = figures.logit_histograms(tensors, params.diagnose.H)
        figures.save(histogram, out / f"figures/figure3_logits_{dataset}")
        grid = figures.sample_grid(tensors, params.langevin.K)
        figures.save(grid, out / f"figures/figure2_samples_{dataset}")
    figures.save(figures.over_steps(curve, params.langevin.K), out / "figures/figure4_accuracy")
    figures.save(figures.two_models(compared), out / "figures/figure4_samples")
    figures.save(figures.energy_over_steps(compared), out / "figures/figure4_energies")
    write_text(out / "README.md", captions(out))
    say(f"report: {out}")


def evaluation(params: Params, energy: str) -> list[AttackResult]:
    """The records of all attacks on the defense with one energy, in the order of params.yaml.

    `StageError` if one is not there, unless it is the smoothed gradient of a smooth energy.
    """
    folder = Paths(params.run, params.compare_dataset).evaluation(energy)
    found = []
    for attack in (TRANSFER, *params.evaluate.attacks):
        path = folder / f"{attack}.safetensors"
        named = params.evaluate.attacks.get(attack)
        smoothed = named is not None and named.gradient == "smoothed"
        if path.exists() or not smoothed:
            found.append(judged(path, params, attack))
    return found


CAPTIONS = {
    "evaluation": "Every attack on the defense, with a piecewise linear and a smooth energy: "
    "Algorithm 1's accuracy with its 95 % interval, and what fresh noise makes of the saved "
    "images. What gradients through the chain take from the accuracy under BPDA (identity) is what "
    "BPDA did not see.",
    "figure2_samples_*": "Chains from test images under the convergent energy, and the persistent "
    "chains that training ended with. Long chains should look like short ones.",
    "figure3_logits_*": "Mean logits over H replicas, drawn again and again, for an image that the "
    "defense gets right safely and one that it barely gets right. Where the two classes overlap, a "
    "verdict from so few replicas is partly chance.",
    "figure4_accuracy": "Accuracy over the length of the chain, with 95 % Wilson intervals. Does "
    "accuracy on natural images survive long chains? At K=0 there is no defense, and BPDA+EOT is "
    "not run.",
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


def judged(path: Path, params: Params, attack: str) -> AttackResult:
    """A record whose conditions, ball, box and finiteness were checked on the file itself."""
    result = AttackResult.load(path)
    for name, value in params.conditions(attack).items():
        if result.about.get(name) != value:
            found = result.about.get(name)
            raise StageError(f"{path}: expected {name} = {value} as in params.yaml, got {found}")
    found, expected = len(result.images.labels), params.images(attack)
    if found != expected or result.about.get("subset"):
        raise StageError(f"{path}: expected the first {expected} test images, got {found}")
    x, x_adv = from_bytes(result.images.images), result.record.adversarial
    threat = ThreatModel(params.attack.norm, float(result.about["eps_255"]))
    if not torch.isfinite(x_adv).all():
        raise StageError(f"{path}: adversarial images that are not finite")
    if x_adv.min() < 0 or x_adv.max() > 1:
        raise StageError(f"{path}: adversarial pixels outside [0, 1]")
    farthest = float(threat.distance(x_adv, x).max())
    if farthest > threat.eps + 1e-6:
        raise StageError(f"{path}: expected distance <= {threat.eps:.6f}, got {farthest:.6f}")
    return result
