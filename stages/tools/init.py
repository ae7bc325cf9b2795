"""A folder to work in, for somebody who installed the package and has no checkout."""

import shutil
import subprocess
from pathlib import Path

from stages import StageError
from stages.core import presets
from stages.core.console import say
from stages.core.files import NETWORK_TIMES, WORKFLOW, Whole, visible, write_text

IGNORED_BY_GIT = "/artifacts/\n/.scratch/\n/data/\n/dvc_plots/\n"
IGNORED_BY_DVC = "__pycache__/\n.scratch/\n"
SETTINGS = "[core]\n    analytics = false\n    check_update = false\n"
WITHOUT_GIT = "    no_scm = true\n"
CODE_DEPS = "    deps:\n    - defense\n    - stages\n"
NO_DEPS = """\
    always_changed: true  # the packages are installed elsewhere, where DVC does not look
"""


def run(folder: Path) -> None:
    """Lay out dvc.yaml, params.yaml (digits), presets, DVC's settings; nothing is overwritten."""
    names = ("dvc.yaml", "params.yaml", "presets", ".dvc", ".dvcignore", str(NETWORK_TIMES))
    taken = [name for name in names if (folder / name).exists()]
    if taken:
        raise StageError(f"{folder / taken[0]}: is there already, so nothing is laid out here")
    graph = (WORKFLOW / "dvc.yaml").read_text()
    if CODE_DEPS not in graph:
        raise StageError(f"{WORKFLOW / 'dvc.yaml'}: has no stage code that can be adapted")
    for name in ("presets", str(NETWORK_TIMES)):
        for path in visible(WORKFLOW / name, "*"):
            with Whole(folder / name / path.relative_to(WORKFLOW / name)) as partial:
                shutil.copyfile(path, partial)
    write_text(folder / "dvc.yaml", graph.replace(CODE_DEPS, NO_DEPS))
    write_text(folder / "params.yaml", presets.text(presets.BASE))
    write_text(folder / ".dvcignore", IGNORED_BY_DVC)
    write_text(folder / ".dvc/config", SETTINGS + ("" if in_git(folder) else WITHOUT_GIT))
    if not (folder / ".gitignore").exists():
        write_text(folder / ".gitignore", IGNORED_BY_GIT)
    say(
        f"{folder}: laid out for the digits; `dvc repro` there runs them, `stochsec preset NAME` "
        f"chooses another experiment ({', '.join(presets.names())})"
    )


def in_git(folder: Path) -> bool:
    """Whether a folder belongs to a git repository."""
    try:
        ask = subprocess.run(
            ["git", "-C", str(folder), "rev-parse", "--git-dir"], capture_output=True, check=False
        )
    except OSError:
        return False
    return ask.returncode == 0
