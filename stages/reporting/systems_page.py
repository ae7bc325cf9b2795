"""The page of the report on systems: one file that a browser shows without a network."""

from pathlib import Path

import torch

from stages.core.files import write_text
from stages.core.params import Params
from stages.reporting.page import embedded, template
from stages.reporting.provenance import here

TEMPLATE = Path(__file__).with_suffix(".html")


def write(
    params: Params,
    table: tuple[list[str], list[list[str]]],
    findings: list[str],
    flags: list[str],
    out: Path,
) -> None:
    """``out``/index.html from the table (head, rows), the findings and the figures in ``out``."""
    page = template(TEMPLATE).render(
        params=params,
        written=(out / "params.yaml").read_text(),
        head=table[0],
        rows=table[1],
        findings=findings,
        flags=flags,
        arrows=embedded(out / "arrows.png", ""),
        costs=embedded(out / "costs.png", ""),
        here=here(torch.device("cpu")),
    )
    write_text(out / "index.html", page)
