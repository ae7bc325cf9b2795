"""Results that were made on another machine: packed there, checked and reported here."""

import hashlib
import json
import re
import shutil
import tempfile
import zipfile
from dataclasses import fields
from pathlib import Path, PurePosixPath
from typing import Any

from defense.nets.pretrained import load_classifier, load_energy
from stages import StageError, report
from stages.core.artifacts import Images, about_of, load_images, load_tensors
from stages.core.console import say
from stages.core.files import KEPT_RECORDS, Paths, Whole, WholeFolder, readable, reports
from stages.core.hardware import Hardware
from stages.core.params import Params, load_params
from stages.core.records import AttackResult, check_networks
from stages.core.sections import NAME
from stages.reporting.provenance import IMPORTED, as_yaml, here

MANIFEST, PARAMS = "manifest.json", "params.yaml"
LARGEST = 16_000_000  # bytes of a classifier that travels; WRN-28-10 has 146 million


def pack(params: Params, hardware: Hardware, out: Path) -> None:
    """Records, histories, energies and classifiers of a run in one file, with the hash of each.

    Images, training states, snapshots and classifiers of more than `LARGEST` bytes do not travel
    with every result: the records have the hashes of those that they were made of.
    """
    root = Path(f"artifacts/{params.run}")
    found = sorted(path for kind in ("records", "models") for path in root.glob(f"{kind}/**/*"))
    files = [path for path in found if belongs(PurePosixPath(path.relative_to(root)))]
    for large in [path for path in files if is_large_classifier(path)]:
        files.remove(large)
        say(f"export: {large} ({readable(large)}) is too large to travel and stays here")
    if not any(path.is_relative_to(root / "records") for path in files):
        raise StageError(f"{root / 'records'}: no records to export")
    if out.exists() and not zipfile.is_zipfile(out):
        raise StageError(f"{out}: is there and no .zip file, so it is not replaced")
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

    Checks hashes, parameters, conditions, norm balls, pixel ranges and finiteness; that records and
    networks belong together; and, if the images of a dataset are here, that they are the ones
    attacked. `StageError` if a check fails; then nothing is written.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        manifest = extract(path, root)
        params = load_params(root / PARAMS)
        if params.run != manifest["run"]:
            raise StageError(f"{path}: says run {manifest['run']}, its parameters {params.run}")
        theirs, ours = (base / f"artifacts/{params.run}" for base in (root, Path()))
        taken = in_the_way(theirs, ours)
        if taken and not force:
            raise StageError(f"{taken[0]}: is there already; --force moves it aside")
        shown = WholeFolder(reports(params.run), "provenance.json")
        theirs.joinpath("records", IMPORTED).write_text(json.dumps(manifest, indent=2) + "\n")
        try:
            check_records(params, theirs)
            kept = reports(params.run) / KEPT_RECORDS
            report.run(params, root / "report", root, kept=kept if kept.is_dir() else None)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as error:
            raise StageError(f"{path}: a record is not what it should be ({error!r})") from None
        if taken:
            say(f"import: what was there is now in {set_aside(taken, ours)}")
        for path in (path for path in theirs.rglob("*") if path.is_file()):
            with Whole(ours / path.relative_to(theirs)) as partial:
                shutil.copyfile(path, partial)
        with shown as partial:
            shutil.copytree(root / "report", partial, dirs_exist_ok=True)
    say(
        f"import: {reports(params.run)}, packed on {manifest['device']} by commit "
        f"{manifest['commit'] or 'unknown'}"
    )


def in_the_way(theirs: Path, ours: Path) -> list[Path]:
    """Existing files that an import would replace.

    These are all records, networks with other weights, and the training states of such networks.
    """
    places = [ours / "records"]
    for weights in theirs.glob("models/*/*.safetensors"):
        mine = ours / weights.relative_to(theirs)
        if mine.exists() and mine.read_bytes() != weights.read_bytes():
            places += [mine, mine.with_suffix(".state.pt")]
    return [place for place in places if place.exists()]


def set_aside(places: list[Path], ours: Path) -> Path:
    """Move files and folders of a run out of the way; where they are now."""
    number = 1
    while (aside := ours / f"own/replaced-{number}").exists():
        number += 1
    for place in places:
        moved = aside / place.relative_to(ours)
        moved.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(place, moved)
    return aside


def extract(path: Path, root: Path) -> dict[str, Any]:
    """The files of an archive under ``root``, each with the hash that the manifest says."""
    try:
        with zipfile.ZipFile(path) as archive:
            manifest: dict[str, Any] = dict(json.loads(archive.read(MANIFEST)))
            stated = dict(manifest["files"])
            if not re.fullmatch(NAME, manifest["run"]):
                raise StageError(f"{path}: {manifest['run']!r} is no name of a run")
            missing = {"commit", "source", "device", "torch"} - manifest.keys()
            if missing:
                raise KeyError(*missing)
            held = set(archive.namelist()) - {MANIFEST}
            if held != stated.keys():
                odd = sorted(held ^ stated.keys())[0]
                raise StageError(f"{path}: {odd}: in the archive or in its manifest, not in both")
            for name, digest in stated.items():
                if name != PARAMS and not belongs(PurePosixPath(name)):
                    raise StageError(f"{path}: {name}: no record and no network of a run")
                data = archive.read(name)
                if hashlib.sha256(data).hexdigest() != digest:
                    raise StageError(f"{path}: {name}: its sha256 is not that of the manifest")
                place = root / (name if name == PARAMS else f"artifacts/{manifest['run']}/{name}")
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(data)
            root.joinpath(f"artifacts/{manifest['run']}/records").mkdir(parents=True, exist_ok=True)
    except FileNotFoundError:
        raise StageError(f"{path}: no such file") from None
    except StageError:
        raise
    except Exception as error:  # damaged archives raise many kinds
        raise StageError(f"{path}: not a file of `stochsec export` ({error})") from None
    return manifest


def belongs(name: PurePosixPath) -> bool:
    """Whether `pack` packs a file of that name."""
    if name.is_absolute() or any(part.startswith(".") for part in name.parts):
        return False
    if name.parts[0] == "records":
        return name.suffix in (".safetensors", ".csv")
    energy = name.match("models/*/ebm_*.safetensors") and not name.match("*.snapshots.*")
    network = energy or name.match("models/*/classifier*.safetensors")
    return len(name.parts) == 3 and network


def is_large_classifier(path: Path) -> bool:
    """A classifier that does not travel."""
    return path.name.startswith("classifier") and path.stat().st_size > LARGEST


def check_records(params: Params, theirs: Path) -> None:
    """`StageError` if a record is of other images or networks than those that are there."""
    for weights in theirs.glob("models/*/*.safetensors"):
        load = load_classifier if weights.name.startswith("classifier") else load_energy
        load(weights)
    for dataset in params.datasets:
        own = Paths(params.run, dataset).images
        if not own.exists():
            say(f"import: {own} is not here; which images were attacked is not checked")
        data = load_images(own, "test", params.dataset(dataset)) if own.exists() else None
        for path in sorted(theirs.glob(f"records/{dataset}/**/*.safetensors")):
            name, about = path.relative_to(theirs), about_of(path)
            check_networks(name, about, theirs / f"models/{dataset}")
            if data is not None and "adversarial" in load_tensors(path)[0]:
                images = AttackResult.load(path).images
                count = len(images.labels)
                if not all(
                    getattr(images, field.name).equal(getattr(data, field.name)[:count])
                    for field in fields(Images)
                ):
                    raise StageError(f"{name}: its images or labels are not those of {own}")
