"""Results that were made on another machine: packed there, checked and reported here."""

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Any

from stages import StageError, report
from stages.artifacts import AttackResult, load_images
from stages.console import say
from stages.files import Paths, Whole, readable, reports
from stages.hardware import Hardware
from stages.params import NAME, TABLE_ATTACKS, Params, load_params
from stages.provenance import IMPORTED, as_yaml, here

MANIFEST, PARAMS = "manifest.json", "params.yaml"


def pack(params: Params, hardware: Hardware, out: Path) -> None:
    """Records, histories and energies of a run in one file, with the hash of each.

    Classifiers, images and training states are too large to travel with every result: the records
    have the hashes of those that they were made of.
    """
    root = Path(f"artifacts/{params.run}")
    kinds = ("records/**/*.safetensors", "records/**/*.csv", "models/*/ebm_*.safetensors")
    files = sorted(path for kind in kinds for path in root.glob(kind))
    if not any(path.is_relative_to(root / "records") for path in files):
        raise StageError(f"{root / 'records'}: no records to export")
    contents = {str(path.relative_to(root)): path.read_bytes() for path in files}
    contents[PARAMS] = as_yaml(params).encode()
    manifest = {
        "run": params.run,
        **here(hardware.device),
        "files": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
    }
    with Whole(out) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(MANIFEST, json.dumps(manifest, indent=2))
        for name, data in contents.items():
            archive.writestr(name, data)
    say(f"export: {out} ({readable(out)}), {len(files)} files of run {params.run}")


def unpack(path: Path, *, force: bool) -> None:
    """Check a file of `pack` as a whole, then put it where the run's results belong.

    Hashes, parameters, conditions, the ball, the box and finiteness; where the images of a dataset
    are here, also that the attacked images are they. Nothing is written if anything is wrong.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = extract(path, root)
        params = load_params(root / PARAMS)
        if params.run != manifest["run"]:
            raise StageError(f"{path}: says run {manifest['run']}, its parameters {params.run}")
        theirs, ours = (base / f"artifacts/{params.run}" for base in (root, Path()))
        if ours.joinpath("records").exists() and not force:
            raise StageError(
                f"{ours / 'records'}: is there already; --force puts the imported files over it"
            )
        check_images(params, root)
        theirs.joinpath("records", IMPORTED).write_text(json.dumps(manifest, indent=2) + "\n")
        report.run(params, root / "report", root)
        shutil.copytree(theirs, ours, dirs_exist_ok=True)
        shutil.rmtree(reports(params.run), ignore_errors=True)
        shutil.copytree(root / "report", reports(params.run))
    say(
        f"import: {reports(params.run)}, made on {manifest['device']} by commit "
        f"{manifest['commit'] or 'unknown'}"
    )


def extract(path: Path, root: Path) -> dict[str, Any]:
    """The files of an archive under ``root``, each with the hash that the manifest says."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest: dict[str, Any] = json.loads(archive.read(MANIFEST))
            stated = dict(manifest["files"])
            if not re.fullmatch(NAME, manifest["run"]):
                raise StageError(f"{path}: {manifest['run']!r} is no name of a run")
            held = set(archive.namelist()) - {MANIFEST}
            if held != stated.keys():
                odd = sorted(held ^ stated.keys())[0]
                raise StageError(f"{path}: {odd}: in the archive or in its manifest, not in both")
            for name, digest in stated.items():
                if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                    raise StageError(f"{path}: {name}: not a path inside a run")
                data = archive.read(name)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise StageError(f"{path}: {name}: its sha256 is not that of the manifest")
                place = root / (name if name == PARAMS else f"artifacts/{manifest['run']}/{name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
    except FileNotFoundError:
        raise StageError(f"{path}: no such file") from None
    except (zipfile.BadZipFile, OSError, KeyError, TypeError, ValueError) as error:
        raise StageError(f"{path}: not a file of `stochsec export` ({error})") from None
    return manifest


def check_images(params: Params, root: Path) -> None:
    """`StageError` if records are of other images than those that are here, where there are any."""
    for dataset in params.datasets:
        here = Paths(params.run, dataset).images
        if not here.exists():
            say(f"import: {here} is not here; which images were attacked is not checked")
            continue
        data = load_images(here, "test", params.dataset(dataset))
        for attack in TABLE_ATTACKS:
            record = Paths(params.run, dataset, root).record(attack)
            if record.exists():
                images = AttackResult.load(record).images
                if not images.images.equal(data.images[: len(images.labels)]):
                    raise StageError(f"{record.name}: its images are not those of {here}")
