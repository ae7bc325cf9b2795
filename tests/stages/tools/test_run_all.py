"""The workflow without DVC: which steps there are, which are done, and windows over all of them."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from stages.core.params import load_params
from stages.tools import run_all
from tests.tiny import ROOT, STAGES, command


@pytest.fixture
def folder(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny experiment, to be spoilt."""
    copy = tmp_path / "copy"
    shutil.copytree(experiment, copy, ignore=shutil.ignore_patterns(".scratch"))
    for path in copy.rglob("*"):
        os.utime(path, (1e9, 1e9))  # all is as new as all else: done
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return copy


def steps() -> dict[str, run_all.Step]:
    found = run_all.steps(load_params(Path("params.yaml")))
    return {" ".join(step.words): step for step in found}


def test_the_steps_are_the_stages_of_the_graph_in_an_order_that_works(folder: Path) -> None:
    words = [word.removesuffix(" convergent") for word in steps()]
    expected = [word.removesuffix(" convergent") for word in STAGES]
    assert sorted(words) == sorted(expected)
    made: set[Path] = set()
    for step in steps().values():
        for path in step.reads:
            inside = [one for one in made if one.is_relative_to(path) or path.is_relative_to(one)]
            assert inside, f"{step.words} reads {path} before it is made"
        made |= set(step.writes)


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    result = command("run-all")
    assert result.exit_code == 0
    assert result.output.strip() == "run-all: everything is done"


def test_what_is_missing_or_older_than_what_it_reads_is_done(folder: Path) -> None:
    shutil.rmtree("artifacts/tiny/records/digits/evaluate_convergent")
    weights = Path("artifacts/tiny/models/digits/ebm_nonconvergent.safetensors")
    os.utime(weights, (2e9, 2e9))
    undone = {words for words, step in steps().items() if not step.is_done()}
    ended = {"report", "publish"}  # they read the folder of all records, or of all models
    assert undone - ended == {
        "evaluate digits convergent",
        "compare digits",
        "fid digits",
        "inspect digits nonconvergent",
    }


def test_all_steps_share_a_window(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, ran = [0.0], []

    def step_of_ten_seconds(command: list[str], env: dict[str, str]) -> int:
        ran.append((" ".join(command[3:-2]), float(env["STOCHSEC_TIME_LIMIT"])))
        clock[0] += 10
        return statuses.pop(0)

    monkeypatch.setattr(run_all, "call", step_of_ten_seconds)
    monkeypatch.setattr(run_all.time, "monotonic", lambda: clock[0])
    shutil.rmtree("artifacts")
    file = Path("params.yaml")
    params = load_params(file)
    statuses = [0] * 10
    assert run_all.run(params, file, (), 0.5, None) == 75
    assert [words for words, _ in ran] == list(steps())[:3]
    assert [round(60 * minutes) for _, minutes in ran] == [30, 20, 10]
    statuses = [0, 75]
    assert run_all.run(params, file, (), 5, None) == 75, "as the step says"
    statuses = [0, 0, 76]
    assert run_all.run(params, file, (), 0.49, None) == 75, "too little was left for it"
    statuses = [76]
    assert run_all.run(params, file, (), 0.1, None) == 76, "a whole window is too little"
    statuses = [0, 2]
    assert run_all.run(params, file, (), 0.3, None) == 2, "an error is an error"
    monkeypatch.setenv("STOCHSEC_TIME_LIMIT", "0.5")
    statuses = [0] * 10
    assert run_all.run(params, file, (), None, None) == 75, "the environment's limit is of all"


def test_stages_are_run_in_the_order_of_their_names(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def remember(command: list[str], env: dict[str, str]) -> int:
        ran.append(" ".join(command[3:-2]))
        return 0

    monkeypatch.setattr(run_all, "call", remember)
    shutil.rmtree("artifacts")
    assert command("run-all attack_transfer inspect prepare_data").exit_code == 0
    assert ran == [
        "attack digits transfer_K",
        "attack digits transfer_K_short",
        "inspect digits convergent",
        "prepare-data digits",
    ]
    result = command("run-all nonsense")
    assert result.exit_code == 2
    assert "stages: expected names among ['check_params', 'prepare_data'" in result.output


def test_what_a_step_makes_stale_is_done_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def write_again(command: list[str], env: dict[str, str]) -> int:
        words = " ".join(command[3:-2])
        ran.append(words)
        for place in steps()[words].writes:
            for path in [place, *place.rglob("*")]:
                path.touch()
        return 0

    monkeypatch.setattr(run_all, "call", write_again)
    os.utime("artifacts/tiny/models/digits/classifier.safetensors")
    assert command("run-all").exit_code == 0
    expected = [words for words in steps() if words.split()[0] in NEED_A_CLASSIFIER]
    assert ran == [words for words in expected if words != "attack digits pgd_adversarial"]


NEED_A_CLASSIFIER = {
    "attack",
    "evaluate",
    "active-test",
    "compare",
    "diagnose",
    "fid",
    "sweep",
    "report",
    "publish",
}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_which_keeps_its_work(folder: Path, number: int) -> None:
    values = yaml.safe_load(Path("params.yaml").read_text())
    values["ebm"]["phase_1_batches"] = 100_000
    Path("params.yaml").write_text(yaml.safe_dump(values))
    Path("artifacts/tiny/models/digits/ebm_adam.state.pt").unlink()
    process = subprocess.Popen(
        [sys.executable, "-m", "stages", "run-all", "ebm_adam"], start_new_session=True
    )
    while not list(Path(".scratch").glob("train-ebm-digits-adam-*")):
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.3)
    os.killpg(process.pid, number)  # as a terminal does, or timeout: both get it
    assert process.wait(60) == 130
    assert list(Path(".scratch").glob("train-ebm-digits-adam-*/checkpoint.pt"))


def test_a_step_that_fails_ends_it(folder: Path) -> None:
    Path("artifacts/tiny/records/digits/inspect_convergent.safetensors").unlink()
    Path("artifacts/tiny/models/digits/ebm_convergent.safetensors").write_bytes(b"none")
    assert command("run-all").exit_code == 2


def test_a_preset_takes_values_of_your_own(folder: Path) -> None:
    words = "preset h100 --force --set datasets=[cifar10] --set langevin.K=7"
    assert command(words).exit_code == 0
    values = yaml.safe_load(Path("params.yaml").read_text())
    assert (values["datasets"], values["langevin"]["K"]) == (["cifar10"], 7)
    for change, message in (
        ("langevin.Q=7", "expected KEY=VALUE with a key of params.yaml, got 'langevin.Q=7'"),
        ("langevin=7", "langevin = 7: expected a valid dictionary"),
        ("seed", "expected KEY=VALUE"),
        ("langevin.K=-7", "langevin.K = -7: expected greater than or equal to 1"),
        ("langevin.K=[", "not valid YAML"),
        ("langevin.K=!!python/object:x", "not valid YAML"),
    ):
        before = Path("params.yaml").read_text()
        result = command(f"preset h100 --force --set {change}")
        assert result.exit_code == 2
        assert message in " ".join(result.output.split())
        assert Path("params.yaml").read_text() == before
    assert command("preset digits --force --set seed=010").exit_code == 0
    assert load_params(Path("params.yaml")).seed == 8, "as every reader of the file reads it"
    assert command("preset --set seed=1").exit_code == 2
