"""A report folder as one page that needs nothing beside it, and no network."""

import csv
import json
import re
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup, escape

from stages.core.files import write_text
from stages.reporting.tables import NOT_RUN

TEMPLATE = Path(__file__).with_suffix(".html")
VERDICT = re.compile(r"Energy of (.+?), (.+?): (FLAG: )?((?:not )?convergent): (.*)")
GROUPED = 3  # the first columns of attacks.csv, the same for all attacks on one defense


@dataclass(frozen=True)
class Table:
    """A table as text."""

    head: list[str]
    rows: list[list[str]]
    caption: str = ""

    def kind(self, row: list[str]) -> str:
        """Whether a line of Tables 1-3 is published, measured or not run."""
        source = dict(zip(self.head, row, strict=True)).get("Source", "")
        if source == NOT_RUN:
            return "idle"
        return "published" if source.startswith("published") else "measured"

    def groups(self) -> list[tuple[list[str], list[list[str]]]]:
        """Group rows by their first `GROUPED` columns: (these columns, the rest of each row)."""
        grouped = groupby(self.rows, key=lambda row: row[:GROUPED])
        return [(names, [row[GROUPED:] for row in rows]) for names, rows in grouped]


@dataclass(frozen=True)
class Figure:
    """A figure inside the page."""

    name: str
    data: str
    width: int
    height: int
    caption: str

    @property
    def anchor(self) -> str:
        """Its id."""
        return "figure-" + re.sub(r"\W+", "-", self.name)

    @property
    def title(self) -> str:
        """Its name in words."""
        words = re.sub(r"^figure(\d+)_", r"figure \1: ", self.name).replace("_", " ")
        return words[:1].upper() + words[1:]

    @property
    def alt(self) -> str:
        """What it shows, in a sentence; the rest is in the caption."""
        return f"{self.title}. {re.split(r'(?<=[.?]) ', self.caption)[0]}".strip()


def write(out: Path, captions: Mapping[str, str]) -> None:
    """``out``/index.html from the other files of the report folder ``out``, and nothing else.

    ``captions`` has what to see in figures, by a pattern of their names, in the page's order.
    Whatever file is absent is left out, except summary.md.
    """
    params, attacks = text(out / "params.yaml"), text(out / "attacks.md")
    findings = bullets(attacks, "Findings:")
    verdicts = [found.groups("") for line in findings if (found := VERDICT.fullmatch(line))]
    others = [line for line in findings if not VERDICT.fullmatch(line)]
    numbered = {n: table(out / f"table{n}.csv", text(out / f"table{n}.md")) for n in (1, 2, 3)}
    page = template(TEMPLATE, emphasised=emphasised).render(
        params=params,
        values=yaml.safe_load(params) or {},
        summary=piped((out / "summary.md").read_text()),
        metrics=loaded(out / "metrics.json"),
        judged=bool(attacks),
        failed=[line for line in others if "FLAG" in line],
        flagged=[line.partition(": ") for line in bullets(attacks, "Flags:") if line != "none"],
        verdicts=verdicts,
        tables={number: found for number, found in numbered.items() if found},
        attacks=table(out / "attacks.csv", attacks),
        findings=[line for line in others if "FLAG" not in line],
        figures=figures(out / "figures", captions),
        provenance=loaded(out / "provenance.json"),
        not_run=NOT_RUN,
    )
    write_text(out / "index.html", page)


def template(path: Path, **filters: Callable[..., str]) -> Template:
    """A page with Jinja's marks in it, and filters of its own."""
    environment = Environment(
        loader=FileSystemLoader(path.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(filters)
    return environment.get_template(path.name)


def text(path: Path) -> str:
    """The text of a file; empty if it is absent."""
    return path.read_text() if path.exists() else ""


def loaded(path: Path) -> dict[str, Any]:
    """The values of a JSON file; none if it is absent."""
    values: dict[str, Any] = json.loads(text(path) or "{}")
    return values


def table(path: Path, described: str) -> Table | None:
    """A CSV file, and as its caption the first paragraph of its Markdown; None if it is absent."""
    lines = list(csv.reader(text(path).splitlines(keepends=True)))
    if not lines:
        return None
    return Table(lines[0], lines[1:], " ".join(described.split("\n\n")[0].split()))


def piped(markdown: str) -> Table:
    """A table of Markdown, which has a line of dashes under its head."""
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in markdown.splitlines()
        if line.startswith("|")
    ]
    return Table(lines[0], lines[2:])


def bullets(markdown: str, heading: str) -> list[str]:
    """The items of the list under a heading."""
    _, _, after = markdown.partition(f"\n{heading}\n\n")
    return [line.removeprefix("- ") for line in after.split("\n\n")[0].splitlines()]


def figures(folder: Path, captions: Mapping[str, str]) -> list[Figure]:
    """Every figure once: in the order of the captions, then those without."""
    left = {path.stem: path for path in sorted(folder.glob("*.png"))}
    found = []
    for pattern, caption in {**captions, "*": ""}.items():
        for name in [name for name in left if fnmatch(name, pattern)]:
            found.append(embedded(left.pop(name), caption))
    return found


def embedded(path: Path, caption: str) -> Figure:
    """A PNG file as part of the page."""
    png = path.read_bytes()
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    encoded = f"data:image/png;base64,{b64encode(png).decode()}"
    return Figure(path.stem, encoded, width, height, caption)


def emphasised(line: str) -> Markup:
    """Escaped, with ``*words*`` emphasised."""
    return Markup(re.sub(r"\*([^*]+)\*", r"<em>\1</em>", str(escape(line))))
