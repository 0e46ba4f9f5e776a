"""Tiles to probabilities: batches are read ahead, full ones replayed from a CUDA graph on request."""

from __future__ import annotations

import contextlib
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

import rsmodels
from rsmodels.evaluation import inference
from rsmodels.evaluation.cuda_graphs import WARM_UP, GraphedForward
from rsmodels.evaluation.inference import check_cuda_graph, predict_tiles

CPU = torch.device("cpu")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Doubles:
    """images (B, 3, 8, 8) → twice their channels; notes what is read and computed."""

    num_classes, image_size, training = 3, (8, 8), False
    preprocessing = rsmodels.registry.Preprocessing((0.0,) * 3, (1.0,) * 3)

    def __init__(self) -> None:
        self.events: list[str] = []

    def __call__(self, images: Tensor) -> Tensor:
        self.events.append(f"compute {len(images)}")
        return 2 * images

    def probabilities(self, logits: Tensor) -> Tensor:
        return logits

    def tiles(self, values: list[float | None]):
        for index, value in enumerate(values):
            self.events.append(f"read {index}")
            yield index, None if value is None else torch.full((3, 6, 5), value)


def test_the_next_batch_is_read_before_a_result_is_asked_for() -> None:
    model = Doubles()
    results = []
    for key, score in predict_tiles(model, model.tiles([1, None, 2, 3]), batch_size=2, device=CPU):
        model.events.append(f"result {key}")
        results.append(None if score is None else score[0, 0, 0].item())
        assert score is None or score.shape == (3, 6, 5)
    assert results == [2, None, 4, 6]
    first = ["read 0", "read 1", "read 2", "compute 2", "read 3", "result 0", "result 1", "result 2"]
    assert model.events == [*first, "compute 1", "result 3"]


def test_what_is_not_finite_is_noticed() -> None:
    model = Doubles()
    assert [s is None for _, s in predict_tiles(model, model.tiles([None]), batch_size=2, device=CPU)] == [
        True
    ]
    seen = list(predict_tiles(model, model.tiles([float("inf")]), batch_size=1, device=CPU))
    assert seen[0][1].isinf().all()  # it was so in the image
    model.preprocessing = rsmodels.registry.Preprocessing((0.0,) * 3, (1e-38,) * 3)
    with pytest.raises(ValueError, match="output is not finite"):
        list(predict_tiles(model, model.tiles([1e3]), batch_size=1, device=CPU))


def test_a_cuda_graph_without_a_cuda_device_is_refused() -> None:
    check_cuda_graph(False, CPU)
    with pytest.raises(ValueError, match="cuda_graph: the device is cpu; use a cuda device, or leave"):
        check_cuda_graph(True, CPU)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Recording and replaying on the CPU: a replay computes anew, into the memory of the recording. Counts
    both; holds the runner that replays, and a fault to meet while recording."""
    state = SimpleNamespace(recorded=0, replayed=0, runner=None, fault=None)

    class Graph:
        def replay(self) -> None:
            state.replayed += 1
            state.runner.result.copy_(state.runner.forward(state.runner.images))

    @contextlib.contextmanager
    def graph(_graph: Graph, **_options):
        if state.fault:
            raise RuntimeError(state.fault)
        yield
        state.recorded += 1

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "device", lambda _device: contextlib.nullcontext())
    return state


def test_full_batches_are_replayed_from_the_third_on(recorder: SimpleNamespace) -> None:
    recorder.runner = runner = GraphedForward(lambda images: 2 * images, (2, 3))
    inputs = [torch.full((2, 3), float(i)) for i in range(6)]
    results = [runner(images) for images in inputs]
    for images, result in zip(inputs, results, strict=True):  # none is overwritten by a later replay
        assert torch.equal(result, 2 * images)
    assert (recorder.recorded, recorder.replayed) == (1, len(inputs) - WARM_UP)
    assert torch.equal(runner(torch.ones(1, 3)), torch.full((1, 3), 2.0))
    assert runner.graph is None and runner.images is None  # their memory was free for the other shape
    assert torch.equal(runner(inputs[1]), 2 * inputs[1]) and recorder.recorded == 2


def test_what_cannot_be_recorded_runs_without_after_one_warning(recorder: SimpleNamespace) -> None:
    recorder.fault = "operation not permitted when stream is capturing\nmore"
    runner = GraphedForward(lambda images: 2 * images, (1, 2))
    for index in range(5):
        images = torch.full((1, 2), float(index))
        if index == WARM_UP:
            with pytest.warns(
                UserWarning, match=r"not permitted when stream is capturing\); it runs without"
            ):
                found = runner(images)
        else:
            found = runner(images)
        assert torch.equal(found, 2 * images)
    assert runner.graph is None and runner.images is None


def test_predict_tiles_hands_full_batches_to_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    class Spy(GraphedForward):
        def __call__(self, images: Tensor) -> Tensor:
            seen.append(tuple(images.shape) == self.shape)
            return self.forward(images)

    monkeypatch.setattr(inference, "GraphedForward", Spy)
    model = Doubles()
    stream = predict_tiles(model, model.tiles([1, 2, 3, 4, 5]), batch_size=2, device=CPU, cuda_graph=True)
    assert [score[0, 0, 0].item() for _, score in stream] == [2, 4, 6, 8, 10]
    assert seen == [True, True, False]


@needs_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", rsmodels.list_models("*_tiny"))
def test_replayed_is_eager_on_a_device(name: str, dtype: torch.dtype, recwarn) -> None:
    torch.manual_seed(0)
    model = rsmodels.create_model(name, num_classes=3, image_size=64).eval().cuda()
    pixels = [255 * torch.rand(3, 64, 64) for _ in range(9)]
    run = partial(predict_tiles, model, batch_size=2, device=torch.device("cuda"), dtype=dtype)
    eager = [score for _, score in run(enumerate(pixels))]
    replayed = [score for _, score in run(enumerate(pixels), cuda_graph=True)]
    for found, expected in zip(replayed, eager, strict=True):
        torch.testing.assert_close(found, expected)
    assert not [w for w in recwarn if "CUDA graph" in str(w.message)]


@needs_cuda
def test_a_model_that_looks_at_values_runs_eagerly_on_a_device() -> None:
    class Looks(Doubles):
        def __call__(self, images: Tensor) -> Tensor:
            return 2 * images if images.any() else images

    model = Looks()
    stream = predict_tiles(
        model, model.tiles([1.0] * 5), batch_size=1, device=torch.device("cuda"), cuda_graph=True
    )
    with pytest.warns(UserWarning, match="cannot be recorded as a CUDA graph"):
        assert [score[0, 0, 0].item() for _, score in stream] == [2] * 5
    assert torch.ones(2, device="cuda").sum().item() == 2  # the device is as before
