"""The package without a checkout: the wheel is whole, and lays out a folder that works."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

from stages.core.files import NETWORK_TIMES
from tests.tiny import ROOT, command, tiny_params

BIN = Path(sys.executable).parent


def run(folder: Path, *words: str, **more: str) -> subprocess.CompletedProcess[str]:
    path = f"{BIN}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, **more}
    return subprocess.run(words, cwd=folder, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the built wheel is unpacked: its packages and what is in them, nothing else."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    for name in ("defense", "stages", "presets", NETWORK_TIMES):
        shutil.copytree(ROOT / name, source / name)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "dvc.yaml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = "from setuptools import build_meta; print(build_meta.build_wheel('dist'))"
    result = run(source, sys.executable, "-c", code)
    assert result.returncode == 0, result.stderr
    (wheel,) = (source / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(built)
    assert {"stages/reporting/page.html", "stages/reporting/published.csv"} <= set(names)
    assert any(name.endswith("dist-info/licenses/LICENSE") for name in names)
    return built


def test_a_wheel_lays_out_an_experiment_that_dvc_runs(installed: Path, tmp_path: Path) -> None:
    here = {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    stochsec = (sys.executable, "-m", "stages")
    laid = run(tmp_path, *stochsec, "init", "lab", **here)
    assert laid.returncode == 0, laid.stderr
    folder = tmp_path / "lab"
    listed = run(folder, *stochsec, "preset", **here)
    assert "presets: check, cifar10, digits, h100, paper" in listed.stderr
    (folder / "params.yaml").write_text(yaml.safe_dump(tiny_params()))
    made = run(folder, "dvc", "repro", "train_classifier", **here)
    assert made.returncode == 0, made.stdout + made.stderr
    assert (folder / "artifacts/tiny/models/digits/classifier.safetensors").exists()
    again = run(folder, "dvc", "repro", "train_classifier", **here)
    ran = [line for line in again.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'code':"], "it looks whether the packages are others now"
    graph = yaml.safe_load((folder / "dvc.yaml").read_text())["stages"]
    deps = {dep for stage in graph.values() for dep in stage.get("deps", [])}
    lacking = {d for d in deps if not d.startswith("artifacts/") and not (folder / d).exists()}
    assert not lacking


def test_nothing_is_laid_out_over_something(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init lab").exit_code == 0
    before = {path: path.read_bytes() for path in Path("lab").rglob("*") if path.is_file()}
    result = command("init lab")
    assert result.exit_code == 2
    assert "is there already" in result.output
    after = {path: path.read_bytes() for path in Path("lab").rglob("*") if path.is_file()}
    assert after == before


def test_presets_of_the_folder_come_before_those_of_the_package(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert command("init lab").exit_code == 0
    monkeypatch.chdir(tmp_path / "lab")
    preset = Path("presets/digits.yaml")
    preset.write_text(preset.read_text().replace("seed: 0 ", "seed: 7 "))
    assert command("preset digits --force").exit_code == 0
    assert yaml.safe_load(Path("params.yaml").read_text())["seed"] == 7
