"""`stochsec bench`: both sides do the same work, and the numbers are what they claim."""

import json
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import MagicMock

import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from defense.fast.langevin import FastLangevin
from defense.langevin import LangevinConfig, langevin
from stages.bench import jobs, speed
from stages.bench.jobs import TAU, Job, backward_chain, ours, usual, usual_chain
from tests.tiny import command

TASKS = ("langevin", "ebm_update", "attack_step", "classifier_step")
SMALL = {"side": 8, "channels": 1, "width": 4, "depth": 10, "widening": 1}


def small(task: str, batch: int = 30, steps: int = 2) -> Job:
    return Job(task, "cpu", batch, 0 if task == "classifier_step" else steps, **SMALL)


@pytest.mark.parametrize("chain", [usual_chain, backward_chain])
def test_the_loop_that_we_are_compared_with_is_langevins(chain) -> None:
    job = small("langevin")
    energy, x = job.energy(), job.pixels(5)
    torch.manual_seed(3)
    expected = langevin(energy, x, LangevinConfig(4, TAU), generator=None)
    torch.manual_seed(3)
    torch.testing.assert_close(chain(energy, x.clone(), 4), expected)


def test_only_backward_computes_the_weights_gradients() -> None:
    job = small("langevin")
    energy = job.energy()
    usual_chain(energy, job.pixels(2), 1)
    assert all(weight.grad is None for weight in energy.parameters())
    backward_chain(energy, job.pixels(2), 1)
    assert all(weight.grad is not None for weight in energy.parameters())


@pytest.mark.parametrize("task", TASKS)
def test_every_job_runs_on_both_sides(task: str) -> None:
    usual(small(task))()
    for engine, precision in (("plain", "float32"), ("fast", "float32")):
        ours(small(task), engine, precision)()
    ours(small(task), "fast", "bfloat16")()


def test_operations_of_the_papers_energy() -> None:
    forward = 27 * 32 * 32**2 + 3 * 16 * 32 * 64 * 16**2 + 4 * 4 * 256
    assert Job("langevin", "cpu", 7, 3).flops() == 7 * 3 * 2 * 2 * forward


def test_an_update_costs_its_chain_and_three_passes_over_data_and_chains() -> None:
    chain, update = small("langevin").flops(), small("ebm_update").flops()
    passes = (update - chain) / (chain / (2 * 2))  # a step is two passes
    assert 2 * 2 < passes < 2 * 3  # the first layer's gradient in the image is spared


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(speed, "jobs", lambda device: [small(task) for task in TASKS])
        patch.setattr(speed, "CONVOLUTIONS", ((16, 16),))
        patch.setattr(speed, "PRODUCTS", (256,))
        patch.setattr(speed, "runs_bfloat16", lambda device: True)
        out = command(f"bench --rounds 2 --device cpu --out {folder} --json {folder}/copy.json")
    assert out.exit_code == 0, out.output
    return folder


def test_json_has_machine_limits_and_rows(result: Path) -> None:
    text = (result / "cpu.json").read_text()
    assert text == (result / "copy.json").read_text()
    values = json.loads(text)
    assert set(values) == {"machine", "limits", "rows"}
    assert [limit["precision"] for limit in values["limits"]] == ["float32", "bfloat16"]
    assert all(limit["conv_gflops"] > 0 < limit["matmul_gflops"] for limit in values["limits"])
    rows = pd.DataFrame(values["rows"])
    assert set(rows["task"]) == set(TASKS)
    for task, group in rows.groupby("task"):
        engines = {"usual", "fast"} | ({"backward", "plain"} if task == "langevin" else set())
        assert set(group["engine"]) == engines
        assert set(group[group["engine"] == "fast"]["precision"]) == {"float32", "bfloat16"}
        assert (group[group["engine"] == "usual"]["speedup"] == 1).all()
    assert rows["speedup"].values == pytest.approx(rows["baseline_ms"] / rows["ms"], rel=0.02)
    counted = rows["batch"] * rows["steps"].clip(lower=1)
    assert rows["image_steps_per_s"].values == pytest.approx(1e3 * counted / rows["ms"], rel=0.02)


def test_fraction_of_the_limit_is_useful_operations_over_the_convolution_rate(
    result: Path,
) -> None:
    values = json.loads((result / "cpu.json").read_text())
    conv = {limit["precision"]: limit["conv_gflops"] for limit in values["limits"]}
    for row in values["rows"]:
        rate = small(row["task"]).flops() / row["ms"] / 1e6
        assert row["limit_fraction"] == pytest.approx(rate / conv[row["precision"]], abs=2e-3)


def test_table_and_picture_come_from_the_json(result: Path, tmp_path: Path) -> None:
    values = json.loads((result / "cpu.json").read_text())
    speed.write(values, tmp_path, "cpu")
    for name in ("cpu.md", "cpu.png"):
        assert (tmp_path / name).read_bytes() == (result / name).read_bytes()
    assert len((result / "cpu.md").read_text().split("| fast ")) == 2 * len(TASKS) + 1


def test_a_dead_process_of_the_usual_loop_is_said(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(speed, "jobs", lambda device: [small("langevin")])
    monkeypatch.setattr(speed.sys, "executable", "/bin/true")
    out = command(f"bench --rounds 2 --device cpu --out {tmp_path}")
    assert out.exit_code == 2
    assert "the process of the usual loop ended" in out.output
    assert not list(tmp_path.iterdir())


def test_operations_of_training_and_attack() -> None:
    train, attack, chain = small("classifier_step"), small("attack_step"), small("langevin")
    with FlopCounterMode(display=False) as counter:
        train.classifier()(train.pixels(train.batch))
    forward = counter.get_total_flops()
    assert attack.flops() - chain.flops() == 2 * forward
    assert 2.5 * forward < train.flops() < 3 * forward


def test_rows_and_limits_by_hand() -> None:
    job, million = small("langevin"), 10**6
    sides = [("usual", "float32"), ("backward", "float32"), ("fast", "bfloat16")]
    entries = [speed.Entry("langevin", job, engine, p, lambda: 0.0) for engine, p in sides]
    for flops, precision in ((8, "float32"), (2, "float32"), (32, "bfloat16")):
        task = f"conv {flops * million}"
        entries.append(speed.Entry(task, None, "", precision, lambda: 0.0))
    times = [[8.0, 6.0, 70.0], [16.0] * 3, [2.0] * 3, [1.0] * 3, [1.0] * 3, [1.0] * 3]
    limits = speed.limits_of(entries, times)
    assert [limit["conv_gflops"] for limit in limits] == [8.0, 32.0]
    rows = speed.rows_of(entries, times, limits)
    assert [row["baseline_ms"] for row in rows] == [8.0] * 3
    assert [row["speedup"] for row in rows] == [1.0, 0.5, 4.0]
    low, high = rows[0]["ms_quartiles"]
    assert low < rows[0]["ms"] == 8.0 < high
    assert rows[2]["limit_fraction"] == pytest.approx(job.flops() / 2e6 / 32, abs=1e-3)


def test_the_first_round_warms_up(monkeypatch) -> None:
    clock = iter([100.0, 1.0, 2.0])
    entry = speed.Entry("langevin", small("langevin"), "usual", "float32", lambda: next(clock))
    monkeypatch.setattr(speed, "entries_on", lambda device, users: [entry])
    assert speed.timings("cpu", 2)[1] == [[1.0, 2.0]]


def test_every_usual_job_has_a_process_that_is_told_which_loop(monkeypatch) -> None:
    started = MagicMock()
    monkeypatch.setattr(speed.subprocess, "Popen", started)
    monkeypatch.setattr(speed, "jobs", lambda device: [small("langevin")])
    monkeypatch.setattr(speed, "CONVOLUTIONS", ())
    monkeypatch.setattr(speed, "PRODUCTS", ())
    with ExitStack() as users:
        speed.entries_on("cpu", users)
    asked = [json.loads(call.args[0][-1]) for call in started.call_args_list]
    assert [backward for _, backward in asked] == [False, True]


@pytest.mark.parametrize(("backward", "name"), [(False, "usual_chain"), (True, "backward_chain")])
def test_the_usual_side_runs_the_loop_it_was_told(monkeypatch, backward: bool, name: str) -> None:
    called = MagicMock()
    monkeypatch.setattr(jobs, name, called)
    usual(small("langevin"), backward=backward)()
    called.assert_called_once()


@pytest.mark.parametrize(
    ("precision", "dtype"), [("float32", torch.float32), ("bfloat16", torch.bfloat16)]
)
def test_the_machines_rates_count_what_they_run(monkeypatch, precision, dtype) -> None:
    monkeypatch.setattr(speed, "CONVOLUTIONS", ((8, 8),))
    monkeypatch.setattr(speed, "PRODUCTS", (32,))
    for task, work in speed.machine_work("cpu", precision):
        with FlopCounterMode(display=False) as counter:
            assert work().dtype == dtype
        assert counter.get_total_flops() == int(task.split()[1])


@pytest.mark.parametrize("task", TASKS[:3])
def test_our_side_runs_the_fast_chain_in_the_precision(task: str, monkeypatch) -> None:
    ran = []

    class Spy(FastLangevin):
        def __call__(self, *args, **options):
            ran.append(self.precision)
            return super().__call__(*args, **options)

    monkeypatch.setattr(jobs, "FastLangevin", Spy)
    ours(small(task), "fast", "bfloat16")()
    assert ran == ["bfloat16"]
