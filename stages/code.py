"""Stage 0: one small file for each stage, which changes when its code does."""

from pathlib import Path

from stages.core.dependencies import code_of
from stages.core.files import ROOT, write_text

PARAMS = "stages/core/params.py"


def run(out: Path) -> None:
    """Write STAGE.txt for every stage, and params.txt for the check of the parameters.

    Those of the workflow on other defenses are called systems_STAGE.txt.
    """
    write_text(out / "params.txt", code_of(PARAMS))
    for room in ("", "systems/"):
        for path in sorted((ROOT / "stages" / room).glob("*.py")):
            if "\ndef run(" in path.read_text():
                name = f"{room.replace('/', '_')}{path.stem}"
                write_text(out / f"{name}.txt", code_of(f"stages/{room}{path.name}"))
