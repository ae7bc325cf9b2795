"""The CUDA path of the fast chain, on a CPU with fakes for what CUDA does; and on CUDA if there."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from torch import Generator, Tensor

from defense.energy import ConvEnergy
from defense.fast import langevin as fast_langevin
from defense.fast.langevin import FastLangevin
from defense.fast.precision import Precision
from defense.langevin import ChainLog, LangevinConfig, langevin
from tests.chains import assert_same_log, make_energy, make_images, relative_difference, seeded


class FakeGraph:
    """A CUDA graph for machines without: replaying it runs again what was recorded."""

    recording: "FakeGraph | None" = None

    def __init__(self) -> None:
        self.calls: list[tuple[Any, int, ChainLog | None]] = []
        self.replays = 0

    def register_generator_state(self, generator: Generator) -> None:
        self.generator = generator

    def replay(self) -> None:
        self.replays += 1
        for graphs, steps, log in self.calls:
            assert graphs.call.generator is self.generator
            again = ADVANCE(graphs, steps)
            for static, rows in zip(rows_of(log), rows_of(again), strict=True):
                static.copy_(rows)


def rows_of(log: ChainLog | None) -> list[Tensor]:
    return [] if log is None else log.energies + log.gradient_norms


ADVANCE = fast_langevin._Graphs._advance


@pytest.fixture
def fake_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CUDA path on CPU tensors, with everything of CUDA's replaced."""

    @contextmanager
    def record(graph: FakeGraph, pool: object) -> Iterator[None]:
        assert pool == "the pool"
        FakeGraph.recording = graph
        yield
        FakeGraph.recording = None

    def advance(graphs: fast_langevin._Graphs, steps: int) -> ChainLog | None:
        log = ADVANCE(graphs, steps)
        if FakeGraph.recording is not None:
            FakeGraph.recording.calls.append((graphs, steps, log))
        return log

    monkeypatch.setattr(fast_langevin._Graphs, "_advance", advance)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", record)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "Stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "current_stream", MagicMock())
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(fast_langevin, "images_at_once", lambda *about: 6)
    monkeypatch.setattr(fast_langevin, "GRAPH_STEPS", 5)


def run_graphs(
    chain: FastLangevin,
    energy: ConvEnergy,
    x: Tensor,
    steps: int,
    *,
    generator: Generator,
    tau: float = 0.01,
    log: ChainLog | None = None,
) -> Tensor:
    config = LangevinConfig(steps, tau)
    call = fast_langevin._Call(energy, x, config, generator, log, chain.precision)
    return chain._replay(call)


def test_graph_path_pads_splits_and_moves_the_generator_on(fake_graphs: None) -> None:
    energy, x, chain = make_energy(activation="silu"), make_images(count=13), FastLangevin()
    padding = torch.zeros(3, 1, 8, 8)
    mine, reference = seeded(), seeded()
    for _ in range(2):
        actual = run_graphs(chain, energy, x, 13, generator=mine)
        padded = torch.cat([x, padding])
        expected = langevin(energy, padded, LangevinConfig(13, 0.01), generator=reference)
        assert relative_difference(actual, expected[:13]) < 1e-5
        assert torch.equal(mine.get_state(), reference.get_state())
        with torch.no_grad():
            for parameter in energy.parameters():
                parameter.mul_(0.9)
    (graphs,) = chain._graphs.values()
    assert {steps: graph.replays for steps, graph in graphs.graphs.items()} == {1: 6, 5: 4}
    assert copy.deepcopy(chain)._graphs == {}


def test_graph_path_works_in_inference_mode(fake_graphs: None) -> None:
    energy, x, chain = make_energy(activation="silu"), make_images(count=13), FastLangevin()
    expected = run_graphs(chain, energy, x, 8, generator=seeded())
    with torch.inference_mode():
        inputs = x.clone()
        actual = run_graphs(chain, energy, inputs, 8, generator=seeded())
    assert torch.equal(actual, expected)
    assert torch.equal(inputs, x)


def test_graph_path_logs_every_step_of_the_images_that_were_asked_for(fake_graphs: None) -> None:
    energy, x, chain = make_energy(activation="silu"), make_images(count=13), FastLangevin()
    logs = ChainLog(), ChainLog()
    padded = torch.cat([x, torch.zeros(3, 1, 8, 8)])
    langevin(energy, padded, LangevinConfig(8, 0.01), generator=seeded(), log=logs[0])
    expected = ChainLog(*([row[:13] for row in rows] for rows in vars(logs[0]).values()))
    unlogged = run_graphs(chain, energy, x, 8, generator=seeded())
    assert torch.equal(run_graphs(chain, energy, x, 8, generator=seeded(), log=logs[1]), unlogged)
    assert_same_log(logs[1], expected)
    assert len(chain._graphs) == 2


def test_every_energy_batch_and_step_size_has_graphs_of_its_own(fake_graphs: None) -> None:
    chain = FastLangevin()
    cases = [("silu", 13, 0.01), ("silu", 13, 0.02), ("silu", 40, 0.02), ("softplus", 40, 0.02)]
    for activation, count, tau in cases:
        energy, x = make_energy(activation=activation), make_images(count=count)
        ends = [
            run_graphs(used, energy, x, 8, tau=tau, generator=seeded())
            for used in (chain, FastLangevin())
        ]
        assert torch.equal(*ends)
    assert len(chain._graphs) == len(cases)


def test_recording_and_replaying_leave_an_energy_alone(fake_graphs: None) -> None:
    chain, energies = FastLangevin(), [make_energy(seed=1), make_energy(seed=2)]
    before = copy.deepcopy(energies[0].state_dict())
    for energy in energies:
        run_graphs(chain, energy, make_images(), 5, generator=seeded())
    after = energies[0].state_dict()
    assert all(torch.equal(value, before[name]) for name, value in after.items())


@pytest.mark.parametrize(("precision", "allowed"), [("float32", False), ("tf32", True)])
def test_graphs_are_recorded_in_the_precision(
    fake_graphs: None, monkeypatch: pytest.MonkeyPatch, precision: Precision, allowed: bool
) -> None:
    seen, advance = set(), fast_langevin._Call.advance

    def spy(call: fast_langevin._Call, steps: int, most: int) -> None:
        seen.add(torch.backends.cudnn.allow_tf32)
        advance(call, steps, most)

    monkeypatch.setattr(fast_langevin._Call, "advance", spy)
    chain = FastLangevin(precision=precision)
    run_graphs(chain, make_energy(), make_images(), 5, generator=seeded())
    assert seen == {allowed}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_agree_with_the_plain_chain() -> None:
    energy, x = make_energy("paper", "silu").cuda(), make_images("paper", count=16).cuda()
    chain, config = FastLangevin(), LangevinConfig(steps=53, tau=0.01)
    generators = [Generator("cuda").manual_seed(3) for _ in range(2)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        for _ in range(2):
            expected = langevin(energy, x, config, generator=generators[0])
            actual = chain(energy, x, config, generator=generators[1])
            assert relative_difference(actual, expected) < 1e-4
            with torch.no_grad():
                energy.layers[0].weight.mul_(1.1)
    assert torch.equal(generators[0].get_state(), generators[1].get_state())
