"""README and docs: their table is the report's, links lead somewhere, commands and code run."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stages.cli import app
from stages.core import presets
from stages.core.params import validate_params

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
EVALUATION = (ROOT / "docs/evaluation.md").read_text()
PAGES = [(ROOT, README)]
PAGES += [(ROOT / "docs", path.read_text()) for path in sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = "\n".join(page for _, page in PAGES)
RUNS = sorted(path.parent.name for path in (ROOT / "reports").glob("*/summary.md"))


INDEX = (ROOT / "docs/index.md").read_text()


@pytest.mark.parametrize("run", RUNS)
def test_the_first_table_is_the_reports(run: str) -> None:
    """As it is, or as it was committed: other machines make slightly other numbers."""
    path = f"reports/{run}/summary.md"
    committed = subprocess.run(
        ["git", "show", f"HEAD:{path}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    shown = {(ROOT / path).read_text(), committed.stdout} - {""}
    assert any(text in README for text in shown)
    assert any(text in INDEX for text in shown)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize(
    ("folder", "link"),
    [
        (folder, link)
        for folder, page in PAGES
        for link in re.findall(r"\]\((?!http)([^)]+)\)", page)
    ],
)
def test_links_lead_somewhere(folder: Path, link: str) -> None:
    path, _, heading = link.partition("#")
    assert (folder / path).exists()
    words = heading.replace("-", " ")
    assert not heading or re.search(rf"^##+ {words}$", COMMANDS.lower(), re.M)


@pytest.mark.parametrize(
    ("module", "name"), sorted(set(re.findall(r"(test_\w+)::(test_\w+)", EVALUATION)))
)
def test_promised_tests_exist(module: str, name: str) -> None:
    files = (ROOT / "tests").rglob(f"{module}.py")
    assert any(f"def {name}(" in path.read_text() for path in files)


def test_every_promise_is_held_or_says_why_not() -> None:
    rows = re.findall(r"^\| (\d+) \| .+? \| (.+) \|$", EVALUATION, re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 35))
    assert sum(held.startswith("`test_") for _, held in rows) >= 28
    assert all("::" in held for _, held in rows)


def test_named_files_exist() -> None:
    for name in re.findall(r"`((?:defense|stages|presets)/[a-z_/.]+)`", README):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("line", sorted(set(re.findall(r"^    stochsec (.+)$", COMMANDS, re.M))))
def test_commands_exist_with_their_options(line: str) -> None:
    words = line.split("#")[0].split()
    if words == ["--help"]:
        return
    result, common = (CliRunner().invoke(app, [*w, "--help"]) for w in ([words[0]], []))
    assert result.exit_code == 0
    for option in (word for word in words[1:] if word.startswith("--")):
        assert option in result.output + common.output


def test_stages_that_commands_name_are_in_the_graph() -> None:
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"].keys()
    named = re.findall(r"^    stochsec run-all ([a-z_ ]+)", COMMANDS, re.M)
    assert named
    assert {name for names in named for name in names.split()} <= stages


@pytest.mark.parametrize("code", re.findall(r"```python\n(.*?)```", README + EVALUATION, re.S))
def test_code_runs(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_the_readme_secures_with_the_chains_that_were_measured() -> None:
    preset = validate_params(yaml.safe_load(presets.text("cifar10")), Path("cifar10"))
    assert f"LangevinConfig({preset.langevin.K}, tau, denoise=True)" in README
