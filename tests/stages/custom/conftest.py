"""A place to try somebody's files in."""

from pathlib import Path

import pytest


@pytest.fixture
def folder(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, while the working folder has the files of the tiny experiment."""
    work = tmp_path / "work"  # its unfinished work is its own
    work.mkdir()
    for name in ("artifacts", "pretrained", "params.yaml"):
        (work / name).symlink_to(experiment / name)
    monkeypatch.chdir(work)
    return tmp_path
