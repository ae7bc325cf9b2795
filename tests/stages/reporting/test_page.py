"""The page of a report: one file that needs no other, made of the folder and nothing else."""

import csv
import json
import re
import shutil
from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

import pytest

from stages.report import CAPTIONS
from stages.reporting.page import write
from tests.tiny import ROOT

VOID = {"meta", "link", "img"}
HOSTILE = "<script>alert('&')</script>\"><img src=http://evil.example/x onerror=x>"


class Page(HTMLParser):
    """What a browser would see: open tags, attributes, text; fails where tags do not balance."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.feed(path.read_text())
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} at {self.getpos()}"
        if tag not in {"b", "em"}:
            self.words.append(" ")

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def of(self, tag: str) -> list[dict[str, str]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture
def report(experiment: Path, tmp_path: Path) -> Path:
    """A copy of the tiny experiment's report."""
    return Path(shutil.copytree(experiment / "reports/tiny", tmp_path / "report"))


def page_of(folder: Path) -> Page:
    write(folder, CAPTIONS)
    return Page(folder / "index.html")


def test_the_page_needs_no_other_file(report: Path) -> None:
    page = page_of(report)
    text = (report / "index.html").read_text()
    assert not page.of("script")
    assert "url(" not in text
    assert "@import" not in text
    for _, attributes in page.tags:
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))
    for path in (report, ROOT, Path.home(), Path.cwd()):
        assert str(path) not in text


def test_the_page_is_a_function_of_the_folder(report: Path, tmp_path: Path) -> None:
    page_of(report)
    first = (report / "index.html").read_bytes()
    page_of(report)
    assert (report / "index.html").read_bytes() == first
    moved = Path(shutil.copytree(report, tmp_path / "elsewhere/of another name"))
    page_of(moved)
    assert (moved / "index.html").read_bytes() == first


def test_every_figure_is_there_once_with_its_caption(report: Path) -> None:
    shutil.copy(report / "figures/evaluation.png", report / "figures/another.png")
    page = page_of(report)
    images = page.of("img")
    shown = [b64decode(image["src"].partition("base64,")[2]) for image in images]
    drawn = [path.read_bytes() for path in (report / "figures").glob("*.png")]
    assert sorted(shown) == sorted(drawn)
    assert len({image["alt"] for image in images}) == len(images)
    for pattern, caption in CAPTIONS.items():
        found = list((report / "figures").glob(f"{pattern}.png"))
        assert found
        assert page.text.count(caption) == len(found)


def test_numbers_flags_and_verdicts_are_there(report: Path) -> None:
    page = page_of(report)
    for name in ("table1", "table2", "table3", "attacks"):
        with (report / f"{name}.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                for column, value in row.items():
                    assert value in page.text, f"{name}: {column}"
    said = (report / "attacks.md").read_text().partition("Flags:\n")[2]
    for line in re.findall("^- (.*)$", said, re.MULTILINE):
        verdict = re.fullmatch("Energy of (.+): (FLAG: not convergent|convergent): (.+)", line)
        expected = "{}: {} {}".format(*verdict.groups()) if verdict else line.replace("FLAG: ", "")
        assert expected in page.text
    classes = [attributes.get("class") for attributes in page.of("tr")]
    assert classes.count("measured") == 3, "one line in Table 1 and two in Table 2"
    assert {"idle", "published"} <= set(classes)


def test_provenance_and_parameters_are_there(report: Path) -> None:
    path = report / "provenance.json"
    provenance = json.loads(path.read_text())
    path.write_text(json.dumps({**provenance, "import": {"commit": "c0ffee", "device": "a GPU"}}))
    page = page_of(report)
    assert "made by commit c0ffee on a GPU" in page.text
    for name, about in provenance["records"].items():
        assert {name, about["sha256"], *about["made of"].values()} <= set(page.text.split())
    assert (report / "params.yaml").read_text() in "".join(page.words)


def test_anchors_and_names_resolve(report: Path) -> None:
    page = page_of(report)
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    anchors = {attributes["href"][1:] for attributes in page.of("a")}
    assert anchors <= set(ids)
    assert anchors >= {"numbers", "flags", "table1", "table2", "table3", "attacks", "figures"}
    labels = {named["aria-labelledby"] for _, named in page.tags if "aria-labelledby" in named}
    assert labels <= set(ids)
    assert all("scope" in attributes for attributes in page.of("th"))
    assert len(page.of("caption")) == len(page.of("table"))
    assert page.of("html") == [{"lang": "en"}]


@pytest.mark.parametrize("name", ["table2.csv", "attacks.csv"])
def test_what_files_say_is_escaped(report: Path, name: str) -> None:
    with (report / name).open(newline="") as file:
        head, *rows = csv.reader(file)
    with (report / name).open("w", newline="") as file:
        csv.writer(file).writerows([head, *([HOSTILE] * len(head) for _ in rows)])
    (report / "params.yaml").write_text(f"run: {json.dumps(HOSTILE)}\n")
    for kind in ("summary.md", "table2.md", "attacks.md"):
        path = report / kind
        path.write_text(path.read_text().replace("a", HOSTILE))
    page = page_of(report)
    assert not page.of("script")
    assert HOSTILE in page.text
    assert all(image["src"].startswith("data:") for image in page.of("img"))


def test_only_the_summary_has_to_be_there(report: Path) -> None:
    alone = report.parent / "alone"
    alone.mkdir()
    shutil.copy(report / "summary.md", alone)
    page = page_of(alone)
    assert "bare classifier, PGD" in page.text
    assert "no attacks.md" in page.text
    assert not page.of("img")
    assert "None" not in page.text


@pytest.mark.parametrize(
    "names",
    [
        ("figures/figure4_accuracy.png", "figures/figure4_samples.png", "provenance.json"),
        ("params.yaml", "metrics.json"),
        ("attacks.md", "table1.csv", "table2.md"),
        ("attacks.csv", "rows.csv"),
    ],
)
def test_what_is_absent_is_left_out(report: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (report / name).unlink()
    page = page_of(report)
    anchors = {attributes["href"] for attributes in page.of("a")}
    assert ("#provenance" in anchors) == ("provenance.json" not in names)
    assert ("#table1" in anchors) == ("table1.csv" not in names)
    assert ("#attacks" in anchors) == ("attacks.csv" not in names)
    assert ("#parameters" in anchors) == ("params.yaml" not in names)


def test_clean_results_say_so(report: Path) -> None:
    path = report / "attacks.md"
    before = path.read_text().partition("Flags:")[0]
    said = "- Energy of digits, convergent: convergent: after 9 steps all is well"
    path.write_text(f"{before}Flags:\n\n- none\n\nFindings:\n\n{said}\n")
    page = page_of(report)
    assert "No attack and no control has a flag." in page.text
    assert "Convergent energies: 1 of 1" in page.text
    assert "FLAG" not in page.text.partition("Table 1")[0]


def test_the_page_of_digits_is_small(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(ROOT / "reports/digits", tmp_path / "digits"))
    page_of(folder)
    assert (folder / "index.html").stat().st_size < 6e6
