"""Stage 0: one small file for each stage, which changes when its code does."""

from pathlib import Path

from stages.core.dependencies import code_of
from stages.core.files import ROOT, write_text

PARAMS = "stages/core/params.py"


def run(out: Path) -> None:
    """Write STAGE.txt for every stage, and params.txt for the check of the parameters."""
    modules = [PARAMS]
    for path in sorted((ROOT / "stages").glob("*.py")):
        if "\ndef run(" in path.read_text():
            modules.append(f"stages/{path.name}")
    for module in modules:
        write_text(out / f"{Path(module).stem}.txt", code_of(module))
