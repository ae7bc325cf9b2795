"""Records in git, beside the report: what it takes to make the report again, without the pixels.

Attacked images are nearly all of a record's bytes and no table or figure shows them, so they are
left out; how far they lie from the natural ones is measured before and stays. States of chains, of
which figures show some, become bytes. Verdicts, logits, energies and conditions are as they were.
"""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from stages import StageError
from stages.artifacts import load_tensors, save_tensors
from stages.files import fingerprint, visible
from stages.params import Params
from stages.provenance import IMPORTED
from stages.records import KEPT, AttackResult


@contextmanager
def together(params: Params, root: Path, before: Path, after: Path) -> Iterator[Path]:
    """A folder with the records of ``root`` and, where it has none, those kept in ``before``.

    It is a root like ``root``, and lives as long as the context. The new folder ``after`` keeps
    them all.
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
