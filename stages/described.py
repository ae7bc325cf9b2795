"""What the models and the presets say of the parameters: what is allowed, and the comments."""

import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml
from ruamel.yaml import YAML

from stages.params import Params
from stages.sections import NAME

ANY = "<name>"
"""In place of a key that users choose, such as that of a dataset."""

SHAPES = {NAME: "lower-case letters, digits and underscores"}
KINDS = {"integer": "whole number", "boolean": "`true` or `false`", "string": "text"}
LIMITS = {"minimum": "{} or more", "exclusiveMinimum": "above {}"}
LIMITS |= {"maximum": "at most {}", "exclusiveMaximum": "below {}"}
SCHEMA: dict[str, Any] = Params.model_json_schema()

Key = tuple[str, ...]
Written = dict[Key, tuple[Any, str]]
"""A params file: every key with its value, as it is written there, and its comment."""


class Section(NamedTuple):
    """One section, without those inside it."""

    key: Key
    says: str  # the docstring of its model
    leaves: dict[Key, str]  # its parameters, and what each may be


def sections(schema: Any = SCHEMA, key: Key = ()) -> Iterator[Section]:
    """Every section of params.yaml, in the order of the models."""
    named = schema.get("patternProperties") or {"": schema.get("additionalProperties")}
    inside = schema.get("properties", {ANY: next(iter(named.values()))})
    leaves = {(*key, name): words(child) for name, child in inside.items() if not _within(child)}
    yield Section(key, schema.get("description", "").replace("``", "`"), leaves)
    for name, child in inside.items():
        if section := _within(child):
            yield from sections(section, (*key, name))


def _within(schema: Any) -> Any:
    """The section that a schema describes, or None if it is that of a value."""
    for option in schema.get("anyOf", [schema]):
        resolved = SCHEMA["$defs"].get(option.get("$ref", "").split("/")[-1], option)
        if resolved.get("type") == "object":
            return resolved
    return None


def words(schema: Any) -> str:
    """What a value may be."""
    if "anyOf" in schema:
        return "; or ".join(map(words, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        *most, last = [f"`{value}`" for value in schema.get("enum", [schema.get("const")])]
        return " or ".join(filter(None, [", ".join(most), last]))
    if schema["type"] == "array":
        return f"list of {schema.get('minItems', 0)} or more: {words(schema['items'])}"
    if "pattern" in schema:
        return SHAPES.get(schema["pattern"], f"text that matches `{schema['pattern']}`")
    kind = KINDS.get(schema["type"], schema["type"].replace("null", "`null`"))
    return ", ".join([kind, *(LIMITS[k].format(schema[k]) for k in LIMITS if k in schema)])


def read(text: str) -> Written:
    """A params file. A comment stands beside its key, with further lines as deep, or above it."""
    found, above = {}, ""
    for key, value, token in _walk(YAML().load(text), yaml.load(text, yaml.BaseLoader)):
        beside: list[str] = []
        below: list[str] = []
        for line in token.value.splitlines() if token else ():
            deep = not beside or len(line) - len(line.lstrip()) >= token.column
            (beside if deep else below).append(line.strip().removeprefix("#"))
        found[key] = value, _plain(" ".join([above, *beside]))
        above = " ".join(below)
    return found


def header(text: str) -> str:
    """What stands at the head of a params file, in Markdown: its indented lines are a list."""
    comment = YAML().load(text).ca.comment
    head = "".join(token.value.removeprefix("# ") for token in (comment[1] if comment else ()))
    lines = [""]
    for line in re.sub(r"\n {3,}", " ", head).splitlines():
        if line.startswith("  ") is not lines[-1].startswith("- "):
            lines.append("")
        item = f"- {re.sub(' {2,}', ': ', line.strip())}"
        lines.append(_plain(item if line.startswith("  ") else line))
    return "\n".join(lines).strip()


def meaning(key: Key, file: Written) -> str:
    """The first comment on a key, under whichever name it stands."""
    return next((text for k, (_, text) in file.items() if text and fits(key, k)), "")


def fits(key: Key, other: Key) -> bool:
    """Is the other key this one, with a name in place of every `ANY`?"""
    return len(key) == len(other) and all(a in (ANY, b) for a, b in zip(key, other, strict=True))


def _walk(section: Any, plain: Any, key: Key = ()) -> Iterator[tuple[Key, Any, Any]]:
    for name, child in section.items():
        value, token = plain[name], (section.ca.items.get(name) or [None] * 3)[2]
        yield (*key, name), f"[{', '.join(value)}]" if isinstance(value, list) else value, token
        if isinstance(child, dict):
            yield from _walk(child, value, (*key, name))


def _plain(text: str) -> str:
    """Text in which Markdown finds nothing but code."""
    parts = " ".join(text.split()).replace("<", "&lt;").split("`")
    parts[::2] = [re.sub(r"\*|\b_|_\b", r"\\\g<0>", part) for part in parts[::2]]
    return "`".join(parts)
