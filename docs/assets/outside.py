"""Links that leave docs/: the files that they name become a part of the site.

The pages link as a code host needs it, to ../defense/langevin.py or ../reports/digits. Such a file
gets a place under repository/: pictures and pages as they are, Markdown and source as pages. Files
that those link to follow, so that nothing in the site points to nowhere.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
LINK = re.compile(r"(?<=\]\()(?!\w+:|/|#)([^)\s#]+)")
AS_IT_IS = {".png", ".svg", ".jpg", ".html", ".pdf", ".csv", ".json", ".safetensors"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".md": "markdown"}

origins: dict[str, Path] = {}  # pages made of files outside docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add every file that a page links to, and that those link to."""
    origins.clear()
    todo = [DOCS / file.src_uri for file in files.documentation_pages()]
    for source in todo:
        text = source.read_text(encoding="utf-8") if source.suffix == ".md" else ""
        for link in LINK.findall(text):
            path = _named(source, link)
            place = _place(path)
            if DOCS in path.parents or not path.is_file() or files.get_file_from_path(place):
                continue
            if path.suffix in AS_IT_IS:
                files.append(File.generated(config, place, abs_src_path=str(path)))
            else:
                files.append(File.generated(config, place, content=_page(path)))
                origins[place] = path
                todo.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links to where the files are in the site."""
    source = origins.get(page.file.src_uri, DOCS / page.file.src_uri)
    if source.suffix != ".md":
        return markdown
    folder = posixpath.dirname(page.file.src_uri)

    def placed(link: re.Match[str]) -> str:
        path = _named(source, link[1])
        return posixpath.relpath(_place(path), folder) if path.is_file() else link[1]

    return LINK.sub(placed, markdown)


def _named(source: Path, link: str) -> Path:
    """The file that a link means; of a folder its README, as on a code host."""
    path = (source.parent / link).resolve()
    return path / "README.md" if path.is_dir() else path


def _place(path: Path) -> str:
    """Where a file stands in the site's sources."""
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    place = f"repository/{path.relative_to(ROOT).as_posix()}"
    return place if path.suffix in AS_IT_IS else f"{place}.md"


def _page(path: Path) -> str:
    """A page for a text file: Markdown as it is, source as code. The search leaves it out."""
    text, name = path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix()
    if path.suffix != ".md":
        text = f"# {name}\n\n````{LANGUAGES.get(path.suffix, 'text')}\n{text}````\n"
    return f"---\ntitle: {name}\nsearch:\n  exclude: true\n---\n{text}"
