"""Every stage end to end on real digits, at the smallest size, through its command."""

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pandas as pd
import pytest
import torch
import yaml

from stages.core.artifacts import load_tensors
from stages.core.classifiers import load_classifier
from stages.core.files import Paths, fingerprint
from stages.core.hardware import Hardware
from stages.core.params import load_params
from stages.core.records import AttackResult
from tests.tiny import ROOT, command, tiny_params

PATHS = Paths("tiny", "digits")


@pytest.fixture(autouse=True)
def folder(experiment: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which the whole tiny experiment has been run, to work in."""
    monkeypatch.chdir(experiment)
    return experiment


def test_figures_are_drawn_as_vectors_for_those_who_ask(tmp_path: Path) -> None:
    words = f"report --vector --out {tmp_path}/again"
    assert command(words).exit_code == 0
    drawn = {path.stem: path.read_bytes() for path in (tmp_path / "again/vector").glob("*.svg")}
    assert drawn.keys() == {path.stem for path in (tmp_path / "again/figures").glob("*.png")}
    assert command(words).exit_code == 0
    for name, before in drawn.items():
        assert (tmp_path / f"again/vector/{name}.svg").read_bytes() == before


def test_the_version_is_one(folder: Path) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert command("--version").output == f"stochsec {version}\n"
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()


def test_the_whole_experiment_leaves_tables_and_figures(folder: Path) -> None:
    names = {path.name for path in (folder / "reports/tiny").iterdir()}
    assert {f"table{n}.{kind}" for n in (1, 2, 3) for kind in ("csv", "md", "tex")} <= names
    figures = {path.name for path in (folder / "reports/tiny/figures").iterdir()}
    assert {"energy_digits_convergent.png", "figure3_logits_digits.png"} <= figures
    assert "figure4_accuracy.png" in figures
    assert not (folder / "reports/tiny/vector").exists()
    assert {"evaluation.png", "figure6_steps.png", "figure7_energies.png"} <= figures
    left = [path for path in folder.glob(".scratch/*") if path.is_dir()]
    assert not left, "finished stages leave no work in progress"


def test_tables_show_published_and_measured_rows_and_what_was_not_run(folder: Path) -> None:
    table = pd.read_csv(folder / "reports/tiny/table2.csv")
    published = table[table.Source == "published"].set_index("Defense")
    assert published.loc["Hill et al. 2021", "Adv."] == "0.5490"
    ours = table[table.Defense == "Ours"].set_index("Dataset")
    assert ours.loc["cifar10", "Adv."] == "not run"
    record = AttackResult.load(PATHS.record("bpda_eot"))
    robust = record.record.robust(record.images.labels)
    assert ours.loc["digits", "Adv."].startswith(f"{robust.float().mean():.4f} [")
    assert ours.loc["digits", "Adv."].endswith(f"n={len(robust)}")


def test_the_report_is_a_pure_function_of_the_records(folder: Path) -> None:
    assert command("report --out again").exit_code == 0
    for path in (folder / "reports/tiny").rglob("*"):
        if path.is_file():
            twin = folder / "again" / path.relative_to(folder / "reports/tiny")
            assert path.read_bytes() == twin.read_bytes(), path


def test_a_stage_run_twice_writes_the_same_bytes(folder: Path) -> None:
    for words, path in (
        ("train-ebm digits convergent", PATHS.model("ebm_convergent")),
        ("attack digits bpda_eot", PATHS.record("bpda_eot")),
    ):
        again = Path(f"again-{path.name}")
        assert command(f"{words} --out {again}").exit_code == 0
        assert again.read_bytes() == path.read_bytes()
    assert (
        Path("again-ebm_convergent.state.pt").read_bytes()
        == PATHS.state("ebm_convergent").read_bytes()
    )


def test_the_report_refuses_a_record_outside_the_ball(folder: Path) -> None:
    path = PATHS.record("pgd")
    good = path.read_bytes()
    result = AttackResult.load(path)
    result.record.adversarial[0] = 1 - result.record.adversarial[0].round()
    result.save(path)
    judged = command("report --out elsewhere")
    path.write_bytes(good)
    assert judged.exit_code == 2
    assert "expected distance <= 0.188" in judged.output
    assert not Path("elsewhere").exists()


def test_the_report_refuses_records_of_other_parameters(folder: Path) -> None:
    values = tiny_params()
    values["langevin"] = {**values["langevin"], "H_def": 6}
    Path("other.yaml").write_text(yaml.safe_dump(values))
    result = command("report --params other.yaml --out elsewhere")
    assert result.exit_code == 2
    assert "bpda_eot.safetensors: expected H_def = 6 as in params.yaml, got 5" in " ".join(
        result.output.split()
    )


def test_a_result_of_parameters_that_changed_meanwhile_is_not_recorded(folder: Path) -> None:
    values = tiny_params()
    values["attack"]["bpda_eot"] = {"images": 60, "steps": 7, "restarts": 1}
    Path("edited.yaml").write_text(yaml.safe_dump(values))
    process = run_in_background("attack digits bpda_eot --params edited.yaml --out edited.bin")
    wait_for("attack-digits-bpda_eot-*/shard-0000.safetensors", process)
    values["langevin"] = {**values["langevin"], "K": 5}
    Path("edited.yaml").write_text(yaml.safe_dump(values))
    assert process.wait() == 2
    assert scratch_files("attack-digits-bpda_eot-*/shard-0011.safetensors"), "the work is kept"


def test_records_are_taken_shard_by_shard(folder: Path) -> None:
    tensors, about = load_tensors(PATHS.record("bpda_eot"))
    assert tensors["adversarial"].shape == (8, 1, 8, 8)
    assert about["attack"] == "bpda_eot"
    assert (about["K"], about["H_adv"], about["H_def"], about["restarts"]) == (4, 2, 5, 2)


def run_in_background(words: str) -> subprocess.Popen[bytes]:
    arguments = [sys.executable, "-m", "stages", *words.split()]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),  # the same sums as here
    }
    return subprocess.Popen(arguments, env=environment, stderr=subprocess.DEVNULL)


def scratch_files(pattern: str) -> list[Path]:
    return sorted(Path(".scratch").glob(pattern))


def wait_for(pattern: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not scratch_files(pattern):
        assert process.poll() is None, "the stage ended before it could be interrupted"
        assert time.monotonic() < deadline, f"no {pattern}"
        time.sleep(0.01)


def test_an_attack_killed_between_shards_goes_on_to_the_same_record(folder: Path) -> None:
    values = tiny_params()
    values["attack"]["bpda_eot"] |= {"images": 60, "steps": 6}
    Path("longer.yaml").write_text(yaml.safe_dump(values))
    words = "attack digits bpda_eot --params longer.yaml"
    assert command(f"{words} --out whole.safetensors").exit_code == 0
    process = run_in_background(f"{words} --out resumed.safetensors")
    wait_for("attack-digits-bpda_eot-*/shard-0002.safetensors", process)
    process.kill()
    process.wait()
    assert not Path("resumed.safetensors").exists()
    kept = {path: path.stat().st_mtime_ns for path in scratch_files("attack-*/shard-*")}
    assert command(f"{words} --out resumed.safetensors").exit_code == 0
    assert kept
    assert Path("resumed.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_training_stopped_by_a_signal_goes_on_to_the_same_weights(folder: Path) -> None:
    values = tiny_params()
    values["ebm"] |= {"phase_1_batches": 1500}
    Path("longer.yaml").write_text(yaml.safe_dump(values))
    words = "train-ebm digits adam --params longer.yaml"
    state = PATHS.state("ebm_adam").read_bytes()
    assert command(f"{words} --out whole.safetensors").exit_code == 0
    process = run_in_background(f"{words} --out resumed.safetensors")
    wait_for("train-ebm-digits-adam-????????????", process)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 130
    assert scratch_files("train-ebm-digits-adam-*/checkpoint.pt")
    assert command(f"{words} --out resumed.safetensors").exit_code == 0
    assert Path("resumed.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()
    PATHS.state("ebm_adam").write_bytes(state)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("attack digits bpda_eot --classifier none.safetensors", "none.safetensors: no such file"),
        ("attack digits bpda_eot --energy none.safetensors", "`stochsec train-ebm digits"),
        (
            "train-classifier digits nonsense",
            "training: expected one of ['natural', 'adversarial'], got 'nonsense'",
        ),
        ("attack digits nonsense", "attack: expected one of ['pgd', 'pgd_adversarial'"),
        ("evaluate digits nonsense", "energy: expected one of ['convergent', 'smooth_convergent']"),
        (
            f"attack digits smoothed --energy {PATHS.model('ebm_smooth_convergent')}",
            "has no corners to smooth",
        ),
        ("train-ebm digits nonsense", "phase: expected one of ['adam', 'convergent'"),
        ("attack digits pgd --images none.npz", "none.npz: no such file"),
        ("attack digits pgd --classifier corrupt.bin", "corrupt.bin: expected .safetensors of"),
        (
            "attack digits pgd --energy corrupt.bin --classifier corrupt",
            "corrupt: expected .safetensors of",
        ),
        ("attack digits pgd --images corrupt.bin", "corrupt.bin: not an image file"),
        (
            f"attack digits transfer_K --pgd {PATHS.record('bpda_eot')}",
            "expected a record of attack pgd",
        ),
        ("attack digits transfer_K --pgd corrupt.bin", "corrupt.bin: not a readable"),
        ("train-ebm digits convergent --start corrupt.bin", "corrupt.bin: not a readable training"),
        ("attack digits pgd --params .", ".: not a readable text file"),
        ("attack digits pgd --device nowhere", "device: 'nowhere' cannot be used"),
    ],
)
def test_what_is_missing_or_broken_is_one_line(folder: Path, words: str, message: str) -> None:
    for name in ("corrupt.bin", "corrupt"):
        Path(name).write_bytes(b"\x00garbage" * 50)
    result = command(words)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_weights_of_another_network_are_refused(folder: Path) -> None:
    result = command(f"attack digits pgd --classifier {PATHS.model('ebm_adam')}")
    assert result.exit_code == 2
    assert "expected the weights of a WideResNet, got a ConvEnergy" in " ".join(
        result.output.split()
    )


def test_an_attack_ends_with_the_line_that_the_report_has(folder: Path) -> None:
    result = command("attack digits smoothed --out again.safetensors")
    assert result.exit_code == 0
    lines = pd.read_csv(folder / "reports/tiny/attacks.csv").set_index(["energy", "attack"])
    line = lines.loc["convergent", "smoothed"]
    printed = " ".join(result.output.split())
    for column in ("Algorithm 1", "mean logits", "average", "majority", "worst"):
        assert line[column].split()[0] in printed, column
    assert AttackResult.load(Path("again.safetensors")).record.adversarial.equal(
        AttackResult.load(
            PATHS.evaluation("convergent") / "smoothed.safetensors"
        ).record.adversarial
    )


def test_every_attack_of_every_defense_is_in_the_report(folder: Path) -> None:
    lines = pd.read_csv(folder / "reports/tiny/attacks.csv")
    named = set(tiny_params()["evaluate"]["attacks"])
    by_energy = {energy: set(part.attack) for energy, part in lines.groupby("energy")}
    assert by_energy["convergent"] >= named | {"transfer", "bpda_eot", "transfer_K"}
    assert by_energy["smooth_convergent"] >= named - {"smoothed"}
    assert "smoothed" not in by_energy["smooth_convergent"], "nothing to smooth"
    exact = lines[(lines.attack == "exact") & (lines.energy == "convergent")].iloc[0]
    assert "gradient is the identity" in exact["flags"]
    page = (folder / "reports/tiny/attacks.md").read_text()
    assert "active test: attack identity finds" in page
    assert "false breaks: Algorithm 1 without any perturbation" in page
    assert (folder / "reports/tiny/figures/evaluation.png").exists()


def test_natural_accuracy_and_conditions_stand_beside_every_number(folder: Path) -> None:
    rows = pd.read_csv(folder / "reports/tiny/rows.csv")
    for _, part in rows.groupby(["dataset", "energy", "attack"]):
        assert {"natural", "adversarial", "natural_worst"} <= set(part.metric)
    guided = rows[rows.attack == "smoothed"]
    conditions = ["K", "H_adv", "H_def", "eps_255", "step_255", "steps", "rule", "gradient", "loss"]
    assert guided[conditions].notna().all().all()
    assert (rows.low <= rows.accuracy + 1e-4).all()
    assert (rows.accuracy <= rows.high + 1e-4).all()


def test_a_subset_of_whole_shards_is_that_part_of_the_whole(folder: Path) -> None:
    assert command("attack digits bpda_eot --subset 5:8 --out part.safetensors").exit_code == 0
    part = AttackResult.load(Path("part.safetensors"))
    whole = AttackResult.load(PATHS.record("bpda_eot"))
    assert part.images.index.equal(whole.images.index[5:8])
    assert part.record.adversarial.equal(whole.record.adversarial[5:8])
    assert part.record.broken_at.equal(whole.record.broken_at[5:8])
    assert command("attack digits transfer --subset 2:7 --out moved.safetensors").exit_code == 0
    assert len(AttackResult.load(Path("moved.safetensors")).images.labels) == 5


@pytest.mark.parametrize("subset", ["8:5", "x:3", "4", "-1:3"])
def test_a_subset_that_is_none_is_one_line(folder: Path, subset: str) -> None:
    result = command(f"attack digits bpda_eot --subset {subset}")
    assert result.exit_code == 2
    assert f"subset: expected START:STOP with START < STOP, got '{subset}'" in result.output


def test_starting_afresh_forgets_what_was_left(folder: Path) -> None:
    values = tiny_params()
    values["attack"]["bpda_eot"] |= {"images": 60, "steps": 6}
    values["seed"] = 7
    Path("afresh.yaml").write_text(yaml.safe_dump(values))
    words = "attack digits bpda_eot --params afresh.yaml --out afresh.safetensors"
    before = set(scratch_files("attack-digits-bpda_eot-????????????"))
    process = run_in_background(words)
    deadline = time.monotonic() + 60
    while not (left := set(scratch_files("attack-digits-bpda_eot-????????????")) - before):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (folder_left,) = left
    wait_for(f"{folder_left.name}/shard-0002.safetensors", process)
    process.kill()
    process.wait()
    assert "resumed at" not in command(f"{words} --no-resume").output
    assert not folder_left.exists()


def test_an_evaluation_killed_between_attacks_goes_on_to_the_same_records(folder: Path) -> None:
    words = "evaluate digits --out resumed"
    process = run_in_background(words)
    wait_for("evaluate-digits-*/exact.safetensors", process)
    process.kill()
    process.wait()
    result = command(words)
    assert result.exit_code == 0
    assert "transfer digits: natural" not in result.output, "it was finished before"
    for path in PATHS.evaluation("convergent").iterdir():
        assert path.read_bytes() == (Path("resumed") / path.name).read_bytes(), path.name


def test_any_network_can_be_attacked_from_a_file(folder: Path) -> None:
    params = load_params(Path("params.yaml"))
    cpu = Hardware.choose("cpu")
    classifier = load_classifier(params, "digits", cpu, PATHS.model("classifier"))
    batch = torch.export.Dim("batch", min=1)
    shapes = ({0: batch},)
    program = torch.export.export(classifier, (torch.rand(3, 1, 8, 8),), dynamic_shapes=shapes)
    torch.export.save(program, "theirs.pt2")
    words = "attack digits bpda_eot --classifier theirs.pt2 --out theirs.safetensors"
    assert command(words).exit_code == 0
    theirs, ours = Path("theirs.safetensors"), PATHS.record("bpda_eot")
    clean = [AttackResult.load(path).record.clean_logits for path in (theirs, ours)]
    torch.testing.assert_close(*clean, rtol=1e-3, atol=1e-3)
    Path("broken.pt2").write_bytes(b"nothing")
    result = command("attack digits pgd --classifier broken.pt2")
    assert result.exit_code == 2
    assert "broken.pt2: not a program of torch.export" in " ".join(result.output.split())


def test_weights_say_which_network_they_are(folder: Path) -> None:
    """An energy of another size than params.yaml says is still read as what it is."""
    values = tiny_params()
    values["energy"]["width"] = 6
    Path("wider.yaml").write_text(yaml.safe_dump(values))
    words = "attack digits bpda_eot --params wider.yaml --out wider.safetensors"
    assert command(words).exit_code == 0
    wider, ours = (
        AttackResult.load(Path("wider.safetensors")),
        AttackResult.load(PATHS.record("bpda_eot")),
    )
    assert wider.record.clean_logits.equal(ours.record.clean_logits)


def test_a_record_says_what_it_was_made_of(folder: Path) -> None:
    about = AttackResult.load(PATHS.evaluation("convergent") / "exact.safetensors").about
    files = {"images", "classifier", "energy"}
    assert about["files"].keys() == files
    assert about["files"]["classifier"] == fingerprint(PATHS.model("classifier"))
    assert {"device", "torch", "threads", "engine", "activation", "cost", "flags"} <= about.keys()


def test_the_schedule_is_benched_against_the_printed_algorithm(folder: Path) -> None:
    words = "bench-attack digits --images 6 --steps 2 --block 3 --out bench"
    assert command(words).exit_code == 0
    rows = json.loads(Path("bench/attack.json").read_text())["rows"]
    assert [row["way"] for row in rows][:2] == ["as printed", "scheduled"]
    assert rows[0]["speedup"] == 1.0
    assert rows[0]["image_steps"] >= rows[1]["image_steps"]
    assert len({row["natural"] for row in rows[:2]}) == 1


@pytest.mark.parametrize(
    "words",
    ["attack digits smoothed", "attack digits bpda_eot --subset 0:5"],
)
def test_what_is_not_the_workflows_is_kept_apart(folder: Path, words: str) -> None:
    before = {path: path.read_bytes() for path in PATHS.record("pgd").parent.rglob("*.safetensors")}
    assert command(words).exit_code == 0
    assert PATHS.own(f"{words.split()[2]}.safetensors").exists()
    after = {path: path.read_bytes() for path in PATHS.record("pgd").parent.rglob("*.safetensors")}
    assert after == before


def test_the_report_refuses_a_record_of_other_images(folder: Path) -> None:
    path = PATHS.record("bpda_eot")
    kept = path.read_bytes()
    assert command(f"attack digits bpda_eot --subset 0:5 --out {path}").exit_code == 0
    result = command("report --out refused")
    path.write_bytes(kept)
    assert result.exit_code == 2
    assert "expected the first 8 test images, got 5" in " ".join(result.output.split())


def test_the_number_of_images_belongs_to_unfinished_work(folder: Path) -> None:
    """A last, partial shard of an earlier size must not be taken for a whole one."""
    values = tiny_params()
    names = []
    for images in (6, 7):
        values["evaluate"]["images"] = images
        Path("sized.yaml").write_text(yaml.safe_dump(values))
        params = load_params(Path("sized.yaml"))
        names.append((params.images("exact"), params.images("transfer"), params.images("pgd")))
    assert names == [(6, 6, 12), (7, 7, 12)]
    process = run_in_background("evaluate digits --params sized.yaml --out sized")
    wait_for("evaluate-digits-*/transfer.safetensors", process)
    process.kill()
    process.wait()
    values["evaluate"]["images"] = 6
    Path("sized.yaml").write_text(yaml.safe_dump(values))
    assert command("evaluate digits --params sized.yaml --out sized").exit_code == 0
    sizes = {len(AttackResult.load(path).images.labels) for path in Path("sized").iterdir()}
    assert sizes == {6}
