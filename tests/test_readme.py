"""README and docs: their table is the report's, links lead somewhere, commands and code run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stages.artifacts import save_weights
from stages.classifiers import new_classifier
from stages.cli import app
from stages.energies import new_energy
from stages.files import Paths
from stages.params import load_params

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EVALUATION = (ROOT / "docs/evaluation.md").read_text()
PAGES = [(ROOT, README), (ROOT / "docs", EVALUATION)]


def test_the_table_is_the_reports() -> None:
    assert (ROOT / "reports/digits/summary.md").read_text() in README


@pytest.mark.parametrize(
    ("folder", "link"),
    [
        (folder, link)
        for folder, page in PAGES
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page)
    ],
)
def test_links_lead_somewhere(folder: Path, link: str) -> None:
    assert (folder / link).exists()


@pytest.mark.parametrize(
    ("module", "name"), sorted(set(re.findall(r"(test_\w+)::(test_\w+)", EVALUATION)))
)
def test_promised_tests_exist(module: str, name: str) -> None:
    assert f"def {name}(" in (ROOT / f"tests/{module}.py").read_text()


def test_every_promise_is_held_or_says_why_not() -> None:
    rows = re.findall(r"^\| (\d+) \| .+? \| (.+) \|$", EVALUATION, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 35))
    assert sum(held.startswith("`test_") for _, held in rows) >= 28
    assert all("::" in held for _, held in rows)


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:defense|stages|presets)/[a-z_/.]+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "line", sorted(set(re.findall(r"^    stochsec (.+)$", README + EVALUATION, re.M)))
)
def test_commands_exist_with_their_options(line: str) -> None:
    words = line.split("#")[0].split()
    if words == ["--help"]:
        return
    result = CliRunner().invoke(app, [words[0], "--help"])
    assert result.exit_code == 0
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in result.output


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README, re.S))
def test_code_runs(code: str, tmp_path: Path) -> None:
    """In a folder with weights of the digits networks where `make tables` leaves them."""
    paths = Paths("digits", "digits", tmp_path)
    params = load_params(ROOT / "params.yaml")
    save_weights(paths.model("classifier"), new_classifier(params, "digits"))
    save_weights(paths.model("ebm_convergent"), new_energy(params, "digits", "convergent"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, env=environment)
    section = params.data["digits"]
    assert f"steps={params.langevin.K}, tau={section.tau}" in code
