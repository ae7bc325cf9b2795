"""`stochsec bench`: both sides do the same work, and the numbers are what they claim."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from defense.langevin import LangevinConfig, langevin
from stages import bench
from stages.bench_jobs import TAU, Job, backward_chain, ours, usual, usual_chain
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
    for engine, precision in (("plain", "float32"), ("compiled", "float32")):
        ours(small(task), engine, precision)()
    ours(small(task), "compiled", "bfloat16")()


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
        patch.setattr(bench, "jobs", lambda device: [small(task) for task in TASKS])
        patch.setattr(bench, "CONVOLUTIONS", ((8, 8),))
        patch.setattr(bench, "PRODUCTS", (32,))
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
        engines = {"usual", "compiled"} | ({"backward", "plain"} if task == "langevin" else set())
        assert set(group["engine"]) == engines
        assert set(group[group["engine"] == "compiled"]["precision"]) == {"float32", "bfloat16"}
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
    bench.write(values, tmp_path, "cpu")
    for name in ("cpu.md", "cpu.png", "cpu.svg"):
        assert (tmp_path / name).read_bytes() == (result / name).read_bytes()
    assert len((result / "cpu.md").read_text().split("| compiled ")) == 2 * len(TASKS) + 1


def test_a_dead_process_of_the_usual_loop_is_said(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "jobs", lambda device: [small("langevin")])
    monkeypatch.setattr(bench.sys, "executable", "/bin/true")
    out = command(f"bench --rounds 2 --device cpu --out {tmp_path}")
    assert out.exit_code == 2
    assert "the process of the usual loop ended" in out.output
    assert not list(tmp_path.iterdir())
