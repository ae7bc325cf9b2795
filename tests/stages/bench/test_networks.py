"""`stochsec bench-networks`: networks of the published sizes, and rows that are what they claim."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor, nn

from defense.energy import ConvEnergy, count_parameters
from defense.fast.langevin import FastLangevin
from defense.inference import flops
from defense.langevin import langevin
from stages import StageError
from stages.bench import networks
from stages.bench.networks import FAST, IGEBM, JEM, OURS, PLAIN, SHAPE, System
from stages.core.hardware import Hardware
from stages.reporting import style
from stages.reporting.figures import sampling_times

CPU = torch.device("cpu")


def tiny(device: torch.device = CPU) -> list[System]:
    """The same systems with networks of a few thousand weights."""
    ours = ConvEnergy(width=2)
    return [
        System(OURS, FAST, ours, FastLangevin(), 4),
        System(OURS, PLAIN, ours, langevin, 4),
        System("IGEBM, large", PLAIN, IGEBM(stem=2, width=3), langevin, 1),
        System("JEM", PLAIN, JEM(depth=10, width=1), langevin, 1),
    ]


def igebm_weights(stem: int, width: int) -> int:
    """The 3x3 kernels that the official code's layer list asks for, and the last layer."""
    blocks = [(stem, width), (width, width), (width, width)]
    blocks += [(width, 2 * width), (2 * width, 2 * width), (2 * width, 2 * width)]
    blocks += [(2 * width, 4 * width), (4 * width, 4 * width), (4 * width, 4 * width)]
    kernels = 3 * stem + sum(i * o + o * o + i * o * (i != o) for i, o in blocks)
    return 9 * kernels + 4 * width


@pytest.mark.parametrize(
    ("make", "published", "multiply_adds"),
    [
        (ConvEnergy, 693_569, 26.05e6),
        (IGEBM, igebm_weights(128, 128), 1.362e9),
        (lambda: IGEBM(width=192), igebm_weights(128, 192), 3.174e9),
        (JEM, 36.47e6, 5.95e9),
    ],
)
def test_networks_have_the_published_sizes(make, published: float, multiply_adds: float) -> None:
    with torch.device("meta"):
        net = make()
        assert net(torch.empty(7, *SHAPE)).shape == (7,)
        forward_and_back = flops(net, torch.empty(1, *SHAPE)) / 2
    assert count_parameters(net) == pytest.approx(published, rel=1e-3)  # biases are the rest
    assert forward_and_back == pytest.approx(2 * multiply_adds, rel=2e-3)


def test_ours_is_the_small_one_and_jem_a_wide_resnet_without_its_norms() -> None:
    with torch.device("meta"):
        assert count_parameters(ConvEnergy()) < 700_000
        large, jem = IGEBM(), JEM()
    kernels = sum(p.numel() for p in large.parameters() if p.ndim > 1)
    assert kernels == igebm_weights(128, 128) == 18_582_912 + 512
    kinds = [type(module) for module in jem.modules()]
    assert kinds.count(nn.Conv2d) == 1 + 2 * 12 + 3  # stem, blocks, shortcuts
    assert nn.BatchNorm2d not in kinds


@pytest.mark.parametrize("system", tiny()[1:], ids=lambda system: system.network)
def test_energies_are_one_number_an_image_and_differentiable(system: System, seeded) -> None:
    x = torch.rand(5, *SHAPE, generator=seeded()).requires_grad_(True)
    energies = system.net(x)
    assert energies.shape == (5,)
    torch.testing.assert_close(energies[3:4], system.net(x[3:4]))
    (gradient,) = torch.autograd.grad(energies[3], x)
    assert [bool(image.any()) for image in gradient] == [False, False, False, True, False]


def test_jem_is_minus_the_logsumexp_of_its_logits(seeded) -> None:
    jem, logits = JEM(depth=10, width=1), list[Tensor]()
    jem.head.register_forward_hook(lambda *call: logits.append(call[2]))
    energies = jem(torch.rand(3, *SHAPE, generator=seeded()))
    assert logits[0].shape == (3, 10)
    torch.testing.assert_close(energies, -logits[0].exp().sum(1).log())


def test_the_systems_of_a_real_run() -> None:
    with torch.device("meta"):
        found = networks.systems(torch.device("meta"))
    assert [s.engine for s in found if s.network == OURS] == [FAST, PLAIN]
    assert {s.engine for s in found if s.network != OURS} == {PLAIN}
    assert len({s.chain for s in found if s.engine == PLAIN}) == 1
    assert not any(p.requires_grad for s in found for p in s.net.parameters())


def test_every_system_is_timed_in_turn_after_a_round_to_warm_up(monkeypatch) -> None:
    order: list[int] = []
    found = tiny()
    monkeypatch.setattr(
        networks, "milliseconds", lambda work, device: order.append(1) or float(len(order))
    )
    times = networks.timings(found, torch.rand(2, *SHAPE), 2)
    taken = [[ms * system.steps for ms in row] for row, system in zip(times, found, strict=True)]
    assert taken == [[5, 9], [6, 10], [7, 11], [8, 12]]


def test_ratios_are_between_the_medians_of_one_run() -> None:
    times = [[1.0, 2.0, 9.0], [4.0, 3.0, 5.0], [40.0, 80.0, 20.0], [100.0, 500.0, 200.0]]
    rows = pd.DataFrame(networks.rows_of(tiny(), times, torch.rand(6, *SHAPE)))
    assert rows["ms"].tolist() == [2, 4, 40, 200]
    assert rows["times_plain"].tolist() == [0.5, 1, 10, 50]
    assert rows["times_fast"].tolist() == [1, 2, 20, 100]
    assert (rows["ms_low"].tolist()[2], rows["ms_high"].tolist()[2]) == (30, 60)
    assert set(rows["batch"]) == {6}


@pytest.fixture(scope="module")
def result(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("networks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(networks, "systems", tiny)
        networks.run(Hardware.choose("cpu"), 3, folder, batch=2)
    return folder


def test_json_and_csv_have_the_same_rows(result: Path) -> None:
    values = json.loads((result / "cpu.json").read_text())
    assert values["machine"].keys() >= {"cpu", "threads", "torch", "rounds"}
    rows = pd.DataFrame(values["rows"])
    pd.testing.assert_frame_equal(rows, pd.read_csv(result / "cpu.csv"), check_dtype=False)
    assert list(zip(rows["network"], rows["engine"], strict=True)) == [
        (system.network, system.engine) for system in tiny()
    ]
    assert (rows["ms_low"] > 0).all()
    assert (rows["ms_low"] <= rows["ms"]).all()
    assert (rows["ms"] <= rows["ms_high"]).all()
    ours = rows[rows["network"] == OURS].set_index("engine")["ms"]
    for engine, column in ((PLAIN, "times_plain"), (FAST, "times_fast")):
        expected = (rows["ms"] / ours[engine]).values
        assert rows[column].values == pytest.approx(expected, rel=0.01, abs=1e-3)
    sizes = [count_parameters(system.net) for system in tiny()]
    assert rows["parameters"].tolist() == sizes
    assert (rows["multiply_adds"] > rows["parameters"]).all()


def test_the_table_says_sizes_times_and_ratios(result: Path) -> None:
    rows = json.loads((result / "cpu.json").read_text())["rows"]
    table = networks.table(rows)
    assert len(table) == len(rows)
    assert table["of our plain loop"][1] == "1x"


def test_the_figure_draws(result: Path, tmp_path: Path) -> None:
    timed = json.loads((result / "cpu.json").read_text())["rows"]
    rows, figure = pd.DataFrame(timed), sampling_times(timed, "a machine")
    style.save(figure, tmp_path / "figure10.png")
    assert (tmp_path / "figure10.png").stat().st_size > 10_000
    (ax,) = figure.axes
    assert ax.get_xscale() == "log"
    assert "seconds per 1,000 Langevin steps of 2 images" in ax.get_xlabel()
    assert [bar.get_width() for bar in ax.patches] == rows["ms"].tolist()
    assert len(ax.texts) == len(rows)


@pytest.mark.parametrize(
    ("rounds", "batch", "said"),
    [(1, 2, "rounds: expected >= 2, got 1"), (2, 0, "batch: expected >= 1, got 0")],
)
def test_bad_numbers_are_said(tmp_path: Path, rounds: int, batch: int, said: str) -> None:
    with pytest.raises(StageError, match=said):
        networks.run(Hardware.choose("cpu"), rounds, tmp_path, batch=batch)


def test_a_bad_device_or_folder_is_said_before_any_work(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(StageError, match="expected a folder"):
        networks.run(Hardware.choose("cpu"), 2, file)
    with pytest.raises(StageError, match="expected cpu or cuda, got 'meta'"):
        networks.run(Hardware(torch.device("meta"), 1), 2, tmp_path)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), StageError),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), StageError),
        (RuntimeError("something else"), RuntimeError),
    ],
)
def test_too_many_images_for_the_memory_are_said(monkeypatch, tmp_path, error, expected) -> None:
    def fails(*_: object) -> float:
        raise error

    monkeypatch.setattr(networks, "systems", tiny)
    monkeypatch.setattr(networks, "milliseconds", fails)
    with pytest.raises(expected) as raised:
        networks.run(Hardware.choose("cpu"), 2, tmp_path, batch=2)
    assert raised.type is expected
    assert not list(tmp_path.iterdir())
