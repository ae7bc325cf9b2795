"""The stages behind Figures 1, 2, 5, 6, 8 and 9, on the tiny experiment."""

import shutil
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from defense.attack import AttackConfig, run_attack
from defense.langevin import LangevinConfig
from defense.pixels import from_bytes, to_net
from defense.rng import make_generator
from defense.threat import ThreatModel
from stages import StageError, diagnose, fid, train_ebm
from stages.core.artifacts import about_of, load_images, load_state, load_tensors, save_tensors
from stages.core.classifiers import load_classifier
from stages.core.energies import load_energy, new_energy
from stages.core.engine import choose_chain
from stages.core.files import Paths
from stages.core.hardware import Hardware
from stages.core.levels import level_changes_of
from stages.core.params import load_params
from stages.reporting import figures, findings, pictures, rows
from tests.tiny import ROOT, command, tiny_params

PATHS = Paths("tiny", "digits")
CPU = Hardware(torch.device("cpu"), 200)


@pytest.fixture(autouse=True)
def folder(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the whole tiny experiment has been run; leave it as it is."""
    monkeypatch.chdir(experiment)
    return experiment


def edited(folder: Path, name: str, **sections: dict[str, object]) -> str:
    """A params file with other values in some sections."""
    values = tiny_params()
    for section, changes in sections.items():
        values[section] |= changes
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(values))
    return path.name


# Training snapshots, Figure 2


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [(20, 2, {10, 20}), (700, 3, {233, 466, 700}), (3, 5, {1, 2, 3}), (7, 1, {7})],
)
def test_snapshots_are_spread_over_a_phase_and_end_it(total: int, count: int, expected) -> None:
    assert train_ebm.snapshot_batches(total, count) == expected


def test_the_last_snapshot_is_what_the_phase_ends_with() -> None:
    kept, about = load_tensors(PATHS.snapshots("ebm_convergent"))
    state = load_state(PATHS.state("ebm_convergent"), "", torch.device("cpu"))
    bank = state["bank"]
    assert about["batches"] == [10, 20]
    learned = 0
    for name, value in load_tensors(PATHS.model("ebm_convergent"))[0].items():
        assert torch.equal(kept[f"20/energy/{name}"], value)
        learned += not torch.equal(kept[f"10/energy/{name}"], value)
    assert learned >= 5
    first = bank["low"][:12] + bank["step"][:12] * bank["levels"][:12].float()
    torch.testing.assert_close(kept["20/chains"], first)


def test_long_runs_go_on_from_the_trainings_own_chains_under_the_weights_of_then() -> None:
    params = load_params(Path("params.yaml"))
    seen, _ = load_tensors(PATHS.record("snapshots"))
    kept, _ = load_tensors(PATHS.snapshots("ebm_adam"))
    assert seen["adam/batches"].tolist() == [10, 20]
    assert torch.equal(seen["adam/short"][0], kept["10/chains"])
    energy = new_energy(params, "digits", "adam")
    weights = {n.removeprefix("10/energy/"): v for n, v in kept.items() if "10/energy/" in n}
    energy.load_state_dict(weights)
    long = choose_chain(energy, 20, "float32", CPU)(
        energy,
        kept["10/chains"],
        LangevinConfig(20, params.data["digits"].tau),
        generator=make_generator(params.seed, "digits", "snapshots", "adam/10"),
    )
    torch.testing.assert_close(seen["adam/long"][0], long)
    with torch.no_grad():
        change = (energy(long) - energy(kept["10/chains"])) / (0.5 * params.data["digits"].tau ** 2)
    torch.testing.assert_close(seen["adam/energy_change"][0], change, rtol=1e-3, atol=0.05)


def test_snapshots_of_another_network_are_one_line(folder: Path) -> None:
    name = edited(folder, "wide", energy={"width": 6})
    result = command(f"snapshots digits --params {name} --out elsewhere.safetensors")
    assert result.exit_code == 2
    assert "not of the energy in params.yaml" in " ".join(result.output.split())
    assert not Path("elsewhere.safetensors").exists()


# Sweeps, Figures 5 and 6


def test_the_sweep_covers_every_setting_with_every_image() -> None:
    tensors, about = load_tensors(PATHS.record("sweep"))
    settings = {f"linf/{eps}/{who}" for eps in (24, 48) for who in ("defense", *TRAININGS)}
    settings |= {f"l2/200/{who}" for who in ("defense", *TRAININGS)}
    settings |= {"H_adv/1/defense", "H_adv/3/defense", "H_def/1/defense", "H_def/4/defense"}
    assert {name.rpartition("/")[0] for name in tensors} == settings
    assert all(len(right) == 6 for right in tensors.values())
    assert about["step_share"] == 0.25


TRAININGS = ("natural", "adversarial")


def test_pgd_in_the_sweep_is_that_of_the_library() -> None:
    params, tensors = load_params(Path("params.yaml")), load_tensors(PATHS.record("sweep"))[0]
    data = load_images(PATHS.images, "test", params.data["digits"], 6)
    network = load_classifier(params, "digits", CPU, PATHS.classifier("adversarial"))
    ball = ThreatModel("l2", 200)
    right = []
    for number, shard in enumerate(data.shards(5)):
        purpose = f"sweep/l2/200/adversarial/{number}"
        record = run_attack(
            network,
            network,
            from_bytes(shard.images),
            shard.labels,
            AttackConfig(ball, 2, 50.0),
            generator=make_generator(params.seed, "digits", purpose),
        )
        right.append(record.robust(shard.labels))
    assert torch.equal(tensors["l2/200/adversarial/robust"], torch.cat(right))


def test_the_rows_of_a_sweep_begin_with_the_natural_images() -> None:
    params, tensors = load_params(Path("params.yaml")), load_tensors(PATHS.record("sweep"))[0]
    over_radius, over_replicas = rows.swept(tensors, params)
    part = over_radius[(over_radius.norm == "linf") & (over_radius.system == "natural")]
    assert part.eps_255.tolist() == [0, 24, 48]
    robust = tensors["linf/48/natural/robust"].float().mean()
    assert part.accuracy.tolist()[2] == pytest.approx(float(robust), abs=1e-4)
    natural = tensors["linf/24/natural/natural"].float().mean()
    assert part.accuracy.tolist()[0] == pytest.approx(float(natural), abs=1e-4)
    assert part.N.tolist() == [2, 2, 2]
    assert over_replicas[["side", "replicas", "H_adv", "H_def"]].values.tolist() == [
        ["H_adv", 1, 1, 3],
        ["H_adv", 3, 3, 3],
        ["H_def", 1, 2, 1],
        ["H_def", 4, 2, 4],
    ]


@pytest.mark.parametrize(
    ("section", "changes", "said"),
    [
        ("sweep", {"linf_255": []}, "sweep.linf_255"),
        ("sweep", {"attacker_replicas": []}, "sweep.attacker_replicas"),
        ("sweep", {"l2_255": [200, 100]}, "l2_255: expected ascending numbers, got [200.0, 100.0]"),
        ("sweep", {"images": 13}, "sweep.images: expected <= attack.pgd.images = 12, got 13"),
        ("lyapunov", {"chains": 13}, "lyapunov.chains: expected <= attack.pgd.images = 12"),
        ("lyapunov", {"steps": 21}, "steps: expected a multiple of every = 5, got 21"),
        ("lyapunov", {"separations": [1.0, 2.0, 3.0, 4.0, 5.0]}, "lyapunov.separations"),
        ("fid", {"K": [4, 0]}, "K: expected ascending numbers, got [4, 0]"),
        ("diagnose", {"images": 13}, "diagnose.images: expected <= attack.pgd.images = 12, got 13"),
    ],
)
def test_what_cannot_be_run_is_said_before_anything_is(
    folder: Path, section: str, changes: dict[str, object], said: str
) -> None:
    with pytest.raises(StageError) as error:
        load_params(Path(edited(folder, "wrong", **{section: changes})))
    assert said in str(error.value)


def test_too_few_images_for_the_distance_are_said_by_the_first_stage_that_knows(folder) -> None:
    name = edited(folder, "many", fid={"images": 501})
    result = command(f"prepare-data digits --params {name} --out elsewhere.npz")
    assert result.exit_code == 2
    assert "fid.images: expected <= 500 test images, got 501" in result.output


def test_defense_and_baseline_are_compared_image_by_image() -> None:
    tensors = {
        "l2/100/defense/robust": torch.tensor([True] * 7 + [False]),
        "l2/100/adversarial/robust": torch.tensor([True] + [False] * 6 + [True]),
    }
    said = findings.against_baseline(tensors, "l2", [100.0])
    assert "of 8: 6:1 at 100/255 (p = 0.12)" in said


def test_the_report_refuses_a_sweep_of_other_parameters(folder: Path) -> None:
    name = edited(folder, "steps", sweep={"steps": 3})
    result = command(f"report --params {name} --out elsewhere")
    assert result.exit_code == 2
    assert "sweep.safetensors: expected steps = 3 as in params.yaml, got 2" in " ".join(
        result.output.split()
    )


# Chaos, Figure 8


def test_exponents_of_every_strength_separation_and_energy() -> None:
    tensors, about = load_tensors(PATHS.record("lyapunov"))
    for name in ("convergent", "smooth_convergent"):
        assert tensors[f"{name}/states"].shape == (2, 4, 1, 8, 8)
        for separation in (0.01, 0.1):
            assert tensors[f"{name}/{separation}"].shape == (2, 4)
            assert tensors[f"{name}/{separation}"].isfinite().all()
    assert about["eta"] == [0.5, 1.0]


# Distance from the data, Figure 9


def test_chains_of_no_steps_are_at_no_distance() -> None:
    tensors, about = load_tensors(PATHS.record("fid"))
    assert about["measured_with"] == "classifier"
    for model in ("convergent", "nonconvergent"):
        assert tensors[model][0] == pytest.approx(0, abs=1e-4)
        assert (tensors[model][1:] > 0).all()
    assert tensors["test"] > 0


def test_the_fid_needs_its_network_and_says_so_at_once(folder: Path, monkeypatch) -> None:
    params = load_params(Path(edited(folder, "fid", fid={"features": "inception"})))
    kind, features = fid.extractor(params, "digits", CPU, PATHS.classifier())
    assert kind.startswith("inception ")
    assert features(torch.zeros(1, 1, 8, 8)).shape == (1, 2048)
    assert command("check-params --params fid.yaml --out checked").exit_code == 0
    monkeypatch.setattr(fid, "inception_weights", lambda: None)
    for words in ("check-params --out checked", "fid digits --out fid.safetensors"):
        result = command(f"{words} --params fid.yaml")
        assert result.exit_code == 2
        assert "error: fid.features: inception needs the package fid-helper" in result.output


def test_chains_that_diverge_are_one_line(folder: Path) -> None:
    values = tiny_params()
    values["data"]["digits"]["tau"] = 1e38
    Path("hot.yaml").write_text(yaml.safe_dump(values))
    tensors, about = load_tensors(PATHS.model("ebm_convergent"))
    save_tensors(Path("hot.safetensors"), tensors, about | {"tau": 1e38})
    result = command(
        "fid digits --params hot.yaml --convergent hot.safetensors "
        "--nonconvergent hot.safetensors --out elsewhere.safetensors"
    )
    assert result.exit_code == 2
    assert "error: fid: " in result.output
    assert "Traceback" not in result.output
    (left,) = (folder / ".scratch").glob("fid-*/")
    shutil.rmtree(left)


def test_levels_are_those_of_the_images_themselves(folder: Path) -> None:
    """Training images too, though `inspect` also looks at them with noise."""
    params = load_params(Path("params.yaml"))
    tensors, _ = load_tensors(PATHS.record("inspect_convergent"))
    energy = load_energy(params, "digits", CPU, PATHS.model("ebm_convergent"))
    for name, split in (("training images", "train"), ("test images", "test")):
        data = load_images(PATHS.images, split, params.dataset("digits"), params.inspect.chains)
        x = to_net(from_bytes(data.images))
        expected = level_changes_of(params, "digits", CPU, energy, x, name)
        torch.testing.assert_close(tensors[f"{name}/changes"], expected)


# The idea, Figure 1


def test_the_picture_of_the_idea_holds_one_image_all_the_way() -> None:
    params, (tensors, _) = load_params(Path("params.yaml")), load_tensors(PATHS.record("diagnose"))
    found = {n.removeprefix("idea/"): t for n, t in tensors.items() if n.startswith("idea/")}
    assert found["grid"].tolist() == diagnose.idea_grid(params.langevin.K) == [0, 1, 4]
    assert found["states"].shape == (3, 2, 1, 8, 8), "H_adv is less than COPIES"
    assert torch.equal(found["states"][0], found["adversarial"].expand(2, -1, -1, -1))
    distance = (found["natural"] - found["adversarial"]).abs().max()
    assert 0 < distance <= 2 * 48 / 255 + 1e-6
    network = load_classifier(params, "digits", CPU, PATHS.classifier())
    with torch.no_grad():
        says = network(0.5 * (found["adversarial"][None] + 1))[0]
    torch.testing.assert_close(says, found["adversarial_logits"], rtol=1e-4, atol=1e-4)
    pictures.idea(found)


# What the figures are drawn from, for DVC


def test_the_plots_of_dvc_have_their_columns(folder: Path) -> None:
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    drawn = 0
    for plot in graph["plots"]:
        if isinstance(plot, str):
            assert (folder / plot.replace("${run}", "tiny")).is_dir()
            continue
        (about,) = plot.values()
        for path, columns in about["y"].items():
            frame = pd.read_csv(folder / path.replace("${run}", "tiny"))
            assert {about["x"], *columns} <= set(frame.columns), path
            drawn += 1
    assert drawn == 5


def test_the_curve_over_attack_steps_ends_where_the_attack_does() -> None:
    frame = pd.read_csv("reports/tiny/plots/N.csv")
    assert frame.N.tolist() == [0, 1, 2, 3]
    table = pd.read_csv("reports/tiny/rows.csv")
    final = table[(table.attack == "bpda_eot") & (table.metric == "adversarial")]
    assert frame.bpda_eot.iloc[-1] == pytest.approx(final.accuracy.iloc[0], abs=1e-4)


def test_figures_say_which_features_they_measure_with() -> None:
    tensors, about = load_tensors(PATHS.record("fid"))
    for kind, name in (("classifier", "features of the classifier"), ("inception ab12", "FID")):
        figure = pictures.distance_from_data(tensors, {**about, "measured_with": kind}, 4)
        assert name in figure.axes[0].get_ylabel()


def test_the_figure_over_the_radius_marks_the_usual_one() -> None:
    frame = pd.read_csv("reports/tiny/accuracy_over_radius.csv")
    figure = figures.over_radius(frame, ("l2", 200.0), 48.0)
    marked = [
        any(list(line.get_xdata()) == [200.0, 200.0] for line in ax.lines) for ax in figure.axes
    ]
    assert marked == [False, True]


def test_records_say_what_they_were_made_of() -> None:
    for name, roles in (
        ("sweep", {"images", "energy", *TRAININGS}),
        ("snapshots", {f"{phase} snapshots" for phase in ("adam", "convergent", "nonconvergent")}),
        ("lyapunov", {"images", "convergent", "smooth_convergent"}),
        ("fid", {"images", "classifier", "convergent", "nonconvergent"}),
    ):
        assert set(about_of(PATHS.record(name))["files"]) == roles, name


@pytest.mark.parametrize(
    ("words", "own"),
    [
        ("sweep digits --energy {energy}", "sweep"),
        ("fid digits --convergent {energy}", "fid"),
        ("lyapunov digits --energy {energy}", "lyapunov"),
        ("diagnose digits --energy {energy}", "diagnose"),
        ("compare digits --convergent {energy}", "compare"),
        ("inspect digits --energy {energy}", "inspect_convergent"),
    ],
)
def test_a_record_of_other_files_is_not_that_of_the_workflow(words: str, own: str) -> None:
    before = PATHS.record(own).read_bytes()
    energy = PATHS.model("ebm_convergent")
    result = command(words.format(energy=energy))
    assert result.exit_code == 0, result.output
    assert PATHS.record(own).read_bytes() == before
    assert PATHS.own(f"{own}.safetensors").exists()
    PATHS.own(f"{own}.safetensors").unlink()
