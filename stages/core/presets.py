"""Presets: `digits` is complete and commented, the others say only what differs from their base.

That is digits, or the preset that their line ``base`` names.
"""

import io
from collections.abc import Iterable
from pathlib import Path

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from yaml import YAMLError, safe_load

from stages import StageError
from stages.core.params import presets_folder, validate_params

BASE = "digits"
ATTACKS = "evaluate.attacks."


def names() -> list[str]:
    """The presets there are."""
    return sorted(path.stem for path in presets_folder().glob("*.yaml"))


def text(name: str, changes: Iterable[str] = (), *, unfinished: bool = False) -> str:
    """A whole params.yaml for a preset, with its comments; validated unless it is ``unfinished``.

    ``changes``: values of one's own, each as "langevin.K=2000" with YAML after the first "=".
    """
    yaml = YAML()
    yaml.width = 4096
    yaml.representer.add_representer(
        type(None), lambda dumper, _: dumper.represent_scalar("tag:yaml.org,2002:null", "null")
    )
    values = _whole(yaml, name)
    for change in changes:
        _set(values, change)
    out = io.StringIO()
    yaml.dump(values, out)
    if not unfinished:
        validate_params(safe_load(out.getvalue()), presets_folder() / f"{name}.yaml")
    return out.getvalue()


def _whole(yaml: YAML, name: str) -> CommentedMap:
    """A preset's own values over those of its base."""
    if name not in names():
        raise StageError(f"preset: expected one of {names()}, got {name!r}")
    values: CommentedMap = yaml.load((presets_folder() / f"{name}.yaml").read_text())
    if name == BASE:
        return values
    base = _whole(yaml, values.pop("base", BASE))
    _merge(base, values, name)
    return base


def _set(values: CommentedMap, change: str) -> None:
    """Replace one value; `StageError` if there is none of that name."""
    key, equals, written = change.partition("=")
    *sections, last = key.split(".")
    section = values
    for part in sections:
        section = section.get(part) if isinstance(section, CommentedMap) else None
    if not equals or not isinstance(section, CommentedMap) or last not in section:
        raise StageError(f"set: expected KEY=VALUE with a key of params.yaml, got {change!r}")
    try:
        value = safe_load(written)
    except YAMLError as error:
        raise StageError(f"set: {change}: not valid YAML: {' '.join(str(error).split())}") from None
    if isinstance(value, list):
        value = CommentedSeq(value)
        value.fa.set_flow_style()
    section[last] = value


def _merge(base: CommentedMap, differences: CommentedMap, name: str, where: str = "") -> None:
    """Merge the differences into the base; a ``data`` section drops the datasets it does not name.

    `StageError` for a parameter that the base does not have.
    """
    for key, value in differences.items():
        if where == ATTACKS or (where == "data." and key not in base):
            base[key] = value  # a preset says all of an attack
        elif key not in base:
            raise StageError(f"presets/{name}.yaml: {where}{key}: no such parameter")
        elif isinstance(value, CommentedMap) and base[key] is not None:
            for dataset in [d for d in base[key] if key == "data" and d not in value]:
                del base[key][dataset]
            _merge(base[key], value, name, f"{where}{key}.")
        else:
            base[key] = value
    base.ca.items.update(differences.ca.items)  # a number's comment comes with it


def refuse_to_lose(path: Path) -> None:
    """`StageError` if a params file is none of the presets: somebody's own values are in it."""
    if path.read_text() not in map(text, names()):
        raise StageError(
            f"{path}: differs from every preset; copy it, or use --force to overwrite it"
        )
