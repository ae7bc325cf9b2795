"""What an edit makes DVC run again, and what it does not."""

import ast
import shutil
import tokenize
from pathlib import Path

import pytest

from stages import code
from stages.core import dependencies
from tests.tiny import ROOT

SOURCE = '''"""About the module."""

import math  # of the standard library


def area(radius: float) -> float:
    """Of a circle."""
    label = f"{radius:.1f} {math.pi}"  # shown
    return math.pi * radius**2  # pi r^2
'''


def tokens(text: str) -> list[str]:
    return list(dependencies.significant(text))


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("# shown", "# not shown"),
        ("  # pi r^2", ""),
        ("Of a circle.", "Of a disc,\n\n    in square metres.\n    "),
        ('"""About the module."""\n', ""),
        ("\n\n\ndef", "\n\n\n\n\n# the mathematics\ndef"),
        ("math.pi * radius**2", "math.pi  *  radius ** 2"),
    ],
)
def test_what_no_number_depends_on_does_not_count(old: str, new: str) -> None:
    assert old in SOURCE
    assert tokens(SOURCE.replace(old, new)) == tokens(SOURCE)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("radius**2", "radius**3"),
        ("{radius:.1f}", "{radius:.2f}"),
        ("{math.pi}", "{math.tau}"),
        ("    return", "return"),
        ("import math", "import cmath"),
        ("label = f", 'label = "x" + f'),
    ],
)
def test_what_a_number_may_depend_on_counts(old: str, new: str) -> None:
    assert old in SOURCE
    assert tokens(SOURCE.replace(old, new)) != tokens(SOURCE)


def test_an_f_string_is_one_token_as_in_every_version_of_python() -> None:
    text = 'f"{radius:.1f} {math.pi}"'
    assert text in tokens(SOURCE)
    nested = "x = f\"{a} {f'{b}'}\" f'''c\n{d}'''\n"
    assert tokens(nested) == ["x", "=", "f\"{a} {f'{b}'}\"", "f'''c\n{d}'''", "\n"]
    assert hasattr(tokenize, "FSTRING_START") == (dependencies.FSTRING[0] is not None)


def test_a_string_that_is_used_is_no_docstring() -> None:
    assert '"kept"' in tokens('def f():\n    return "kept"\n')
    assert '"kept"' in tokens('"kept".upper()\n')
    assert tokens('class A:\n    x = 1\n    """About x."""\n') == tokens("class A:\n    x = 1\n")


@pytest.fixture
def edited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """``edited("defense/langevin.py", old, new)``: the stages whose file that changes."""
    for name in ("defense", "stages"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for module in (code, dependencies):
        monkeypatch.setattr(module, "ROOT", tmp_path)

    def written() -> dict[str, str]:
        dependencies.imports.cache_clear()
        dependencies.fingerprint.cache_clear()
        code.run(tmp_path / "code")
        return {path.stem: path.read_text() for path in (tmp_path / "code").iterdir()}

    before = written()

    def edit(module: str, old: str, new: str) -> set[str]:
        path = tmp_path / module
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
        after = written()
        return {name for name in before if before[name] != after[name]}

    yield edit
    dependencies.imports.cache_clear()
    dependencies.fingerprint.cache_clear()


TRAINING = {"train_classifier", "train_ebm", "prepare_data"}


def test_a_comment_in_the_chain_changes_nothing(edited) -> None:
    assert (
        edited("defense/langevin.py", "from collections", "# A comment.\nfrom collections") == set()
    )


def test_the_chain_changes_everything_that_runs_one(edited) -> None:
    changed = edited("defense/langevin.py", "x = x - gradient", "x = x - 2 * gradient")
    assert {"train_ebm", "attack", "evaluate", "compare", "inspect", "fid"} <= changed
    assert not {"prepare_data", "train_classifier"} & changed


def test_a_caption_changes_the_report_alone(edited) -> None:
    assert edited("stages/reporting/captions.py", "CAPTIONS", "CAPTIONS") == set()
    captions = (ROOT / "stages/reporting/captions.py").read_text()
    word = next(word for word in captions.split('"')[3].split() if len(word) > 5)
    assert edited("stages/reporting/captions.py", word, word.upper()) <= {"report", "publish"}


def test_an_attack_changes_no_training(edited) -> None:
    changed = edited("defense/attack.py", "NEVER = -1", "NEVER = -2")
    assert {"attack", "evaluate", "report"} <= changed
    assert not TRAINING & changed


@pytest.mark.parametrize(
    ("module", "old", "new"),
    [
        ("stages/core/params.py", '"norm": section.threat.norm', '"NORM": section.threat.norm'),
        ("stages/core/hardware.py", "default = 200", "default = 100"),
        ("stages/core/artifacts.py", "images.ndim != 4", "images.ndim != 5"),
    ],
)
def test_what_bears_numbers_changes_what_depends_on_it(edited, module, old, new) -> None:
    assert {"attack", "train_ebm", "compare"} <= edited(module, old, new)


def test_what_a_person_sees_changes_nothing(edited) -> None:
    assert edited("stages/core/console.py", "log_every = 15.0", "log_every = 20.0") == set()


@pytest.mark.parametrize("data", dependencies.DATA.values())
def test_data_that_a_module_reads_changes_the_report(edited, data) -> None:
    text = (ROOT / data).read_text()
    changed = edited(data, text[:9], f"{text[:9]} ")
    assert ("systems_report" if "systems" in data else "report") in changed
    assert not (TRAINING | {"attack", "compare", "systems_attack"}) & changed


def test_what_a_package_does_when_it_is_imported_is_seen(edited) -> None:
    """`defense` only hands on names; what `stages` holds is in the code of every stage."""
    assert {"attack", "report"} <= edited("stages/__init__.py", "TIME_IS_UP = 75", "TIME_IS_UP = 7")
    _, *body = ast.parse((ROOT / "defense/__init__.py").read_text()).body
    assert all(isinstance(node, ast.ImportFrom | ast.Assign) for node in body)
    assert [ast.unparse(n.targets[0]) for n in body if isinstance(n, ast.Assign)] == ["__all__"]


def test_other_peoples_modules_are_not_ours(edited, tmp_path) -> None:
    """Installed, both packages lie beside torch."""
    (tmp_path / "torch/nn").mkdir(parents=True)
    (tmp_path / "torch/nn/functional.py").write_text("")
    assert "import torch.nn.functional" in (tmp_path / "defense/losses.py").read_text()
    dependencies.imports.cache_clear()
    assert dependencies.imports("defense/losses.py") == frozenset()
