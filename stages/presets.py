"""Presets: `digits` is complete and commented, the others say only what differs from it."""

import io
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap

from stages import StageError
from stages.params import PRESETS, validate_params

BASE = "digits"


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def text(name: str) -> str:
    """A whole params.yaml for a preset, validated, with its comments."""
    if name not in names():
        raise StageError(f"preset: expected one of {names()}, got {name!r}")
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values: CommentedMap = yaml.load((PRESETS / f"{BASE}.yaml").read_text())
    if name != BASE:
        differences: CommentedMap = yaml.load((PRESETS / f"{name}.yaml").read_text())
        _merge(values, differences, name)
    out = io.StringIO()
    yaml.dump(values, out)
    validate_params(YAML(typ="safe", pure=True).load(out.getvalue()), PRESETS / f"{name}.yaml")
    return out.getvalue()


def _merge(base: CommentedMap, differences: CommentedMap, name: str, where: str = "") -> None:
    """Put the differences into the base; only `data` may bring keys that the base has not."""
    for key, value in differences.items():
        if key not in base:
            raise StageError(f"presets/{name}.yaml: {where}{key}: no such parameter")
        if key == "data" or not isinstance(value, CommentedMap):
            base[key] = value
        else:
            _merge(base[key], value, name, f"{where}{key}.")
    base.ca.items.update(differences.ca.items)  # a number's comment comes with it


def refuse_to_lose(path: Path) -> None:
    """`StageError` if a params file is none of the presets: somebody's own values are in it."""
    if path.read_text() not in map(text, names()):
        raise StageError(f"{path}: has values of its own; copy it, or use --force to overwrite it")
