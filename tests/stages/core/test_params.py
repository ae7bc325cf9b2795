"""params.yaml: presets are complete, and a wrong value is one line that says what is allowed."""

import re
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from typer.testing import CliRunner

from defense.fast.precision import Precision
from stages import StageError
from stages.cli import app
from stages.core import presets, sections
from stages.core.params import load_params, validate_params
from tests.tiny import tiny_params


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_is_valid_and_says_its_name(name: str) -> None:
    params = validate_params(yaml.safe_load(presets.text(name)), Path(name))
    assert params.run == name
    assert list(params.data) == list(params.datasets)


def test_the_paper_preset_has_the_numbers_of_algorithms_1_and_2() -> None:
    params = validate_params(yaml.safe_load(presets.text("paper")), Path("paper"))
    cifar10 = params.data["cifar10"]
    assert (params.langevin.K, params.langevin.H_adv, params.langevin.H_def) == (1500, 15, 150)
    assert (params.attack.threat.eps_255, params.attack.threat.step_255) == (8, 2)
    assert (params.attack.bpda_eot.steps, params.attack.bpda_eot.restarts) == (50, 5)
    assert params.ebm.phase_1_batches + params.ebm.phase_2_batches == 150_000
    assert (params.ebm.update.steps, params.ebm.phase_1_batches) == (100, 50_000)
    assert (cifar10.tau, cifar10.data_noise) == (0.01, 0.02)
    assert (cifar10.adam_lr, cifar10.sgd_lr) == (1e-4, 5e-5)
    assert (params.classifier.depth, params.classifier.width) == (28, 10)


def test_an_attack_of_a_preset_takes_the_place_of_the_bases() -> None:
    here, base = (yaml.safe_load(presets.text(name))["evaluate"] for name in ("cifar10", "digits"))
    assert here["attacks"]["exact"] == base["attacks"]["exact"] | {"energy": "smooth_convergent"}
    assert here["attacks"].keys() - base["attacks"].keys() == {"exact_long"}


def test_the_h100_preset_is_the_papers_but_for_what_it_says_is_reduced() -> None:
    paper, fitted = (yaml.safe_load(presets.text(name)) for name in ("paper", "h100"))

    def differing(a: Any, b: Any, where: str = "") -> set[str]:
        if not isinstance(a, dict):
            return set() if a == b else {where}
        assert a.keys() == b.keys(), where
        return set().union(*(differing(a[key], b[key], f"{where}.{key}") for key in a))

    reduced = {
        ".".join(part for part in name.split(".")[1:] if part not in paper["datasets"])
        for name in differing(paper, fitted)
        if not name.startswith(".evaluate.attacks.")
    }
    training = {f"data.training.{n}" for n in ("weight_decay", "precision")}
    assert reduced == {
        "run",
        *training,
        *(f"data.classifier.{n}" for n in ("epochs", "schedule", "warm_up")),
        *(f"data.adversarial.{n}" for n in ("epochs", "learning_rate", "schedule", "warm_up")),
        "data.adversarial.steps",
        "data.adversarial.step_255",
        "ebm.phase_1_batches",
        "ebm.phase_2_batches",
        "attack.shard",
        "attack.pgd.images",
        "attack.transfer.images",
        "attack.bpda_eot.images",
        "attack.bpda_eot.restarts",
        "evaluate.images",
        "evaluate.active_test.images",
        "compare.K",
        "compare.images",
        "compare.replicas",
        "compare.bpda_eot.images",
        "compare.bpda_eot.H_def",
        *(f"sweep.{name}" for name in yaml.safe_load(presets.text("paper"))["sweep"]),
        "snapshots.long_steps",
        "lyapunov.burn_in",
        "lyapunov.steps",
        "fid.K",
        "fid.images",
        "inspect.chains",
    }


def test_a_preset_with_an_unknown_base_or_key_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(presets, "presets_folder", lambda: tmp_path)
    (tmp_path / "digits.yaml").write_text(DIGITS)
    (tmp_path / "mine.yaml").write_text("base: theirs\nrun: mine\n")
    with pytest.raises(StageError, match=r"preset: expected one of .*'mine'.*, got 'theirs'"):
        presets.text("mine")
    (tmp_path / "mine.yaml").write_text("run: mine\nlangevin: {steps: 3}\n")
    with pytest.raises(StageError, match=r"mine.yaml: langevin.steps: no such parameter"):
        presets.text("mine")


DIGITS = presets.text("digits")


def test_comments_survive_a_change_of_preset() -> None:
    for name in presets.names():
        lines = presets.text(name).splitlines()
        assert sum("#" in line for line in lines) > 30


def test_an_unknown_preset_names_those_there_are() -> None:
    with pytest.raises(StageError, match=r"preset: expected one of .*digits.*, got 'huge'"):
        presets.text("huge")


def changed(path: str, value: object, *, delete: bool = False) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load(presets.text("digits"))
    *parents, last = path.split(".")
    section = values
    for name in parents:
        section = section[name]
    if delete:
        del section[last]
    else:
        section[last] = value
    return values


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("langevin.K", -3, "langevin.K = -3: expected greater than or equal to 1"),
        ("langevin.K", "abc", "langevin.K = 'abc': expected a valid integer"),
        ("langevin.K", 1500.5, "langevin.K = 1500.5: expected a valid integer"),
        ("langevn", {"K": 1}, "langevn = {'K': 1}: no such parameter; expected one of run, seed"),
        ("langevin.Q", 1, "langevin.Q = 1: no such parameter; expected one of K, K_short"),
        ("data.digits.taw", 1, "data.digits.taw = 1: no such parameter; expected one of source"),
        ("data.digits.classifier.lr", 1, "data.digits.classifier.lr = 1: no such parameter; exp"),
        ("attack.threat.norm", "l1", "attack.threat.norm = 'l1': expected 'linf' or 'l2'"),
        ("classifier.depth", 11, "classifier.depth: expected 6 n + 4, got 11"),
        ("datasets", ["svnh"], "datasets: expected names among ['digits'], got 'svnh'"),
        ("compare_dataset", "svhn", "compare_dataset: expected one of ['digits'], got 'svhn'"),
        ("attack.transfer.images", 10**6, "attack.transfer.images: expected <= attack.pgd.images"),
        ("compare.images", 10**6, "compare.images: expected <= attack.pgd.images"),
        ("diagnose.H", [1, 10**6], "diagnose.H: expected <= diagnose.replicas"),
        ("attack.threat.eps_255", float("inf"), "attack.threat.eps_255 = inf: expected a finite"),
        ("langevin.K", True, "langevin.K = True: expected a valid integer"),
        ("compare.K", [100, 10], "compare.K: expected ascending numbers, got [100, 10]"),
        ("run", "paper", "run: 'paper' is the preset for cifar10, svhn, cifar100"),
    ],
)
def test_a_wrong_value_is_named_with_what_is_allowed(
    path: str, value: object, message: str
) -> None:
    with pytest.raises(StageError) as error:
        validate_params(changed(path, value), Path("params.yaml"))
    assert str(error.value).startswith(f"params.yaml: {message}")
    assert "\n" not in str(error.value)


def test_a_missing_value_is_named() -> None:
    with pytest.raises(StageError, match=r"params.yaml: langevin.K: missing"):
        validate_params(changed("langevin.K", None, delete=True), Path("params.yaml"))


def test_of_many_wrong_values_a_few_are_shown() -> None:
    values = changed("seed", -1)
    values |= {f"wrong_{number}": 1 for number in range(9)}
    with pytest.raises(StageError) as error:
        validate_params(values, Path("params.yaml"))
    assert str(error.value).count("no such parameter") <= 5
    assert str(error.value).endswith("; and 5 more")


def test_a_number_that_yaml_reads_as_text_is_a_number() -> None:
    values = changed("data.digits.adam_lr", "1e-4")
    assert validate_params(values, Path("params.yaml")).data["digits"].adam_lr == 1e-4


def test_no_file_and_bad_yaml_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    with pytest.raises(StageError, match="no such file"):
        load_params(path)
    path.write_text("run: [unclosed")
    with pytest.raises(StageError, match="not valid YAML") as error:
        load_params(path)
    assert "\n" not in str(error.value)


def test_every_stage_stops_at_once_on_bad_parameters(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(yaml.safe_dump(changed("langevin.K", -3)))
    stages = ("prepare-data", "train-classifier", "compare", "diagnose")
    for words in (*([s, "digits"] for s in stages), ["attack", "digits", "pgd"], ["report"]):
        result = CliRunner().invoke(app, [*words, "--params", str(path)])
        assert result.exit_code == 2, words
        assert "langevin.K = -3" in result.output
    assert list(tmp_path.iterdir()) == [path]


def test_an_unknown_dataset_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(presets.text("digits"))
    result = CliRunner().invoke(app, ["attack", "imagenet", "pgd", "--params", str(path)])
    assert result.exit_code == 2
    assert "dataset: expected one of ['digits'], got 'imagenet'" in result.output


def test_a_preset_does_not_overwrite_your_own_values(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    for name in presets.names():
        assert CliRunner().invoke(app, ["preset", name, "--params", str(path)]).exit_code == 0
    path.write_text(re.sub(r"K: \d+", "K: 1501", path.read_text()))
    words = ["preset", "digits", "--params", str(path)]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2
    assert "use --force" in result.output
    assert "1501" in path.read_text()
    assert CliRunner().invoke(app, [*words, "--force"]).exit_code == 0
    assert path.read_text() == presets.text("digits")


def test_conditions_of_a_defense_state_its_chain() -> None:
    params = validate_params(yaml.safe_load(presets.text("digits")), Path("digits"))
    K, short = params.langevin.K, params.langevin.K_short  # noqa: N806
    for attack, steps in (("transfer_K_short", short), ("transfer_K", K), ("bpda_eot", K)):
        stated = params.conditions(attack)
        assert (stated["K"], stated["precision"]) == (steps, params.langevin.precision)
    assert not {"K", "precision"} & params.conditions("pgd").keys()


def test_the_precisions_are_those_of_the_library() -> None:
    assert get_args(sections.Precision) == get_args(Precision)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (
            ("attack", "threat", "norm"),
            "l2",
            "evaluate.attacks.square.rule: square expects attack.threat.norm linf",
        ),
        (("evaluate", "draws"), 11, "evaluate.draws: expected <= attack.sequential.first = 10"),
        (("evaluate", "images"), 501, "evaluate.images: expected <= attack.pgd.images = 500"),
        (
            ("evaluate", "attacks", "exact", "gradient"),
            "none",
            "gradient: rule pgd expects identity, exact or smoothed, got none",
        ),
        (
            ("evaluate", "attacks", "square", "gradient"),
            "exact",
            "gradient: rule square expects none, got exact",
        ),
        (("evaluate", "active_test", "attack"), "nothing", "active_test.attack: expected one of"),
        (
            ("evaluate", "active_test", "attack"),
            "no_attack",
            "evaluate.active_test.attack: expected one with a radius",
        ),
        (("inspect", "long_steps"), 50, "langevin.K: expected <= inspect.long_steps = 50, got 60"),
        (("data", "digits", "shape", "classes"), 2, None),
    ],
)
def test_attacks_that_cannot_be_run_are_said_before_any_work(
    where: tuple[str, ...], value: object, message: str | None
) -> None:
    values: Any = yaml.safe_load(presets.text("digits"))
    section = values
    for name in where[:-1]:
        section = section[name]
    section[where[-1]] = value
    if message is None:
        values["evaluate"]["attacks"]["apgd"]["loss"] = "dlr"
        message = "evaluate.attacks.apgd.loss: dlr expects at least 3 classes, got 2"
    with pytest.raises(StageError) as error:
        validate_params(values, Path("params.yaml"))
    assert message in str(error.value)


def test_the_name_of_an_attack_is_not_taken_twice() -> None:
    values: Any = yaml.safe_load(presets.text("digits"))
    values["evaluate"]["attacks"]["pgd"] = values["evaluate"]["attacks"]["exact"]
    with pytest.raises(StageError, match="'pgd' is the name of another attack"):
        validate_params(values, Path("params.yaml"))


@pytest.mark.parametrize(
    "line", ["--params {} check-params", "check-params --params {}", "check-params --params={}"]
)
def test_common_options_may_stand_anywhere(tmp_path: Path, line: str) -> None:
    result = CliRunner().invoke(app, line.format(tmp_path / "none.yaml").split())
    assert result.exit_code == 2
    assert "none.yaml: no such file" in result.output


def test_a_common_option_without_a_value_is_said() -> None:
    result = CliRunner().invoke(app, ["check-params", "--params"])
    assert result.exit_code == 2
    assert "--params: expected a value" in result.output


def test_the_help_of_a_command_says_where_the_common_options_are() -> None:
    assert "stochsec --help" in CliRunner().invoke(app, ["attack", "--help"]).output


def test_an_attack_may_be_for_one_energy_and_corners_are_smoothed_where_there_are_some() -> None:
    attacks = validate_params(tiny_params(), Path("params.yaml")).evaluate.attacks
    exact = attacks["exact"].model_copy(update={"energy": "smooth_convergent"})
    assert exact.left_out("smooth_convergent", corners=False) is None
    assert exact.left_out("convergent", corners=True) == "it is for the energy smooth_convergent"
    assert attacks["exact"].left_out("convergent", corners=True) is None
    assert attacks["smoothed"].left_out("convergent", corners=True) is None
    assert "no corners" in str(attacks["smoothed"].left_out("smooth_convergent", corners=False))
