"""`stochsec join-records`: parts of the test images, attacked anywhere, as one record."""

import shutil
from pathlib import Path

import pytest
import torch

from stages.core.artifacts import load_tensors, save_tensors
from tests.tiny import command


@pytest.fixture(scope="module")
def parts(experiment: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of images 0:5 and 5:8 (shards of 5 and 3), and of all eight."""
    folder = tmp_path_factory.mktemp("parts")
    for place in ("artifacts", "params.yaml"):
        (folder / place).symlink_to(experiment / place)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name, words in (
            ("a", "--subset 0:5"),
            ("b", "--subset 5:8"),
            ("whole", "--subset 0:8"),
        ):
            words = f"attack digits bpda_eot {words} --out {name}.safetensors"
            assert command(words).exit_code == 0
    return folder


@pytest.fixture(autouse=True)
def folder(parts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in parts.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def joined(words: str) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    result = command(f"join-records out.safetensors {words}")
    assert result.exit_code == 0, result.output
    return load_tensors(Path("out.safetensors"))


def refused(words: str) -> str:
    result = command(f"join-records out.safetensors {words}")
    assert result.exit_code == 2, result.output
    assert not Path("out.safetensors").exists()
    return " ".join(result.output.split())


def test_parts_are_the_whole_record_in_any_order() -> None:
    tensors, about = joined("b.safetensors a.safetensors")
    expected, said = load_tensors(Path("whole.safetensors"))
    assert tensors.keys() == expected.keys()
    assert all(
        torch.equal(tensors[name].nan_to_num(), expected[name].nan_to_num()) for name in tensors
    )
    assert about["subset"] is None
    assert {n: v for n, v in about.items() if n != "subset"} == {
        n: v for n, v in said.items() if n != "subset"
    }


def test_a_part_without_images_goes_on_with_a_whole_one() -> None:
    joined("a.safetensors --without-images")
    shutil.move("out.safetensors", "kept.safetensors")
    tensors, about = joined("kept.safetensors b.safetensors")
    expected, _ = load_tensors(Path("whole.safetensors"))
    assert tensors["adversarial"].numel() == tensors["images"].numel() == 0
    assert torch.equal(tensors["broken_at"], expected["broken_at"])
    assert len(about["kept"]["sha256"]) == 2
    assert 0 < about["kept"]["farthest"] <= 48 / 255 + 1e-6


def test_what_does_not_fit_together_is_said() -> None:
    assert "expected test images from 5 on, got 0:5" in refused("a.safetensors a.safetensors")
    assert "expected test images from 5 on, got 0:8" in refused("a.safetensors whole.safetensors")
    tensors, about = load_tensors(Path("b.safetensors"))
    save_tensors(Path("c.safetensors"), tensors, {**about, "K": 7})
    assert "c.safetensors: K = 7, and 4 in a.safetensors" in refused("a.safetensors c.safetensors")
    save_tensors(Path("d.safetensors"), tensors, {**about, "subset": [5, 9]})
    assert "says test images 5:9, has 3" in refused("a.safetensors d.safetensors")
