"""`stochsec cost`: its counts by hand, and against what the stages do."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defense import onednn
from defense.energy import ConvEnergy
from defense.inference import freeze
from defense.written_gradient import WrittenGradient
from defense.written_hessian import WrittenHessian
from stages import StageError, cost, presets
from stages.attack import attack_defense
from stages.bench_attack import counting
from stages.bench_jobs import Job
from stages.build import Nets
from stages.cost import Cost, Timed, costs
from stages.energies import new_energy
from stages.hardware import Hardware
from stages.params import NamedAttack, Params, validate_params
from tests.tiny import tiny_params

ROOT = Path(__file__).parent.parent
STEPS = {
    "train_classifier": 0,
    "train_adversarially": 0,
    "ebm_adam": 20 * 20 * 3,
    "ebm_convergent": 20 * 20 * 3,
    "ebm_nonconvergent": 20 * 20 * 3,
    "ebm_smooth_adam": 20 * 20 * 3,
    "ebm_smooth_convergent": 20 * 20 * 3,
    "attack_pgd": 0,
    "attack_pgd_adversarial": 0,
    "attack_transfer K": 2 * 10 * 3 * 4,
    "attack_transfer K_short": 2 * 10 * 3 * 2,
    # Two restarts of three iterates; the target at both ends and on one suspect.
    "attack_bpda_eot": 8 * (6 * 2 * 4 + 3 * 5 * 4),
    # Transfer; six attacks of three iterates, square of six.
    "evaluate convergent": 7 * (2 * 5 * 4 + 6 * (24 + 60) + 48 + 60),
    "evaluate smooth_convergent": 7 * (2 * 5 * 4 + 5 * (24 + 60) + 48 + 60),
    # Inner points, twice the planted one, 100 random ones and two verdicts; the attack.
    "active_test": 3 * ((3 * 20 + 102 * 5) * 4 + 24 + 60),
    # The grid's end; two iterates and three verdicts at K = 3 and 6; two energies.
    "compare": 2 * (2 * 10 * 2 * 6 + 4 * (2 * 2 + 3 * 3) * (3 + 6)),
    # Three iterates and three verdicts at three radii, then with other replicas on either side.
    "sweep": 6 * 4 * 3 * (3 * (2 + 3) + (1 + 3) + (3 + 3) + (2 + 1) + (2 + 4)),
    "snapshots": 3 * 2 * 12 * 20,
    # Pairs of chains; two strengths, two separations, two energies.
    "lyapunov": 2 * 2 * 2 * 2 * 4 * (10 + 20),
    "fid": 2 * 40 * 8,
    # Long chains from three starts, and the level of chains from two kinds of images.
    "inspect convergent": 3 * 6 * 40 + 2 * 6 * 5,
    "inspect_others nonconvergent": 3 * 6 * 40 + 2 * 6 * 5,
    "inspect_others smooth_convergent": 3 * 6 * 40 + 2 * 6 * 5,
    "diagnose": 2 * 12 * 2 * 4 + 2 * 20 * 4 + 2 * 4,
}
PASSES = {
    "train_classifier": 2 * (3 * 1297 + 500),
    "train_adversarially": 3 * 1297 + 500 + 3 * 2 * 1297,
    "ebm_adam": 0,
    "attack_pgd_adversarial": 12 * (4 * 3 + 3),
    "attack_pgd": 12 * (4 * 3 + 3),
    "attack_transfer K": 2 * 10 * 3,
    "attack_bpda_eot": 8 * (6 * 2 * 4 + 3 * 5),  # forward once more on the way back
    "active_test": 3 * (3 * 20 + 102 * 5 + 2 + 3 * 2 * 4 + 3 * 5),
    "compare": 2 * (2 * 10 * 2 * 3 + 2 * 4 * (2 * 2 * 4 + 3 * 3)),
    # Two bare classifiers at three radii; what the surrogate says has a gradient.
    "sweep": 6 * (3 * 2 * (3 * 3 + 3) + 3 * 4 * (3 * 2 + 1 + 3 + 2 + 2) + 3 * (3 * 5 + 1 + 4)),
    "fid": 2 * 40 * 3 + 40 + 40,
    "diagnose": 2 * 12 * 2 + 2 * 20 + 2 * 12 + 2,
}


def tiny(**sections: dict[str, Any]) -> Params:
    """The smallest experiment, with other values in some sections."""
    values = tiny_params()
    for name, section in sections.items():
        values[name] |= section
    return validate_params(values, Path("tiny.yaml"))


def by_stage(params: Params, dataset: str = "digits") -> dict[str, Cost]:
    return {row.stage: row for row in costs(params) if row.dataset == dataset}


@pytest.fixture(scope="module")
def paper() -> Params:
    """With a smaller classifier: it is made for every dataset."""
    values = yaml.safe_load(presets.text("paper")) | {"classifier": {"depth": 10, "width": 1}}
    return validate_params(values, Path("paper.yaml"))


@pytest.fixture(scope="module")
def paper_rows(paper: Params) -> list[Cost]:
    return costs(paper)


def test_steps_and_passes_by_hand() -> None:
    rows = by_stage(tiny())
    assert {stage: row.image_steps for stage, row in rows.items()} == STEPS
    assert {stage: rows[stage].classifier_passes for stage in PASSES} == PASSES


class TwoFaced(nn.Module):
    """Says class 0; if it is ``wary``, class 1 to whoever asks for a gradient."""

    def __init__(self, wary: bool) -> None:
        super().__init__()
        self.wary = wary
        self.asked = {True: 0, False: 0}

    def forward(self, x: Tensor) -> Tensor:
        self.asked[x.requires_grad] += len(x)
        mean = x.flatten(1).mean(1)
        sure = torch.full_like(mean, 9.0 if self.wary and x.requires_grad else -9.0)
        return torch.stack([-sure, sure + 0.01 * mean], dim=1)


@pytest.mark.parametrize(
    ("gradient", "share"),
    [("identity", 0.0), ("identity", 1.0), ("exact", 0.0), ("exact", 1.0), ("none", 0.0)],
)
def test_an_attack_that_breaks_nothing_takes_what_is_counted(
    monkeypatch, gradient: str, share: float
) -> None:
    params = tiny(langevin={"K": 9})
    rule = "noise" if gradient == "none" else "pgd"
    about = {"rule": rule, "gradient": gradient, "loss": "margin", "steps": 3, "restarts": 2}
    named = NamedAttack(**about, scale=1.0, stop_at_break=True)
    spent, classifier = [0], TwoFaced(wary=share > 0)
    nets = Nets(
        params,
        "digits",
        Hardware(torch.device("cpu"), 200),
        classifier,
        freeze(new_energy(params, "digits", "smooth_convergent")),
        counted=lambda chain: counting(chain, spent),
    )
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    record = attack_defense(nets, "mine", named)(0, None, x, y, lambda robust: None)
    assert record.robust(y).all()
    assert (record.verified[:, 0] == share * 2 * 4).all()
    monkeypatch.setattr(cost, "SUSPECT_SHARE", share)
    work = 2 * cost.defended(params, "smooth_convergent", named)
    kept = work.replay // 3  # the states at the start of each segment need no step
    assert spent[0] == work.chain + work.replay - kept
    assert work.replay == work.product == (2 * 8 * 2 * 9 if gradient == "exact" else 0)
    assert classifier.asked == {True: work.slope, False: work.look - work.slope}


def test_a_straight_energy_has_no_products() -> None:
    params = tiny()
    exact = params.evaluate.attacks["exact"]
    straight = cost.defended(params, "convergent", exact)
    assert straight.product == 0 < straight.replay
    curved = cost.defended(params, "convergent", params.evaluate.attacks["smoothed"])
    assert curved == cost.defended(params, "smooth_convergent", exact)
    assert curved == replace(straight, product=straight.replay)


def test_a_product_costs_so_many_gradients(monkeypatch) -> None:
    monkeypatch.setattr(onednn, "_can_be_trusted", lambda dtype: False)
    energy = ConvEnergy(image_size=8, channels=1, width=8, activation="silu")
    x = torch.rand(3, 1, 8, 8)
    gradient = WrittenGradient(energy, [3, 1, 8, 8], torch.float32, 1)
    hessian = WrittenHessian(energy, x, 1)
    counts = []
    for call in (lambda: gradient(x), lambda: hessian.product(x, x)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            call()
        counts.append(counter.get_total_flops())
    assert counts[1] == cost.PRODUCT * counts[0] > 0


def test_the_papers_training_is_150_000_batches_of_100_chains_of_100_steps(
    paper: Params, paper_rows: list[Cost]
) -> None:
    batch = Job("ebm_update", "cpu", 100, 100).flops()
    for dataset in paper.datasets:
        phases = [
            row
            for row in paper_rows
            if row.dataset == dataset and row.stage in ("ebm_adam", "ebm_convergent")
        ]
        assert sum(row.image_steps for row in phases) == 150_000 * 100 * 100
        assert sum(row.pflop for row in phases) == pytest.approx(150_000 * batch / 1e15)
    steps = {row.stage: row.image_steps for row in paper_rows if row.dataset == "cifar10"}
    for branch in ("", "smooth_"):
        assert steps[f"ebm_{branch}adam"] == 50_000 * 100 * 100
        assert steps[f"ebm_{branch}convergent"] == steps["ebm_nonconvergent"] == 10**9


def test_operations_are_those_that_the_bench_counts(paper_rows: list[Cost]) -> None:
    rows = {row.stage: row for row in paper_rows if row.dataset == "cifar10"}
    job = Job("classifier_step", "meta", 100, depth=10, widening=1)
    with FlopCounterMode(display=False) as counter:
        job.classifier().eval()(job.pixels(1))
    look, chain = counter.get_total_flops(), Job("langevin", "cpu", 150, 1500).flops()
    attack = Job("attack_step", "cpu", 15, 0, depth=10, widening=1)
    expected = {
        "train_classifier": 100 * (50_000 * job.flops() / 100 + 10_000 * look),
        "attack_pgd": 10_000 * (51 * attack.flops() / 15 + (2 + 6) * look),
        "attack_transfer K": 20_000 * (chain + 150 * look),
    }
    for stage, operations in expected.items():
        assert rows[stage].pflop == pytest.approx(operations / 1e15)


def test_every_stage_of_the_workflow_has_its_rows(paper: Params, paper_rows: list[Cost]) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    expected, names = Counter[tuple[str, str]](), {"${datasets}": paper.datasets}
    free = {"code", "check_params", "prepare_data", "tables", "report", "publish"}
    for stage in stages.keys() - free:
        matrix = {**stages[stage]["matrix"]}
        datasets = names.get(str(matrix.pop("dataset")), [paper.compare_dataset])
        for dataset in datasets:
            expected[dataset, stage] = math.prod(len(values) for values in matrix.values())
    assert Counter((row.dataset, row.stage.split()[0]) for row in paper_rows) == expected


def test_what_is_doubled_costs_twice() -> None:
    once, longer = by_stage(tiny()), by_stage(tiny(langevin={"K": 8}))
    for stage, times in (("attack_transfer K", 2), ("attack_transfer K_short", 1), ("compare", 1)):
        assert longer[stage].image_steps == times * once[stage].image_steps
    assert longer["attack_bpda_eot"].image_steps == 2 * once["attack_bpda_eot"].image_steps
    wider = by_stage(tiny(evaluate={"images": 3}))
    assert 7 * wider["evaluate convergent"].pflop == pytest.approx(
        3 * once["evaluate convergent"].pflop
    )


def bench_row(task: str, fraction: float, **others: Any) -> dict[str, Any]:
    """One row as `stochsec bench` writes it, with what nobody reads here left out."""
    usual = {"device": "cpu", "image": "3x32x32", "engine": "compiled", "precision": "float32"}
    return {"task": task, **usual, "batch": 100, "limit_fraction": fraction, **others}


BENCH = {
    "machine": {"cpu": "mine"},
    "limits": [
        {"precision": "float32", "conv_gflops": 1000.0, "matmul_gflops": 1.0},
        {"precision": "bfloat16", "conv_gflops": 2000.0, "matmul_gflops": 1.0},
    ],
    "rows": [
        bench_row("langevin", 0.5),
        bench_row("langevin", 0.2, image="1x8x8", batch=200),
        bench_row("langevin", 0.1, image="1x8x8"),
        bench_row("langevin", 0.3, image="1x8x8", engine="usual", batch=300),
        bench_row("langevin", 0.4, precision="bfloat16"),
        bench_row("ebm_update", 0.25),
        bench_row("classifier_step", 0.01),
    ],
}


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(BENCH))
    return path


def test_rates_are_shares_of_the_machines(bench: Path) -> None:
    rates = cost.read_rates(bench)
    for precision in ("float32", "tf32"):  # the same on a CPU
        assert rates.pop(Timed("langevin", precision, 32)) == 0.5e12
        assert rates.pop(Timed("langevin", precision, 8)) == 0.2e12
        assert rates.pop(Timed("ebm_update", precision, 32)) == 0.25e12
        assert rates.pop(Timed("classifier_step", precision, 32)) == 0.01e12
    assert rates == {Timed("langevin", "bfloat16", 32): 0.8e12}


def test_the_rate_of_a_real_row_is_its_steps_times_their_operations() -> None:
    path = ROOT / "reports/bench/cpu.json"
    rates = cost.read_rates(path)
    rows = json.loads(path.read_text())["rows"]
    for task, batch, steps in (("langevin", 150, 10), ("ebm_update", 100, 100)):
        job = Job(task, "cpu", batch, steps)
        about = {"task": task, "image": "3x32x32", "engine": "compiled", "batch": batch}
        same = [row for row in rows if about.items() <= row.items()]
        for row in same:
            operations = row["image_steps_per_s"] * job.flops() / job.image_steps()
            rate = rates[Timed(task, row["precision"], 32)]
            assert rate == pytest.approx(operations, rel=0.01)
        assert [row["precision"] for row in same] == ["float32", "bfloat16"]


def test_hours_are_operations_over_the_rate_of_the_nearest_size(bench: Path) -> None:
    rates, rows = cost.read_rates(bench), by_stage(tiny())
    for stage, rate in (("inspect convergent", 0.2), ("ebm_adam", 0.25), ("attack_pgd", 0.01)):
        assert rows[stage].hours(rates) == pytest.approx(1e3 * rows[stage].pflop / rate / 3600)
    precise = by_stage(tiny(langevin={"precision": "bfloat16"}))["inspect convergent"]
    assert precise.hours(rates) == pytest.approx(1e3 * precise.pflop / 0.8 / 3600)


def test_every_operation_has_the_precision_in_which_it_is_done() -> None:
    rows = by_stage(tiny(langevin={"precision": "bfloat16"}, ebm={"precision": "tf32"}))
    expected = {
        "train_classifier": {("classifier_step", "float32"), ("classifier_step", "tf32")},
        "ebm_adam": {("ebm_update", "tf32")},
        "attack_bpda_eot": {("langevin", "bfloat16"), ("classifier_step", "tf32")},
        "inspect convergent": {("langevin", "bfloat16")},
    }
    expected["evaluate convergent"] = expected["attack_bpda_eot"]
    for stage, timed in expected.items():
        assert {one[:2] for one in rows[stage].flop} == timed, stage


def test_the_table_has_every_stage_totals_and_hours_if_asked(
    bench: Path, paper: Params, paper_rows: list[Cost], capsys, monkeypatch
) -> None:
    cost.run(tiny(), None)
    without = capsys.readouterr().err
    assert "hours" not in without.lower()
    lines = {line.split("│")[2].strip(): line for line in without.splitlines() if "│" in line}
    assert list(lines) == [*STEPS, "total"]
    assert f"{sum(STEPS.values()):,}" in lines["total"]
    monkeypatch.setattr(cost, "costs", lambda params: paper_rows)
    cost.run(paper, bench)
    shown = capsys.readouterr().err
    assert "hours" in shown and str(bench) in shown
    totals = [line.split("│")[1].strip() for line in shown.splitlines() if "│ total" in line]
    assert totals == [*paper.datasets, "all"]
    assert f"{sum(row.image_steps for row in paper_rows):,}" in shown


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("no json", "expected what `stochsec bench` writes"),
        ("[]", "expected what `stochsec bench` writes"),
        (json.dumps({"limits": [], "rows": [{"batch": 1}]}), "KeyError: 'image'"),
        (json.dumps({**BENCH, "rows": []}), "expected a row of compiled"),
        (json.dumps({**BENCH, "rows": BENCH["rows"][:1]}), "got langevin in float32"),
    ],
)
def test_a_bench_that_lacks_what_is_needed_is_said(tmp_path: Path, text: str | None, said) -> None:
    path = tmp_path / "bench.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(StageError, match=said):
        cost.run(tiny(), path)


def test_a_source_of_unknown_size_is_said() -> None:
    values = tiny_params()
    values["data"]["digits"] |= {"source": "folder", "train_images": 100}
    with pytest.raises(StageError, match="expected numbers train_images and test_images"):
        costs(validate_params(values, Path("mine.yaml")))
    values["data"]["digits"] |= {"test_images": 10}
    row = by_stage(validate_params(values, Path("mine.yaml")))["train_classifier"]
    assert row.classifier_passes == 2 * (3 * 100 + 10)
