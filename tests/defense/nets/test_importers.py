"""Other people's networks: built from an import path, weights from whatever wraps them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from defense.nets.importers import (
    NORMALIZATIONS,
    Logits,
    Preprocessed,
    build_model,
    load_weights,
)

SOURCE = """
from torch import nn
import neighbour

class Net(nn.Module):
    def __init__(self, classes=3, *, bias=True):
        super().__init__()
        linear = nn.Linear(4, classes, bias=bias)
        self.body = nn.Sequential(nn.Flatten(), linear, nn.BatchNorm1d(classes))

    def forward(self, x):
        return {"logits": self.body(x) * neighbour.ONE, "loss": None}

ready = Net(classes=2)

class Zoo:
    large = staticmethod(lambda: Net(classes=7))

def fails():
    raise RuntimeError("no such variant")
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("ONE = 1.0\n")
    path = tmp_path / "nets.py"
    path.write_text(SOURCE)
    return path


def test_a_network_is_built_by_a_call_of_a_file(file: Path) -> None:
    assert build_model(f"{file}:Net()").body[1].weight.shape == (3, 4)
    assert build_model(f"{file}:Net(5, bias=False)").body[1].bias is None
    assert build_model(f"{file}:Zoo.large()").body[1].weight.shape == (7, 4)
    assert build_model(f"{file}:ready").body[1].weight.shape == (2, 4)


def test_a_network_is_built_by_a_call_of_a_package() -> None:
    assert isinstance(build_model("torchvision.models:resnet18(num_classes=10)"), nn.Module)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ("", "expected a file and what to call in it"),
        (":Nothing()", "has no Nothing; it has Net"),
        (":Net", "expected an nn.Module, got type; call it, as in Net()"),
        (":Net(open('x'))", "expected a call with plain values"),
        (":__import__('os').system('true')", "expected the name of what builds the network"),
        (":fails()", "RuntimeError: no such variant"),
        (":Net(", "expected a call with plain values"),
    ],
)
def test_what_cannot_be_built_is_one_line(file: Path, call: str, message: str) -> None:
    with pytest.raises(ValueError, match=r"^[^\n]+$") as error:
        build_model(f"{file}{call}")
    assert message in str(error.value)


def test_what_cannot_be_imported_is_one_line(file: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import not_there_at_all\n")
    for source, message in (
        (f"{tmp_path}/none.py:Net()", "none.py: no such file"),
        (f"{tmp_path}/broken.py:Net()", "No module named 'not_there_at_all'"),
        ("not_there_at_all:Net()", "No module named 'not_there_at_all'"),
    ):
        with pytest.raises(ValueError, match=message):
            build_model(source)


WRAPPERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "bare": lambda state: state,
    "DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "training": lambda state: {"epoch": 3, "best": torch.tensor(0.9), "state_dict": state},
    "lightning": lambda state: {"state_dict": {f"model.net.{k}": v for k, v in state.items()}},
    "net": lambda state: {"net": state, "acc": 93.1},
    "nested": lambda state: {"a": {"model": state}, "optimizer": {"state": {}, "lr": 0.1}},
    "an older torch": lambda state: {k: v for k, v in state.items() if "num_batches" not in k},
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("ending", [".pth", ".th", ".ckpt"])
def test_weights_are_found_in_what_wraps_them(
    file: Path, tmp_path: Path, wrapper: str, ending: str
) -> None:
    theirs, ours = (build_model(f"{file}:Net()") for _ in range(2))
    path = tmp_path / f"weights{ending}"
    torch.save(WRAPPERS[wrapper](theirs.state_dict()), path)
    load_weights(ours, path)
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value)


def test_weights_of_a_part_are_found_in_a_network_that_holds_it(file: Path, tmp_path: Path) -> None:
    inner = build_model(f"{file}:Net()")
    save_file(inner.state_dict(), tmp_path / "w.safetensors")
    outer = nn.Sequential(build_model(f"{file}:Net()"))
    load_weights(outer, tmp_path / "w.safetensors")
    assert torch.equal(outer[0].body[1].weight, inner.body[1].weight)


def test_weights_that_do_not_fit_are_named(file: Path, tmp_path: Path) -> None:
    torch.save(build_model(f"{file}:Net(4)").state_dict(), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"other shapes .*body\.1\.weight \(4, 4\) for \(3, 4\)"):
        load_weights(build_model(f"{file}:Net()"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match=r"it has besides body\.1\.bias"):
        load_weights(build_model(f"{file}:Net(4, bias=False)"), tmp_path / "w.pth")


class Trap:
    """What runs code if it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path("touched").touch, ()


def test_nothing_in_a_file_of_weights_is_run(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"a": Trap()}}, "trap.pth")
    with pytest.raises(ValueError, match="holds Python objects besides tensors"):
        load_weights(build_model(f"{file}:Net()"), Path("trap.pth"))
    torch.save(build_model("torchvision.models:resnet18()"), "whole.pth")
    with pytest.raises(ValueError, match="holds Python objects besides tensors"):
        load_weights(build_model(f"{file}:Net()"), Path("whole.pth"))
    assert not Path("touched").exists()


@pytest.mark.parametrize("content", [b"", b"not weights", b"\x80\x04]."])
def test_a_file_that_holds_no_weights_is_one_line(
    file: Path, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "w.pth").write_bytes(content)
    with pytest.raises(ValueError, match=r"w\.pth: [^\n]+$"):
        load_weights(build_model(f"{file}:Net()"), tmp_path / "w.pth")
    with pytest.raises(ValueError, match="no such file"):
        load_weights(build_model(f"{file}:Net()"), tmp_path / "none.pth")


def test_pixels_are_resized_and_normalized_before_the_network() -> None:
    x = torch.rand(2, 3, 8, 8)
    mean, std = NORMALIZATIONS["imagenet"]
    normalized = Preprocessed(nn.Identity(), (mean, std), None)(x)
    for channel in range(3):
        expected = (x[:, channel] - mean[channel]) / std[channel]
        torch.testing.assert_close(normalized[:, channel], expected)
    assert Preprocessed(nn.Identity(), ((0.5,), (0.5,)), [12, 12])(x).shape == (2, 3, 12, 12)
    torch.testing.assert_close(
        Preprocessed(nn.Identity(), NORMALIZATIONS["bytes"], None)(x), 255 * x
    )
    with pytest.raises(ValueError, match="std: expected 1 numbers > 0"):
        Preprocessed(nn.Identity(), ((0.5,), (0.0,)), None)


def test_logits_are_taken_out_of_what_a_network_returns(file: Path) -> None:
    network = build_model(f"{file}:Net()").eval()
    x = torch.rand(5, 1, 2, 2)
    assert torch.equal(Logits(network)(x), network(x)["logits"])
