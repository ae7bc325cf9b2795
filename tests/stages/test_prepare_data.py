"""Own images: what is read is what was there, and what is wrong is one line."""

import os
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import Result

from stages.core.artifacts import Images, load_images
from stages.core.params import Dataset
from stages.prepare_data import where
from tests.tiny import command, tiny_params

COLOURS = {"image_size": 8, "channels": 3, "classes": 2}
SECTION = Dataset.model_validate(
    {**tiny_params()["data"]["digits"], "source": "npz", "shape": COLOURS}
)
GRAY = SECTION.model_copy(update={"shape": SECTION.shape.model_copy(update={"channels": 1})})


def own_params(folder: Path, source: str) -> Path:
    values = tiny_params()
    values["run"] = "own"
    values["datasets"], values["compare_dataset"] = ["own"], "own"
    section = {"source": source, "path": str(folder), "shape": COLOURS}
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
    flat = pixels[1].reshape(6, 8, 8, 3).transpose(0, 3, 1, 2)
    assert pairs(test) == pairs(Images(torch.from_numpy(flat), torch.arange(6) // 3, test.index))


def test_npz_files_keep_pixels_and_labels(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=np.arange(7) % 2)
    assert prepare(tmp_path, "npz").exit_code == 0
    train = load_images(tmp_path / "out.npz", "train", SECTION)
    there = Images(torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.arange(7) % 2, train.index)
    assert pairs(train) == pairs(there)


def pairs(data: Images) -> set[tuple[bytes, int]]:
    """Every image with its label."""
    images = [image.contiguous().numpy().tobytes() for image in data.images]
    return set(zip(images, data.labels.tolist(), strict=True))


def prepared(folder: Path, pixels: np.ndarray[Any, Any], labels: np.ndarray[Any, Any]) -> Path:
    """The image file of these images, to train and to test; 3 training images held out."""
    folder.mkdir()
    for split in ("train", "test"):
        np.savez(folder / f"{split}.npz", images=pixels, labels=labels)
    path = own_params(folder, "npz")
    values = yaml.safe_load(path.read_text())
    values["data"]["own"] |= {"held_out": 3}
    path.write_text(yaml.safe_dump(values))
    result = command(f"prepare-data own --params {path} --out {folder}/out.npz")
    assert result.exit_code == 0, result.output
    return folder / "out.npz"


def test_the_order_of_the_source_changes_nothing(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    pixels, labels = random.integers(0, 256, (20, 8, 8, 3), np.uint8), np.arange(20) % 2
    pixels[5], labels[5] = pixels[6], 1 - labels[6]  # the same image with another label
    order = random.permutation(20)
    first = prepared(tmp_path / "first", pixels, labels)
    second = prepared(tmp_path / "second", pixels[order], labels[order])
    assert first.read_bytes() == second.read_bytes()


def test_held_out_images_are_in_no_training_and_are_judged_if_asked_for(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 3), np.uint8)
    path = prepared(tmp_path / "own", pixels, np.arange(20) % 2)
    train, test, held_out = (
        load_images(path, split, SECTION) for split in ("train", "test", "held_out")
    )
    assert (len(train.labels), len(test.labels), len(held_out.labels)) == (17, 20, 3)
    assert not pairs(train) & pairs(held_out)
    assert len(pairs(train) | pairs(held_out)) == 20
    judged = load_images(path, "test", SECTION.model_copy(update={"judged_on": "held_out"}))
    assert pairs(judged) == pairs(held_out)


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
    said = " ".join(result.output.split())
    assert "expected the same 2 class folders in train and test" in said
    assert "which lack" in said


def test_files_are_read_by_content_and_the_others_are_named(tmp_path: Path) -> None:
    """The same picture in several formats, one under a name that says nothing."""
    make_folders(tmp_path)
    folder = tmp_path / "train/cat"
    with Image.open(folder / "0.png") as image:
        image.save(folder / "0.bmp")
        image.save(folder / "0.jp2", "JPEG2000", irreversible=False)
        image.save(folder / "picture", "PNG")
        image.convert("P", palette=Image.Palette.ADAPTIVE).save(folder / "0.GIF")
    (folder / "notes.txt").write_text("a cat")
    result = prepare(tmp_path, "folder")
    said = " ".join(result.output.split())
    assert result.exit_code == 0, said
    assert "own train: 10 of 10 images" in said
    assert f"in no class folder, left out: 1: {folder}/notes.txt" in said.replace("/ ", "/")
    train = load_images(tmp_path / "out.npz", "train", SECTION)
    with Image.open(folder / "0.png") as image:
        expected = np.asarray(image).transpose(2, 0, 1)
    same = [np.array_equal(image.numpy(), expected) for image in train.images]
    assert sum(same) == 5, "png, bmp, jp2, gif, and the file without an ending"


def gray_params(folder: Path) -> Path:
    path = own_params(folder, "folder")
    values = yaml.safe_load(path.read_text())
    values["data"]["own"]["shape"]["channels"] = 1
    path.write_text(yaml.safe_dump(values))
    return path


def saved_everywhere(folder: Path, image: Image.Image, name: str, **options: Any) -> None:
    for split in ("train", "test"):
        for kind in ("cat", "dog"):
            (folder / split / kind).mkdir(parents=True, exist_ok=True)
            image.save(folder / split / kind / name, **options)


def test_16_bits_keep_their_levels(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    saved_everywhere(tmp_path, Image.fromarray(ramp), "ramp.png")
    words = f"prepare-data own --params {gray_params(tmp_path)} --out {tmp_path}/out.npz"
    result = command(words)
    assert result.exit_code == 0, result.output
    image = load_images(tmp_path / "out.npz", "train", GRAY).images[0, 0]
    assert image.flatten().tolist() == np.round(ramp / 257).astype(int).flatten().tolist()


def test_a_camera_held_sideways(tmp_path: Path) -> None:
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it by 90 degrees to see it upright
    saved_everywhere(tmp_path, Image.fromarray(pixels), "turned.png", exif=exif)
    words = f"prepare-data own --params {gray_params(tmp_path)} --out {tmp_path}/out.npz"
    assert command(words).exit_code == 0
    image = load_images(tmp_path / "out.npz", "train", GRAY).images[0, 0]
    assert np.array_equal(image.numpy(), np.rot90(pixels, -1))


def test_an_animation_is_said(tmp_path: Path) -> None:
    frames = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in (10, 200)]
    options = {"save_all": True, "append_images": frames[1:]}
    saved_everywhere(tmp_path, frames[0], "moving.gif", **options)
    words = f"prepare-data own --params {gray_params(tmp_path)} --out {tmp_path}/out.npz"
    result = command(words)
    assert result.exit_code == 0
    assert "files of several frames, of which the first was taken: 2" in " ".join(
        result.output.split()
    )
    assert set(load_images(tmp_path / "out.npz", "train", GRAY).images.flatten().tolist()) == {10}


@pytest.mark.parametrize(
    ("image", "name", "message"),
    [
        (Image.new("RGBA", (8, 8), (200, 0, 0, 128)), "half.png", "has transparent pixels"),
        (
            Image.fromarray(np.full((8, 8), 0.5, np.float32)),
            "float.tiff",
            "expected 8 or 16 bits a value, got float32 from 0.5 to 0.5",
        ),
    ],
)
def test_pictures_that_nobody_can_take_as_meant_are_refused(
    tmp_path: Path, image: Image.Image, name: str, message: str
) -> None:
    saved_everywhere(tmp_path, image, name)
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    said = " ".join(result.output.split())
    assert f"{name}: {message}" in said.replace("/ ", "/")


def test_opaque_alpha_is_no_alpha(tmp_path: Path) -> None:
    saved_everywhere(tmp_path, Image.new("RGBA", (8, 8), (200, 0, 0, 255)), "full.png")
    assert prepare(tmp_path, "folder").exit_code == 0
    train = load_images(tmp_path / "out.npz", "train", SECTION)
    assert train.images[0, :, 0, 0].tolist() == [200, 0, 0]


def test_a_class_without_images_is_named(tmp_path: Path) -> None:
    make_folders(tmp_path)
    for path in (tmp_path / "test/dog").iterdir():
        path.unlink()
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    said = "".join(result.output.split())
    assert f"error:{tmp_path}/test/dog:expectedimagesinit,foundnone" in said


def test_a_temporary_experiment_of_dvc_finds_the_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC copies what git knows; data/ is not among it."""
    (tmp_path / "repository/data").mkdir(parents=True)
    (tmp_path / "copy").mkdir()
    monkeypatch.chdir(tmp_path / "copy")
    monkeypatch.setenv("DVC_ROOT", str(tmp_path / "repository"))
    assert where("data") == tmp_path / "repository/data"
    assert where("none") == Path("none")
    Path("data").mkdir()
    assert where("data") == Path("data")


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


def test_files_that_are_hidden_loose_or_linked_are_read_or_named(tmp_path: Path) -> None:
    make_folders(tmp_path)
    cats = tmp_path / "train/cat"
    more = tmp_path / "more"
    more.mkdir()
    (cats / "0.png").rename(more / "0.png")
    (cats / "linked").symlink_to(more)
    (cats / "linked again").symlink_to(cats)  # a loop
    (cats / ".ipynb_checkpoints").mkdir()
    for place in (cats / ".ipynb_checkpoints/1.png", tmp_path / "train/loose.png"):
        place.write_bytes((cats / "1.png").read_bytes())
    os.mkfifo(cats / "pipe")
    result = prepare(tmp_path, "folder")
    said = " ".join(result.output.split()).replace("/ ", "/")
    assert result.exit_code == 0, said
    assert "own train: 6 of 6 images" in said
    assert "left out: 3: " in said
    for name in ("1.png", "loose.png", "pipe"):
        assert name in said
    (cats / "broken.png").symlink_to("nowhere")
    assert "broken.png: cannot be read as an image" in " ".join(
        prepare(tmp_path, "folder").output.split()
    ).replace("/ ", "/")


def damaged(path: Path, kind: str) -> None:
    """A PNG that Pillow does not take."""
    image = Image.new("RGB", (8, 8))
    if kind == "text":
        text = PngInfo()
        text.add_text("much", "x" * 3_000_000, zip=True)
        image.save(path, pnginfo=text)
    else:
        image.save(path)
        data = bytearray(path.read_bytes())
        data[16:24] = (60000).to_bytes(4, "big") * 2
        data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
        path.write_bytes(data)


@pytest.mark.parametrize("kind", ["text", "size"])
def test_a_hostile_picture_is_one_line(tmp_path: Path, kind: str) -> None:
    make_folders(tmp_path)
    damaged(tmp_path / "train/cat/0.png", kind)
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    assert "0.png: cannot be read as an image" in " ".join(result.output.split()).replace("/ ", "/")


@pytest.mark.parametrize("largest", [255, 4095])
def test_16_bit_files_with_fewer_bits_are_not_taken_for_dark(tmp_path: Path, largest: int) -> None:
    make_folders(tmp_path)
    values = np.linspace(0, largest, 64).astype(np.uint16).reshape(8, 8)
    for path in tmp_path.rglob("*.png"):
        Image.fromarray(values).save(path)
    result = prepare(tmp_path, "folder")
    assert result.exit_code == 2
    assert f"is {largest}, so they hold fewer bits" in " ".join(result.output.split())


def test_a_class_without_images_is_said(tmp_path: Path) -> None:
    pixels = np.zeros((4, 8, 8, 3), np.uint8)
    for split in ("train", "test"):
        np.savez(tmp_path / f"{split}.npz", images=pixels, labels=np.zeros(4, np.int64))
    said = " ".join(prepare(tmp_path, "npz").output.split()).replace("/ ", "/")
    assert "train.npz: has no images of class 1" in said
