"""The modules that each stage imports, with hashes: what DVC and resumed work look at.

A stage has to run again when code changes that its result depends on, and only then. So a stage of
dvc.yaml depends on one file, artifacts/code/STAGE.txt. It lists the modules that the stage imports,
directly or through others, each with a hash of its tokens: comments, docstrings and blank lines do
not count. A file of data that a module reads from the package is hashed as it is. The stage `code`
writes these files anew after any edit, in a second, and whatever finds its own file unchanged does
not run.
"""

import ast
import hashlib
import io
import tokenize
from collections.abc import Callable, Iterator
from functools import cache

from stages.core.files import ROOT

SEEN_ONLY = frozenset({"stages/core/console.py"})  # what a person sees while a stage works
DATA = {
    "stages/reporting/page.py": "stages/reporting/page.html",
    "stages/reporting/systems_page.py": "stages/reporting/systems_page.html",
    "stages/reporting/tables.py": "stages/reporting/published.csv",
}
LAYOUT = {
    tokenize.NEWLINE: "\n",
    tokenize.INDENT: "\t",
    tokenize.DEDENT: "\b",
}
LEFT_OUT = {tokenize.COMMENT, tokenize.NL, tokenize.ENCODING, tokenize.ENDMARKER}
FSTRING = tuple(getattr(tokenize, f"FSTRING_{end}", None) for end in ("START", "END"))


def code_of(module: str) -> str:
    """The modules that one imports, itself included, a line each with its hash."""
    modules = closure(module)
    files = modules | {DATA[name] for name in modules & DATA.keys()}
    return "".join(f"{fingerprint(name)}  {name}\n" for name in sorted(files))


def code_behind(function: Callable[..., object]) -> str:
    """`code_of` the module that defines a function; nothing for one that is not in our tree."""
    module = f"{function.__module__.replace('.', '/')}.py"
    return code_of(module) if (ROOT / module).is_file() else ""


def closure(module: str) -> set[str]:
    """From "stages/attack.py": all modules of ours that it imports, directly or through others."""
    seen = set[str]()
    todo = {module}
    while todo:
        seen |= todo
        todo = set[str]().union(*map(imports, todo)) - seen - SEEN_ONLY
    return seen


@cache
def imports(module: str) -> frozenset[str]:
    """The modules of this repository that a module imports anywhere in its source."""
    names = set[str]()
    for node in ast.walk(ast.parse((ROOT / module).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    ours = {name for name in names if name.partition(".")[0] in ("defense", "stages")}
    paths = {name.replace(".", "/") for name in ours}
    files = {f"{path}.py" for path in paths} | {f"{path}/__init__.py" for path in paths}
    return frozenset(file for file in files if (ROOT / file).exists())


@cache
def fingerprint(file: str) -> str:
    """The first half of the sha256 of a module's tokens, or of a file of data."""
    text = (ROOT / file).read_text()
    if file.endswith(".py"):
        text = "\0".join(significant(text))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def significant(source: str) -> Iterator[str]:
    """The tokens of a source but for comments, docstrings and blank lines.

    An f-string counts as one token, as in Python 3.11. Python 3.12 splits it, and the tokens must
    not depend on the version.
    """
    lines = source.splitlines(keepends=True)
    fresh = True  # at the beginning of a statement
    pending: str | None = None  # a string that is a docstring if nothing follows it
    depth, start = 0, (0, 0)
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind, text = token.type, token.string
        if kind == FSTRING[0]:
            start, depth = (token.start if depth == 0 else start), depth + 1
            continue
        if kind == FSTRING[1]:
            depth -= 1
            kind, text = tokenize.STRING, between(lines, start, token.end)
        if depth or kind in LEFT_OUT:
            continue
        if kind == tokenize.STRING and fresh:
            pending, fresh = text, False
            continue
        if pending is not None and kind != tokenize.NEWLINE:
            yield pending
        if pending is None or kind != tokenize.NEWLINE:
            yield LAYOUT.get(kind, text)
        pending, fresh = None, kind in LAYOUT


def between(lines: list[str], start: tuple[int, int], end: tuple[int, int]) -> str:
    """The text from (row, column) to (row, column); rows count from 1."""
    if start[0] == end[0]:
        return lines[start[0] - 1][start[1] : end[1]]
    inner = lines[start[0] : end[0] - 1]
    return "".join([lines[start[0] - 1][start[1] :], *inner, lines[end[0] - 1][: end[1]]])
