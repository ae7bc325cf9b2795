"""Where results come from: parameters, machine, the hashes of what they were made of; the code."""

import hashlib
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch
import yaml

from stages.core.artifacts import about_of
from stages.core.files import ROOT, fingerprint, source_files, visible, write_text
from stages.core.params import Params
from stages.core.records import KEPT

IMPORTED = "imported.json"  # among the records of a run: where they came from, if not from here
MACHINE = ("device", "torch", "engine", "bfloat16", "classifier", "max_chains", "threads")


def write(params: Params, root: Path, out: Path) -> None:
    """The parameters, and of every record its hash, its machine and the files it was made of."""
    values = as_yaml(params)
    write_text(out / "params.yaml", values)
    records = root / f"artifacts/{params.run}/records"
    imported = import_of(params.run, root)
    about: dict[str, object] = {}
    for path in visible(records, "*.safetensors"):
        said, name = about_of(path), str(path.relative_to(records))
        hashed = said[KEPT]["sha256"] if KEPT in said else fingerprint(path)
        about[name] = {
            "sha256": hashed,
            **{key: said[key] for key in MACHINE if key in said},
            "made of": said.get("files", {}),
            "imported": is_imported(hashed, f"records/{name}", imported),
        }
    provenance: dict[str, object] = {
        "hashes": "the first 32 hexadecimal digits of sha256",
        "params.yaml": hashlib.sha256(values.encode()).hexdigest()[:32],
        "records": about,
    }
    if imported:
        provenance["import"] = imported
    write_text(out / "provenance.json", json.dumps(provenance, indent=2) + "\n")


def import_of(run: str, root: Path = Path()) -> dict[str, Any]:
    """The manifest of the import that records of a run came with; empty if there was none."""
    path = root / f"artifacts/{run}/records/{IMPORTED}"
    manifest: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    return manifest


def is_imported(hashed: str, name: str, manifest: dict[str, Any]) -> bool:
    """Whether a file of that fingerprint is still the one that was imported."""
    return str(manifest.get("files", {}).get(name, "")).startswith(hashed)


def as_yaml(params: Params) -> str:
    """The parameters as a file that `--params` reads."""
    return yaml.safe_dump(params.model_dump(mode="json"), sort_keys=False)


def here(device: torch.device) -> dict[str, object]:
    """This code and this machine, as far as they can be told."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "commit": commit(),
        "source": source(),
        "device": name,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def source() -> str:
    """One hash of all modules of both packages."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(f"{path.relative_to(ROOT).as_posix()}\n".encode() + path.read_bytes())
    return digest.hexdigest()[:32]


def commit() -> str | None:
    """The commit of the source, "-dirty" if it was changed since; None if git cannot say."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "defense", "stages")
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
