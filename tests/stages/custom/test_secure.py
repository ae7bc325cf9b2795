"""`stochsec secure`: predictions for images of anybody, read piece by piece."""

import csv
import os
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from defense import load_classifier
from defense.eot import EOTDefense
from defense.inference import classify
from defense.pixels import from_bytes
from stages.custom import secure
from stages.custom.given import described, read_pictures
from stages.custom.secure import judged
from tests.tiny import command

pytestmark = pytest.mark.usefixtures("folder")

CLASSIFIER = "artifacts/tiny/models/digits/classifier.safetensors"
ENERGY = "artifacts/tiny/models/digits/ebm_convergent.safetensors"
IMAGES = "artifacts/tiny/data/digits.npz"
SHORT = "--set langevin.K=2 --set langevin.denoise=false --replicas 5"


def secured(words: str, out: Path) -> tuple[list[dict[str, str]], str]:
    """The lines of predictions.csv, and what was said."""
    result = command(f"secure {words} --energy {ENERGY} --out {out}")
    assert result.exit_code == 0, result.output
    with (out / "predictions.csv").open() as file:
        return list(csv.DictReader(file)), " ".join(result.output.split())


def fails(words: str) -> str:
    result = command(f"secure {words} --energy {ENERGY}")
    assert result.exit_code == 2, result.output
    return " ".join(result.output.split())


def test_images_of_a_dataset_are_predicted(folder: Path) -> None:
    lines, said = secured(f"{CLASSIFIER} {IMAGES} {SHORT}", folder / "out")
    with np.load(IMAGES) as arrays:
        images, labels = torch.from_numpy(arrays["test_images"]), arrays["test_labels"]
    assert [int(line["label"]) for line in lines] == labels.tolist()
    bare = classify(load_classifier(CLASSIFIER), from_bytes(images), batch=500).argmax(1)
    same = np.mean([int(line["prediction"]) == p for line, p in zip(lines, bare, strict=True)])
    assert same > 0.5  # two steps hardly move an image
    assert "accuracy: bare" in said
    assert (folder / "out/before_after.png").stat().st_size > 1000
    logits = [float(lines[0][f"logit_{c}"]) for c in range(10)]
    assert int(np.argmax(logits)) == int(lines[0]["prediction"])


def test_one_picture_and_a_folder_without_labels(folder: Path) -> None:
    pictures = folder / "pictures"
    (pictures / "inner").mkdir(parents=True)
    for name in ("a.png", "inner/b.png"):
        Image.fromarray(np.full((8, 8), 90, np.uint8)).save(pictures / name)
    (pictures / "notes.txt").write_text("no image")
    lines, _ = secured(f"{CLASSIFIER} {pictures / 'a.png'} {SHORT}", folder / "one")
    assert [line["image"] for line in lines] == ["a.png"]
    lines, said = secured(f"{CLASSIFIER} {pictures} {SHORT} --purified", folder / "all")
    assert [(line["image"], line["label"]) for line in lines] == [
        ("a.png", ""),
        ("inner/b.png", ""),
    ]
    assert "notes.txt" in said
    shutil.copytree(pictures / "inner", folder / "two/a")
    shutil.copytree(pictures / "inner", folder / "two/b")
    lines, said = secured(f"{CLASSIFIER} {folder}/two {SHORT}", folder / "three")
    assert "2 folders, and the classifier has 10 classes: taken as images without labels" in said
    assert [line["label"] for line in lines] == ["", ""]
    with Image.open(folder / "all/purified/inner/b.png") as purified:
        assert purified.size == (8, 8)


def test_a_killed_run_continues_with_the_same_predictions(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, calls = f"{CLASSIFIER} {IMAGES} {SHORT}", list[int]()
    whole, _ = secured(words, folder / "whole")
    block = secure.block

    def counted(defense: EOTDefense, pixels: torch.Tensor, replicas: int, first: int) -> Any:
        calls.append(first)
        if len(calls) == 3:
            raise RuntimeError("killed")
        return block(defense, pixels, replicas, first)

    monkeypatch.setattr(secure, "block", counted)
    with pytest.raises(RuntimeError, match="killed"):
        command(f"secure {words} --energy {ENERGY} --out {folder / 'cut'}")
    again, _ = secured(words, folder / "cut")
    assert again == whole
    assert calls == [0, 40, 80, *range(80, 500, 40)]  # two pieces were kept


def test_a_vote_is_clear_if_chance_would_hardly_give_it() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]] * 4)
    votes = torch.tensor([[15, 0, 0], [12, 3, 0], [8, 7, 0], [5, 10, 0]])
    said = judged(logits, votes)
    assert said.clear.tolist() == [True, True, False, False]
    assert said.predicted.tolist() == [0] * 4
    torch.testing.assert_close(said.agreement, torch.tensor([1.0, 0.8, 8 / 15, 1 / 3]))


def rgb(folder: Path) -> None:
    Image.fromarray(np.zeros((9, 8), np.uint8)).save(folder / "wrong.png")


def many_classes(folder: Path) -> None:
    np.savez(folder / "n.npz", images=np.zeros((2, 8, 8, 1), np.uint8), labels=np.array([0, 10]))


def floats(folder: Path) -> None:
    np.savez(folder / "n.npz", images=np.zeros((2, 8, 8, 1)), labels=np.array([0, 1]))


def broken(folder: Path) -> None:
    (folder / "broken.png").write_bytes(b"\x89PNG no more")


@pytest.mark.parametrize(
    ("make", "name", "message"),
    [
        (rgb, "wrong.png", "expected (8, 8) pixels, got (9, 8)"),
        (many_classes, "n.npz", "expected labels 0 to 9, as the classifier has 10 classes, got 10"),
        (floats, "n.npz", "expected images uint8 of (channels, height, width) = (1, 8, 8)"),
        (broken, "broken.png", "cannot be read as an image"),
        (lambda _: None, "nothing", "no such file or folder"),
    ],
)
def test_wrong_images_are_one_line(
    folder: Path, make: Callable[[Path], None], name: str, message: str
) -> None:
    make(folder)
    assert message in fails(f"{CLASSIFIER} {folder / name} --out {folder / 'out'}")


def test_weights_alone_are_sent_to_convert(folder: Path) -> None:
    torch.save({"weight": torch.zeros(2)}, folder / "w.th")
    assert "`stochsec convert` makes one" in fails(f"{folder}/w.th {IMAGES}")


def test_an_energy_of_other_images_is_noticed(folder: Path) -> None:
    words = f"{CLASSIFIER} {folder}/n.npz {SHORT}"
    published = "pretrained/tiny/digits_convergent.safetensors"
    assert described(Path(published)).level is not None
    noise = np.random.default_rng(0).integers(0, 256, (20, 8, 8, 1)).astype(np.uint8)
    np.savez(folder / "n.npz", images=noise)
    result = command(f"secure {words} --energy {published} --out {folder / 'out'}")
    assert "FLAG: " in result.output
    assert "was trained on other images than these" in " ".join(result.output.split())
    words = f"{CLASSIFIER} {IMAGES} {SHORT}"
    result = command(f"secure {words} --energy {published} --out {folder / 'out'}")
    assert "FLAG" not in result.output


def test_images_on_disk_are_read_one_by_one(folder: Path) -> None:
    """20,000 pictures of 64x48: all of them would take 184 MB."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(folder / "original.png")
    pictures = folder / "pictures/cats"
    pictures.mkdir(parents=True)
    for number in range(20_000):
        os.link(folder / "original.png", pictures / f"{number:05d}.png")
    tracemalloc.start()
    found = read_pictures(folder / "pictures", (3, 64, 48))
    for first in range(0, len(found), 500):
        block = found.read(range(first, min(first + 100, len(found))))
        assert block.shape == (100, 3, 64, 48)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 20_000
    assert found.labels is not None
    assert torch.equal(block[0], torch.from_numpy(pixels).permute(2, 0, 1))
    assert peak < 40e6
