"""Small copies of the records, kept in git beside the report to make the report again.

Attacked images take nearly all bytes of a record, and no table or figure shows them. They are
removed, after their largest distance from the natural images is stored. States of chains, which
figures show, become uint8. Verdicts, logits, energies and conditions are unchanged.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stages import StageError
from stages.core.artifacts import load_tensors, save_tensors
from stages.core.files import fingerprint, visible
from stages.core.params import Params
from stages.core.records import KEPT, AttackResult
from stages.reporting.provenance import IMPORTED


@contextmanager
def together(params: Params, root: Path, before: Path, after: Path) -> Iterator[Path]:
    """A temporary folder with the records of ``root``, and those of ``before`` that it lacks.

    The folder has the layout of ``root`` and is deleted with the context. All these records are
    also written to the new folder ``after``, to be kept.
    """
    if before.is_dir():
        shutil.copytree(before, after)
    after.mkdir(parents=True, exist_ok=True)
    own, mine = root / f"artifacts/{params.run}/records", dict[str, str]()
    if (own / IMPORTED).exists():
        shutil.copyfile(own / IMPORTED, after / IMPORTED)
    for dataset in params.datasets:
        for path in visible(own / dataset, "*"):
            place = after / path.relative_to(own)
            place.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors":
                keep(params, dataset, path, place)
                mine[str(path.relative_to(own))] = str(path)
            elif path.suffix == ".csv":
                shutil.copyfile(path, place)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / f"artifacts/{params.run}/records"
        shutil.copytree(after, whole)
        for path in whole.rglob("*.safetensors"):
            restore(path)
        try:
            yield Path(folder)
        except StageError as error:  # about a copy: name the file that it is a copy of
            said = str(error)
            for name, source in mine.items():
                said = said.replace(str(whole / name), source)
            raise StageError(said.replace(str(whole), str(before))) from None


def keep(params: Params, dataset: str, path: Path, out: Path) -> None:
    """A record of a dataset without its pixels."""
    tensors, about = load_tensors(path)
    about[KEPT] = {"sha256": fingerprint(path)}
    if "adversarial" in tensors:
        try:
            about[KEPT]["farthest"] = AttackResult.load(path).farthest()
        except StageError as error:
            raise StageError(f"{path}: {error}") from None
        tensors |= {name: tensors[name][:, :0] for name in ("images", "adversarial")}
    else:
        section = params.dataset(dataset)
        shape = section.shape.image
        states = [name for name, value in tensors.items() if value.shape[-3:] == shape]
        for name in states:
            tensors[name] = (127.5 * (tensors[name] + 1)).round().clamp(0, 255).to(torch.uint8)
        about[KEPT]["states"] = states
    save_tensors(out, tensors, about)


def restore(path: Path) -> None:
    """Turn the bytes of a record that was kept into states in net range, as figures show them."""
    tensors, about = load_tensors(path)
    for name in about[KEPT].get("states", []):
        tensors[name] = tensors[name] / 127.5 - 1
    save_tensors(path, tensors, about)
