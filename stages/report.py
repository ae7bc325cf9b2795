"""Stage 8: rows, Tables 1-3, figures and provenance, all pure functions of the records."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stages import StageError
from stages.core.artifacts import about_of, load_tensors
from stages.core.console import say
from stages.core.files import KEPT_RECORDS, NETWORK_TIMES, Paths, WholeFolder, visible, write_text
from stages.core.params import (
    EVALUATED,
    INSPECTED,
    MODELS,
    NORMS,
    PGD_ATTACKS,
    TABLE_ATTACKS,
    TRANSFER,
    Params,
)
from stages.core.records import AttackResult, check_together
from stages.reporting import figures, page, pictures, provenance, rows, style, tables
from stages.reporting.captions import CAPTIONS
from stages.reporting.findings import (
    active_test,
    against_all,
    against_baseline,
    convergence,
    findings,
    in_the_tables,
    verification,
)
from stages.reporting.kept import together


def run(params: Params, out: Path, root: Path = Path(), *, kept: Path | None = None) -> None:
    """Check the records under ``root``, print the tables, write the report to a new folder ``out``.

    Rows and cells of missing records say "not run"; their figures are left out. With ``kept`` the
    report also keeps the records, without their images. Records that ``root`` lacks are then taken
    from the folder ``kept``, which need not exist.
    """
    with WholeFolder(out, "provenance.json") as partial:
        if kept:
            with together(params, root, kept, partial / KEPT_RECORDS) as records:
                write(params, partial, records)
        else:
            write(params, partial, root)


def first(params: Params, dataset: str, out: Path, root: Path = Path()) -> None:
    """Tables 1-3 as far as one dataset goes, and Figure 4, before the studies are there."""
    paths = Paths(params.run, dataset, root)
    records = [paths.record(attack) for attack in TABLE_ATTACKS]
    check_together({path: about_of(path) for path in records if path.exists()})
    results = found(
        judged(path, params, attack) for path, attack in zip(records, TABLE_ATTACKS, strict=True)
    )
    if not results:
        raise StageError(f"{records[0].parent}: no records of attacks")
    with WholeFolder(out, "summary.md") as partial:
        measured = rows.rows(results, params.evaluate.draws)
        tables.write(params.model_copy(update={"datasets": (dataset,)}), measured, None, partial)
        over_chain_lengths(params, paths, partial)
    say(f"tables: {out}")


def write(params: Params, out: Path, root: Path) -> None:
    """Tables, figures, findings and provenance into an empty folder."""
    compared_paths = Paths(params.run, params.compare_dataset, root)
    for dataset in params.datasets:
        folder = Paths(params.run, dataset, root).record("pgd").parent
        check_together({path: about_of(path) for path in visible(folder, "*.safetensors")})
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
    draws, usual = params.evaluate.draws, params.attack.threat.eps_255
    measured = rows.rows(every, draws)
    rows.write(measured, out / "rows.csv")
    metrics = rows.summarise(params, measured)
    strongest = against_all(evaluations.get(MODELS[0], []), usual)
    if strongest:
        metrics["defended_every_attack"] = round(strongest.value, 4)

    metrics |= over_chain_lengths(params, compared_paths, out)
    levels = energies_of_images(params, compared_paths)
    if levels:
        style.draw(pictures.energies_of_images(levels), out, "figure7_energies")
    write_text(out / "metrics.json", json.dumps(metrics, indent=2) + "\n")
    tables.write(params, measured[measured.attack.isin(TABLE_ATTACKS)], strongest, out)

    said = [
        f"{energy}: {line}"
        for energy, some in evaluations.items()
        for line in findings(some, usual)
    ]
    defended = [result for result in results if "H_def" in result.about]
    said += [f"Tables 1-3: {verification(defended)}"] if defended else []
    said += in_the_tables(results, params.compare_dataset)
    tested = params.evaluate.active_test
    planted = study(params, compared_paths, "active_test")
    if planted is not None:
        said.append(f"convergent: {active_test(finite(planted, 'active_test'), tested.attack)}")
    if evaluations:
        style.draw(figures.evaluation(evaluations, draws), out, "evaluation")
    over_steps(results, evaluations, params, out)
    said += swept(params, compared_paths, out)
    dynamics(params, compared_paths, out)
    sampling_times(out)
    for dataset in params.datasets:
        said += of_dataset(params, Paths(params.run, dataset, root), out)
        if params.dataset(dataset).judged_on == "held_out":
            said.append(
                f"FLAG: {dataset}: every number is of training images that were held out to choose "
                "settings on, none of test images"
            )
    tables.write_attacks(every, draws, said, out)
    for finding in said:
        say(finding)
    provenance.write(params, root, out)
    write_text(out / "README.md", captions(out))
    page.write(out, CAPTIONS)


def found(records: Iterable[AttackResult | None]) -> list[AttackResult]:
    """Those that are there."""
    return [record for record in records if record is not None]


def over_chain_lengths(params: Params, paths: Paths, out: Path) -> dict[str, object]:
    """Figure 4, from the comparison of both kinds of learning; its part of the metrics."""
    compared = study(params, paths, "compare")
    if compared is None:
        return {}
    curve = rows.accuracy_over_steps(finite(compared, "compare"), params)
    rows.write(curve, out / "accuracy_over_steps.csv")
    attacked = curve.images == "bpda_eot"
    rows.write(rows.curves(curve[~attacked]), out / "plots/K.csv")
    rows.write(rows.curves(curve[attacked]), out / "plots/K_bpda_eot.csv")
    style.draw(figures.over_steps(curve, params.langevin.K), out, "figure4_accuracy")
    style.draw(pictures.two_models(compared), out, "figure4_samples")
    style.draw(pictures.energy_over_steps(compared), out, "figure4_energies")
    return rows.lost_at_longest(curve)


def sampling_times(out: Path) -> None:
    """Figure 10, of every kind of device that `stochsec bench-networks` was run on."""
    for path in sorted(NETWORK_TIMES.glob("*.json")):
        timed = json.loads(path.read_text())
        machine = ", ".join(f"{key} {value}" for key, value in timed["machine"].items())
        figure = figures.sampling_times(timed["rows"], machine)
        style.draw(figure, out, f"figure10_{path.stem}")


def over_steps(
    results: list[AttackResult],
    evaluations: dict[str, list[AttackResult]],
    params: Params,
    out: Path,
) -> None:
    """Figure 6, left: what the attacks of Tables 1-3 and of the evaluations leave after N steps."""
    compared, searching = params.compare_dataset, ("bpda_eot", *PGD_ATTACKS)
    tabled = [r for r in results if r.about["dataset"] == compared]
    panels = {"Tables 1-3": [r for r in tabled if r.about["attack"] in searching]}
    for energy, some in evaluations.items():
        found = stepping(some, params.attack.threat.eps_255)
        title = f"{energy.replace('_', ' ')} energy (n={params.evaluate.images})"
        panels |= {title: found}
    panels = {title: found for title, found in panels.items() if found}
    if panels:
        style.draw(figures.over_attack_steps(panels), out, "figure6_steps")
        rows.write(rows.over_attack_steps(next(iter(panels.values()))), out / "plots/N.csv")


def swept(params: Params, paths: Paths, out: Path) -> list[str]:
    """Figures 5 and 6, right: accuracy over the radius, and over the replicas of both sides.

    Returns the findings that compare defense and adversarial training image by image.
    """
    tensors = study(params, paths, "sweep")
    if tensors is None:
        return []
    over_radius, over_replicas = rows.swept(tensors, params)
    rows.write(over_radius, out / "accuracy_over_radius.csv")
    rows.write(over_replicas, out / "accuracy_over_replicas.csv")
    for norm, part in over_radius.groupby("norm"):
        rows.write(rows.wide(part, "eps_255", "system"), out / f"plots/eps_{norm}.csv")
    attack, langevin = params.attack, params.langevin
    trained = params.data[paths.dataset].adversarial.eps_255
    figure = figures.over_radius(over_radius, (attack.threat.norm, attack.threat.eps_255), trained)
    style.draw(figure, out, "figure5_radius")
    usual = {"H_adv": langevin.H_adv, "H_def": langevin.H_def}
    style.draw(figures.over_replicas(over_replicas, usual), out, "figure6_replicas")
    return [against_baseline(tensors, norm, params.sweep.radii(norm)) for norm in NORMS]


def dynamics(params: Params, paths: Paths, out: Path) -> None:
    """Figures 2, 8 and 9: samples over training, chaos over the noise, distance from the data."""
    seen = study(params, paths, "snapshots")
    if seen is not None:
        figure = pictures.over_training(finite(seen, "snapshots"), params.snapshots.long_steps)
        style.draw(figure, out, "figure2_training")
    exponents = study(params, paths, "lyapunov")
    if exponents is not None:
        steps = params.lyapunov.burn_in + params.lyapunov.steps
        figure = pictures.order_and_chaos(exponents, params.lyapunov.separations, steps)
        style.draw(figure, out, "figure8_lyapunov")
    distances = study(params, paths, "fid")
    if distances is not None:
        about = about_of(paths.record("fid"))
        figure = pictures.distance_from_data(finite(distances, "fid"), about, params.langevin.K)
        style.draw(figure, out, "figure9_distance")


def stepping(results: list[AttackResult], usual: float) -> list[AttackResult]:
    """The attacks of the usual radius that search step by step."""
    return [r for r in results if r.about.get("rule") and r.about["eps_255"] == usual]


def energies_of_images(params: Params, paths: Paths) -> dict[str, dict[str, Tensor]]:
    """Energies of natural, PGD and noise images, by model; of the models that were inspected."""
    levels: dict[str, dict[str, Tensor]] = {}
    compared = study(params, paths, "compare")
    if compared is None:
        return levels
    for model in MODELS:
        inspected = paths.record(f"inspect_{model}")
        if inspected.exists():
            levels[model] = {
                "natural images": compared[f"{model}/natural/energies"][0],
                "PGD images": compared[f"{model}/transfer/energies"][0],
                "noise": finite(load_tensors(inspected)[0], inspected.name)["noise/levels"],
            }
    return levels


def of_dataset(params: Params, paths: Paths, out: Path) -> list[str]:
    """The figures of one dataset; what its energies' long chains say."""
    said = []
    diagnosed = study(params, paths, "diagnose")
    if diagnosed is not None:
        histogram = figures.logit_histograms(finite(diagnosed, "diagnose"), params.diagnose.H)
        style.draw(histogram, out, f"figure3_logits_{paths.dataset}")
        way = {n.removeprefix("idea/"): t for n, t in diagnosed.items() if n.startswith("idea/")}
        if way:
            style.draw(pictures.idea(way), out, f"figure1_idea_{paths.dataset}")
    for phase in INSPECTED:
        inspected = study(params, paths, "inspect", phase)
        if inspected is not None:
            verdict = f"Energy of {paths.dataset}, {phase}: {convergence(inspected)}"
            history = rows.training(paths, phase)
            energy_page = pictures.energy_page(history, inspected, params.langevin.K, verdict)
            style.draw(energy_page, out, f"energy_{paths.dataset}_{phase}")
            said.append(verdict)
    return said


def evaluation(params: Params, folder: Path) -> list[AttackResult]:
    """The records of all attacks on the defense with one energy, in the order of params.yaml."""
    names = (TRANSFER, *params.evaluate.attacks)
    return found(judged(folder / f"{name}.safetensors", params, name) for name in names)


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


def study(
    params: Params, paths: Paths, name: str, phase: str | None = None
) -> dict[str, Tensor] | None:
    """The tensors of a study's record, if it is there; `phase` of the energy that was inspected.

    `StageError` if it was made of other parameters.
    """
    path = paths.record(f"{name}_{phase}" if phase else name)
    if not path.exists():
        return None
    tensors, about = load_tensors(path)
    check_conditions(path, about, params.study(name, paths.dataset))
    return tensors


def check_conditions(path: Path, about: dict[str, Any], expected: dict[str, Any]) -> None:
    """`StageError` if the conditions that a record states differ from the parameters."""
    for name, value in json.loads(json.dumps(expected)).items():
        if about.get(name) != value:
            found = about.get(name)
            raise StageError(f"{path}: expected {name} = {value} as in params.yaml, got {found}")


def finite(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same; `StageError` if a value is not finite."""
    for key, value in tensors.items():
        if not torch.isfinite(value).all():
            raise StageError(f"record {name}: {key}: values that are NaN or infinite")
    return tensors


def judged(path: Path, params: Params, attack: str) -> AttackResult | None:
    """Load a record, and check its conditions, norm ball, pixel range and finiteness.

    None if there is no such file; `StageError` if a check fails.
    """
    if not path.exists():
        return None
    result = AttackResult.load(path)
    judged_on = params.data[result.about["dataset"]].judged_on
    check_conditions(path, result.about, {**params.conditions(attack), "judged_on": judged_on})
    found, expected = len(result.images.labels), params.images(attack)
    if found != expected or result.about.get("subset"):
        raise StageError(f"{path}: expected the first {expected} test images, got {found}")
    for name in ("clean_logits", "adversarial_logits"):
        if not torch.isfinite(getattr(result.record, name)).all():
            raise StageError(f"{path}: {name}: values that are NaN or infinite")
    try:
        farthest = result.farthest()
    except StageError as error:
        raise StageError(f"{path}: {error}") from None
    eps = float(result.about["eps_255"]) / 255
    if farthest > eps + 1e-6:
        raise StageError(f"{path}: expected distance <= {eps:.6f}, got {farthest:.6f}")
    return result
