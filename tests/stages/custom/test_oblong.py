"""Images that are not square, from pictures on disk to an attack on their defense."""

from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from stages.core.artifacts import load_tensors
from tests.tiny import command, tiny_params

STAGES = [
    "prepare-data own",
    "train-classifier own",
    "train-ebm own adam",
    "train-ebm own convergent",
    "attack own pgd",
    "attack own transfer_K",
    "attack own bpda_eot",
]


@pytest.fixture
def pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """64x48 pictures, bright on the left or on the right."""
    monkeypatch.chdir(tmp_path)
    draw = np.random.default_rng(0)
    for split, count in (("train", 24), ("test", 12)):
        for number in range(count):
            pixels = draw.integers(0, 100, (64, 48, 3))
            side = number % 2
            pixels[:, 24 * side : 24 * side + 24] += 120
            place = tmp_path / f"pictures/{split}/{('left', 'right')[side]}/{number}.png"
            place.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(place)
    return tmp_path / "pictures"


def write_params(pictures: Path, size: object) -> None:
    values = tiny_params()
    shape = {"image_size": size, "channels": 3, "classes": 2}
    section = {**values["data"]["digits"], "source": "folder", "path": str(pictures)}
    section |= {"shape": shape, "train_images": None, "test_images": None, "held_out": 0}
    section["training"] = {**section["training"], "batch": 8, "crop": 0}
    values |= {"data": {"own": section}, "datasets": ["own"], "compare_dataset": "own"}
    values["ebm"]["update"]["batch"] = 8
    values["fid"]["images"] = 12
    values["evaluate"]["attacks"] = {"identity": values["evaluate"]["attacks"]["identity"]}
    Path("params.yaml").write_text(yaml.safe_dump(values))


def test_pictures_that_are_not_square_are_trained_on_defended_and_attacked(pictures: Path) -> None:
    write_params(pictures, [64, 48])
    for words in STAGES:
        result = command(words)
        assert result.exit_code == 0, f"{words}: {result.output}"
    tensors, _ = load_tensors(Path("artifacts/tiny/records/own/bpda_eot.safetensors"))
    assert tensors["adversarial"].shape == (8, 3, 64, 48)
    models = "artifacts/tiny/models/own"
    words = f"secure {models}/classifier.safetensors {pictures}/test/left/0.png"
    words += f" --energy {models}/ebm_convergent.safetensors --set langevin.K=2"
    assert command(words).exit_code == 0
    assert Path("secured/before_after.png").exists()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ([64, 12], "image_size: 64x12 is too narrow for the energy"),
        ([64, 3], "image_size: expected >= 4, got 3"),
        ([48, 64], "expected (48, 64) pixels, got (64, 48)"),
    ],
)
def test_a_size_that_cannot_be_is_said_at_once(
    pictures: Path, size: list[int], message: str
) -> None:
    write_params(pictures, size)
    result = command("prepare-data own")
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
