"""Own images: what is read is what was there, and what is wrong is one line."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from typer.testing import Result

from stages.artifacts import load_images
from stages.params import Dataset
from tests.tiny import command, tiny_params

SECTION = Dataset.model_validate(
    {**tiny_params()["data"]["digits"], "source": "npz", "classes": 2, "channels": 3}
)


def own_params(folder: Path, source: str) -> Path:
    values = tiny_params()
    values["run"] = "own"
    values["datasets"], values["compare_dataset"] = ["own"], "own"
    section = {"source": source, "path": str(folder), "classes": 2, "channels": 3}
    values["data"] = {"own": {**values["data"]["digits"], **section}}
    values["fid"]["images"] = 2
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def prepare(folder: Path, source: str) -> Result:
    return command(f"prepare-data own --params {own_params(folder, source)} --out {folder}/out.npz")


def make_folders(folder: Path) -> np.ndarray[Any, Any]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 2, 3, 8, 8, 3), np.uint8)
    for split, name in enumerate(("train", "test")):
        for label, kind in enumerate(("cat", "dog")):
            for i in range(3):
                path = folder / name / kind / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels[split, label, i]).save(path)
    return pixels


def test_class_folders_keep_pixels_and_labels(tmp_path: Path) -> None:
    pixels = make_folders(tmp_path)
    assert prepare(tmp_path, "folder").exit_code == 0
    test = load_images(tmp_path / "out.npz", "test", SECTION)
    assert test.labels.bincount().tolist() == [3, 3]
    flat = torch.from_numpy(pixels[1]).flatten(0, 1).permute(0, 3, 1, 2)
    assert torch.equal(test.images, flat[test.index])
    assert torch.equal(test.labels, test.index // 3)


def test_npz_files_keep_pixels_and_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=np.arange(7) % 2)
    assert prepare(tmp_path, "npz").exit_code == 0
    train = load_images(tmp_path / "out.npz", "train", SECTION)
    assert torch.equal(train.images, torch.from_numpy(pixels).permute(0, 3, 1, 2)[train.index])
    assert torch.equal(train.labels, train.index % 2)


def test_one_broken_image_is_named(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "test/dog/1.png").write_bytes(b"not an image")
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    assert "test/dog/1.png: cannot be read as an image" in "".join(result.output.split("\n"))
    assert not (tmp_path / "out.npz").exists()


def test_class_folders_that_differ_between_the_splits_are_named(tmp_path: Path) -> None:
    make_folders(tmp_path)
    (tmp_path / "test/cat").rename(tmp_path / "test/wolf")
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    assert "expected the same 2 class folders" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((4, 9, 9, 3), np.uint8), np.zeros(4, int), "= (3, 8, 8), got (3, 9, 9)"),
        (np.zeros((4, 8, 8, 3), np.float32), np.zeros(4, int), "expected images (N,H,W,C) uint8"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.full(4, 2), "expected labels 0 to 1, got 2 to 2"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(3, int), "expected one label an image, got 3"),
        (np.zeros((4, 8, 8, 3), np.uint8), np.zeros(4), "expected labels (N,) integer"),
    ],
)
def test_own_data_of_the_wrong_kind_is_one_line(
    tmp_path: Path, images: Any, labels: Any, message: str
) -> None:
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=images, labels=labels)
    result = prepare(tmp_path, "npz")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_dataset_that_cannot_be_had_is_one_line(tmp_path: Path) -> None:
    for source in ("npz", "folder"):
        result = prepare(tmp_path, source)
        assert result.exit_code == 2
        assert str(tmp_path.name) in "".join(result.output.split("\n"))


def test_images_of_another_dataset_are_one_line(tmp_path: Path) -> None:
    make_folders(tmp_path)
    assert prepare(tmp_path, "folder").exit_code == 0
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(tiny_params()))
    words = f"train-classifier digits --params {tmp_path}/tiny.yaml --images {tmp_path}/out.npz"
    result = command(words)
    assert result.exit_code == 2
    assert "expected images of (channels, height, width) = (1, 8, 8), got (3, 8, 8)" in " ".join(
        result.output.split()
    )
