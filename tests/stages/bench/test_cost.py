"""`stochsec cost`: its counts by hand, and against what the stages do."""

import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from defense.energy import ConvEnergy
from defense.fast import onednn
from defense.fast.written_gradient import WrittenGradient
from defense.gradient.hessian import WrittenHessian
from defense.inference import freeze
from stages import StageError
from stages.attack import attack_defense
from stages.bench import cost
from stages.bench.cost import Work, costs
from stages.bench.jobs import Job
from stages.core import engine, presets
from stages.core.build import Nets
from stages.core.energies import new_energy
from stages.core.hardware import Hardware
from stages.core.params import NamedAttack, Params, validate_params
from tests.tiny import ROOT, tiny_params

STEPS = {
    "train_classifier": 0,
    "train_adversarially": 0,
    "ebm_adam": 20 * 20 * (3 + 3),
    "ebm_convergent": 20 * 20 * (3 + 3),
    "ebm_nonconvergent": 20 * 20 * (3 + 3),
    "ebm_smooth_adam": 20 * 20 * (3 + 3),
    "ebm_smooth_convergent": 20 * 20 * (3 + 3),
    "attack_pgd": 0,
    "attack_pgd_adversarial": 0,
    "attack_transfer K": 2 * 10 * 3 * 4,
    "attack_transfer K_short": 2 * 10 * 3 * 2,
    # Two restarts of three iterates; the target at both ends and on one suspect.
    "attack_bpda_eot": 8 * (6 * 2 * 4 + 3 * 5 * 4),
    # Transfer; six attacks of three iterates, square of six; on the way back a step of exact and
    # apgd counts 1 with corners and 3 without, of smoothed 3.
    "evaluate convergent": 7 * (2 * 5 * 4 + 6 * (24 + 60) + 48 + 60 + 24 * (1 + 1 + 3)),
    "evaluate smooth_convergent": 7 * (2 * 5 * 4 + 5 * (24 + 60) + 48 + 60 + 24 * (3 + 3)),
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


def by_stage(params: Params, dataset: str = "digits") -> dict[str, Work]:
    return {row.stage: row.work for row in costs(params) if row.dataset == dataset}


@pytest.fixture(scope="module")
def paper() -> Params:
    return validate_params(yaml.safe_load(presets.text("paper")), Path("paper.yaml"))


def test_steps_and_passes_by_hand() -> None:
    rows = by_stage(tiny())
    assert {stage: work.steps for stage, work in rows.items()} == STEPS
    assert {stage: rows[stage].passes for stage in PASSES} == PASSES


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
    spent, classifier = list[int](), TwoFaced(wary=share > 0)
    nets = Nets(
        params,
        "digits",
        Hardware(torch.device("cpu"), 200),
        classifier,
        freeze(new_energy(params, "digits", "smooth_convergent")),
        counted=lambda chain: engine.counted(chain, spent.append),
    )
    x, y = torch.rand(2, 1, 8, 8), torch.zeros(2, dtype=torch.int64)
    record = attack_defense(nets, "mine", named)(0, None, x, y, lambda robust: None)
    assert record.robust(y).all()
    assert (record.verified[:, 0] == share * 2 * 4).all()
    monkeypatch.setattr(cost, "SUSPECT_SHARE", share)

    def counted(gradient: str) -> Work:
        attack = named.model_copy(update={"gradient": gradient})
        return 2 * cost.defended(params, "smooth_convergent", attack)

    there, back = counted("none").steps, counted(gradient).steps - counted("none").steps
    again = back // cost.STEP_BACK
    assert again == (2 * 8 * 2 * 9 if gradient == "exact" else 0)
    assert sum(spent) == there + again - again // 3  # the first states of segments are kept
    assert counted(gradient).passes == classifier.asked[False] + 4 * classifier.asked[True]


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
    assert counts[1] == (cost.STEP_BACK - 1) * counts[0] > 0


def test_every_stage_of_the_workflow_has_its_rows(paper: Params) -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    expected, names = Counter[tuple[str, str]](), {"${datasets}": paper.datasets}
    free = {"code", "check_params", "prepare_data", "tables", "report", "publish"}
    for stage in stages.keys() - free:
        matrix = {**stages[stage]["matrix"]}
        datasets = names.get(str(matrix.pop("dataset")), [paper.compare_dataset])
        for dataset in datasets:
            expected[dataset, stage] = math.prod(len(values) for values in matrix.values())
    assert Counter((row.dataset, row.stage.split()[0]) for row in costs(paper)) == expected


def test_the_papers_training_is_150_000_batches_of_100_chains_of_100_steps(paper: Params) -> None:
    for dataset in paper.datasets:
        work = by_stage(paper, dataset)
        both = work["ebm_adam"].steps + work["ebm_convergent"].steps
        assert both == 150_000 * 100 * (100 + cost.LEARN)


def test_learning_from_a_pair_costs_so_many_steps() -> None:
    update, chain = (Job(task, "cpu", 100, 50).flops() for task in ("ebm_update", "langevin"))
    assert (update - chain) / (chain / 50) == pytest.approx(cost.LEARN, rel=0.05)


def test_what_is_doubled_costs_twice() -> None:
    once, longer = by_stage(tiny()), by_stage(tiny(langevin={"K": 8}))
    for stage, times in (("attack_transfer K", 2), ("attack_transfer K_short", 1), ("compare", 1)):
        assert longer[stage].steps == times * once[stage].steps
    assert longer["attack_bpda_eot"].steps == 2 * once["attack_bpda_eot"].steps
    wider = by_stage(tiny(evaluate={"images": 3}))
    assert 7 * wider["evaluate convergent"].steps == 3 * once["evaluate convergent"].steps


def test_the_table_has_every_stage_totals_and_hours_if_asked(paper: Params, capsys) -> None:
    cost.run(tiny(), None)
    without = capsys.readouterr().err
    assert "hours" not in without
    lines = {line.split("│")[2].strip(): line for line in without.splitlines() if "│" in line}
    assert list(lines) == [*STEPS, "total"]
    assert f"{sum(STEPS.values()):,}" in lines["total"]
    cost.run(paper, 1e6)
    shown = [line.split("│") for line in capsys.readouterr().err.splitlines() if "│ total" in line]
    assert [line[1].strip() for line in shown] == [*paper.datasets, "all"]
    steps, hours = (float(shown[-1][i].replace(",", "")) for i in (3, 5))
    assert steps == sum(row.work.steps for row in costs(paper))
    assert hours == pytest.approx(steps / 3.6e9, rel=0.01)


def test_a_source_of_unknown_size_is_said() -> None:
    values = tiny_params()
    values["data"]["digits"] |= {"source": "folder", "train_images": 100}
    with pytest.raises(StageError, match="expected numbers train_images and test_images"):
        costs(validate_params(values, Path("mine.yaml")))
    values["data"]["digits"] |= {"test_images": 10}
    work = by_stage(validate_params(values, Path("mine.yaml")))["train_classifier"]
    assert work.passes == 2 * (3 * 100 + 10)
