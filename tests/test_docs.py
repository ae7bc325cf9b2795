"""The documentation: commands parse, examples work, the site builds and is whole."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml

from stages.cli import app
from stages.core import presets
from stages.core.params import validate_params
from tests.test_readme import PAGES, ROOT
from tests.test_workflow import GRAPH

DOCS = ROOT / "docs"
TUTORIAL = (DOCS / "tutorial.md").read_text()
GROUP = typer.main.get_command(app)
LINES = {
    line for _, page in PAGES for line in re.findall(r"^(?: {4}|\$ )?stochsec (.+)$", page, re.M)
}


def run(*words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)


def test_every_parameter_is_explained_where_it_stands() -> None:
    for line in filter(None, presets.text(presets.BASE).splitlines()):
        heading = line.endswith(":")
        named_attack = "{rule: " in line  # all of them together, above the first
        assert heading or named_attack or re.search(r"#  ?\S", line), line


@pytest.mark.parametrize("line", sorted(LINES))
def test_command_lines_parse(line: str) -> None:
    name, *words = shlex.split(line, comments=True)
    if "--help" not in (name, *words):
        whole = GROUP.make_context("stochsec", [name, *words])  # takes the common options out
        name, *words = [*whole._protected_args, *whole.args]
        GROUP.commands[name].make_context(name, words)


def test_stages_that_the_tutorial_names_are_in_the_graph() -> None:
    named = re.findall(r"`([a-z_]+)`", TUTORIAL.split("## What is running")[1].split("\n## ")[0])
    assert len(named) > 10
    assert set(named) <= GRAPH.keys()


def test_the_tutorials_params_are_valid_among_those_of_digits() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", TUTORIAL, re.S)
    changes, whole = yaml.safe_load(block), yaml.safe_load(presets.text("digits"))
    changes["data"]["mine"] = whole["data"]["digits"] | changes["data"]["mine"]
    assert validate_params(whole | changes, Path("params.yaml")).datasets == ("mine",)


def test_the_tutorials_code_writes_a_classifier_that_is_accepted(tmp_path: Path) -> None:
    from stages.core.classifiers import load_classifier
    from stages.core.hardware import Hardware
    from stages.core.params import load_params

    (code,) = re.findall(r"```python\n(.*?)```", TUTORIAL, re.S)
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    params = load_params(ROOT / "params.yaml")
    load_classifier(params, "digits", Hardware.choose("cpu"), tmp_path / "mine.pt2")


def test_the_site_builds_without_a_warning_and_stands_alone(tmp_path: Path) -> None:
    result = run("mkdocs", "build", "--strict", "--site-dir", str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert "WARNING" not in result.stderr
    for page in DOCS.glob("*.md"):
        html = (tmp_path / page.with_suffix(".html").name).read_text()
        assert not re.search(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//", html)
        assert not re.search(r"<link[^>]+rel=\"?(?:stylesheet|preconnect)[^>]+//", html)
        for source in re.findall(r"<img[^>]+src=\"?([^\" >]+)", html):
            assert (tmp_path / source).is_file(), source
    commands = (tmp_path / "commands.html").read_text()
    for name, command in GROUP.commands.items():
        section = commands.split(f'<h3 id="stochsec-{name}">')[1].split("<h3 ")[0]
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or parameter.opts[0] in section


def test_the_method_on_one_page_runs_and_stays_on_one(capsys) -> None:
    """In small: what it prints then means nothing."""
    source = (ROOT / "example.py").read_text()
    assert len(source.splitlines()) < 100
    for whole, small in (
        ("K = 50", "K = 2"),
        ("range(15)", "range(1)"),
        ("range(700)", "range(2)"),
    ):
        assert source.count(whole) == 1
        source = source.replace(whole, small)
    exec(compile(source, "example.py", "exec"), {})
    header, bare, defended = capsys.readouterr().out.splitlines()
    assert header.endswith("BPDA+EOT")
    assert bare.startswith("bare classifier")
    assert defended.startswith("with 2 Langevin steps")
