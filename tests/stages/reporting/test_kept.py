"""Records in git: the report is made of them as of the whole ones, and they hold no images."""

import json
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from stages.core.artifacts import load_tensors
from stages.core.files import NETWORK_TIMES, Paths, fingerprint
from stages.core.records import AttackResult
from tests.tiny import command

PATHS = Paths("tiny", "digits")
REPORT = Path("reports/tiny")
KEPT = REPORT / "records/digits"


@pytest.fixture(scope="module")
def reported(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny experiment, with a report that keeps its records."""
    folder = tmp_path_factory.mktemp("kept") / "experiment"
    shutil.copytree(experiment, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        result = command("report --keep")
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def folder(reported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone: what git has of it, and nothing else."""
    shutil.copytree(reported / "reports", tmp_path / "reports")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def contents(report: Path) -> dict[str, bytes]:
    files = (path for path in report.rglob("*") if path.is_file())
    return {str(path.relative_to(report)): path.read_bytes() for path in files}


def test_a_report_can_be_made_again_from_what_it_keeps(folder: Path) -> None:
    before = contents(REPORT)
    result = command(f"report --params {REPORT}/params.yaml")
    assert result.exit_code == 0, result.output
    assert contents(REPORT) == before
    assert not Path("artifacts").exists()


def test_it_says_the_same_as_the_report_of_the_whole_records(
    folder: Path, experiment: Path
) -> None:
    whole, kept = contents(experiment / REPORT), contents(REPORT)
    records = {name for name in kept if name.startswith("records/")}
    pictures = {name for name in whole if "/" in name} | {"index.html"}  # states are bytes in them
    assert kept.keys() - records == whole.keys()
    for name in whole.keys() - pictures:
        assert kept[name] == whole[name], name
    assert (NETWORK_TIMES / "cpu.json").exists()


def test_records_that_are_kept_have_no_images(folder: Path, experiment: Path) -> None:
    theirs = experiment / PATHS.record("pgd").parent
    for whole in theirs.rglob("*.safetensors"):
        place = KEPT / whole.relative_to(theirs)
        (before, _), (after, about) = load_tensors(whole), load_tensors(place)
        assert before.keys() == after.keys()
        assert about["kept"]["sha256"] == fingerprint(whole)
        for name, value in after.items():
            if "adversarial" in before and name in ("images", "adversarial"):
                assert value.numel() == 0
            elif value.shape[-3:] == (1, 8, 8):
                assert value.element_size() == 1, name
            else:
                assert value.equal(before[name]) or value.isnan().any(), name
    assert not list(KEPT.rglob("*.partial"))


def test_a_record_of_ones_own_stands_before_a_kept_one(folder: Path, reported: Path) -> None:
    own = AttackResult.load(reported / PATHS.record("bpda_eot"))
    own.record.broken_at.fill_(0)
    own.save(PATHS.record("bpda_eot"))
    assert command(f"report --params {REPORT}/params.yaml").exit_code == 0
    metrics = json.loads((REPORT / "metrics.json").read_text())["digits"]
    assert metrics["defended_bpda_eot"] == 0
    assert AttackResult.load(KEPT / "bpda_eot.safetensors").record.broken_at.eq(0).all()
    provenance = json.loads((REPORT / "provenance.json").read_text())["records"]
    assert provenance["digits/bpda_eot.safetensors"]["sha256"] == fingerprint(
        PATHS.record("bpda_eot")
    )


def test_what_is_no_attack_of_the_ball_is_not_kept(folder: Path, reported: Path) -> None:
    own = AttackResult.load(reported / PATHS.record("pgd"))
    own.record.adversarial[0] = 2.0
    own.save(PATHS.record("pgd"))
    before = contents(REPORT)
    result = command(f"report --params {REPORT}/params.yaml")
    assert result.exit_code == 2
    assert f"{PATHS.record('pgd')}: adversarial pixels outside [0, 1]" in result.output
    assert contents(REPORT) == before


def test_a_kept_record_of_other_parameters_is_named_where_it_is(folder: Path) -> None:
    params = Path("params.yaml")
    params.write_text((REPORT / "params.yaml").read_text().replace("K: 4", "K: 5", 1))
    result = command("report")
    assert result.exit_code == 2
    assert f"error: {KEPT}" in result.output
    assert "as in params.yaml, got" in result.output


def test_a_kept_record_cannot_be_transferred(folder: Path, reported: Path) -> None:
    shutil.copytree(reported / "artifacts", "artifacts")
    pgd = KEPT / "pgd.safetensors"
    result = command(f"attack digits transfer_K --pgd {pgd} --params {REPORT}/params.yaml")
    assert result.exit_code == 2
    assert f"error: {pgd}: was kept without its images; `stochsec attack" in result.output


def test_a_safetensors_file_may_hold_no_numbers(folder: Path) -> None:
    """What a newer version of the format might refuse."""
    with safe_open(KEPT / "pgd.safetensors", framework="pt") as file:
        assert file.get_tensor("adversarial").shape == (12, 0, 8, 8)
