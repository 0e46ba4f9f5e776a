"""What the benchmarks do on a GPU only, on CPU tensors: who is asked, how time is taken, what is named."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch

import rskernels
import rsmodels
from benchmarks import (
    SUITES,
    attention_peers,
    cross_attention,
    crossearth,
    distillation_loss,
    ktda,
    lora,
    measure,
    models,
    rel_pos_attention,
    report,
)
from benchmarks.measure import Case, first_calls

# What cannot be here: kernels for CUDA, and packages that nobody installs for a CPU.
ABSENT = (
    "No available kernel",
    "No viable backend",
    "No module named",
    "FlexAttention does not support backward",
)


@pytest.fixture
def as_on_gpu(monkeypatch):
    """The suites believe that they are on a GPU; tensors stay here, and nothing is compiled."""
    for module in (*SUITES.values(), report, measure):
        if hasattr(module, "on_gpu"):
            monkeypatch.setattr(module, "on_gpu", lambda: True)
    monkeypatch.setattr(torch, "compile", lambda form, **_: form)
    for function in (attention_peers.flex_masked, rel_pos_attention._flex):
        function.cache_clear()
    yield
    for function in (attention_peers.flex_masked, rel_pos_attention._flex):
        function.cache_clear()


def small(monkeypatch, module, shapes):
    monkeypatch.setattr(module, "SHAPES", shapes)
    monkeypatch.setattr(module, "batches", lambda: 1)


def run(module, expected):
    """Every candidate of every float32 case runs and agrees, but for those that cannot be here."""
    seen = set()
    for case in module.cases():
        if case.dtype != torch.float32:
            continue
        calls = case.build()
        errors, missing = first_calls(case, calls)
        seen |= set(calls)
        for name, reason in missing.items():
            assert any(text in reason for text in ABSENT), (case.name, name, reason)
        assert {case.ours, case.reference} <= set(errors)
    assert expected <= seen, expected - seen


@pytest.mark.filterwarnings("ignore::UserWarning")  # why a backend cannot serve, said at length
def test_attentions_peers(as_on_gpu, monkeypatch):
    Shape = rel_pos_attention.Shape
    small(monkeypatch, rel_pos_attention, [Shape(1, 6, 5, heads=2, d=16), Shape(1, 6, 5, 4, heads=2, d=16)])
    biased = {f"sdpa, {name} + bias" for name in ("efficient", "cuDNN", "math")}
    others = {"xformers + bias", "flex, compiled", "eager, compiled"}
    run(rel_pos_attention, biased | others | set(rel_pos_attention.FLOORS))
    small(monkeypatch, rel_pos_attention, [Shape(1, 30, 1, heads=2, d=16, tables=False)])
    run(rel_pos_attention, {"sdpa, flash", "sdpa, cuDNN", "xformers"})


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_cross_attentions_peers(as_on_gpu, monkeypatch):
    Shape = cross_attention.Shape
    shapes = [
        Shape("plain", 2, 2, 5, 7, 16),
        Shape("masked", 2, 2, 5, 64, 16, side=8),
        Shape("rein", 2, 1, 5, 7, 32, rein=True),
    ]
    small(monkeypatch, cross_attention, shapes)
    run(cross_attention, {"sdpa, flash", "sdpa, efficient", "flex, compiled", "xformers"})


def test_loras_and_the_distillation_losss_peers(as_on_gpu, monkeypatch):
    small(monkeypatch, lora, [(1, 6, 32, 4)])
    run(lora, {"PEFT, q, k, v apart", "without LoRA"})
    small(monkeypatch, distillation_loss, [(2, 8, 4, 4)])
    run(distillation_loss, {"Liger's KL"})


@pytest.mark.parametrize("step", [True, False])
def test_ktda_is_measured_channels_last_too(as_on_gpu, monkeypatch, step):
    torch.manual_seed(0)
    model = rsmodels.create_model("ktda_tiny", num_classes=5, image_size=64).train()
    teacher = rsmodels.create_teacher("dinov2_vit_tiny", image_size=64)

    def loss(images, mask):
        batch = {"image": images, "mask": mask, "teacher": teacher(images)}
        return torch.stack(list(model.losses(batch).values())).sum()

    peer = SimpleNamespace(predict=model, loss=loss)
    monkeypatch.setattr(ktda, "_models", lambda size: (model, teacher, peer))
    monkeypatch.setattr(ktda, "batches", lambda: 2)
    build = partial(ktda._build_step, 64, 2) if step else partial(ktda._build_prediction, 64)
    calls = build(torch.float32)
    case = next(case for case in ktda.cases() if case.name.startswith("both") == step)
    errors, missing = first_calls(case, calls)
    assert set(errors) == {ktda.OURS, ktda.CHANNELS_LAST, ktda.PEER} and not missing
    assert ktda.CHANNELS_LAST in case.beside
    theirs, ours = (calls[name].args[0] for name in (ktda.CHANNELS_LAST, ktda.OURS))
    layout = torch.channels_last
    wide = [name for name, p in model.named_parameters() if p.dim() == 4 and min(p.shape[1:]) > 1]
    assert wide and all(theirs.get_parameter(name).is_contiguous(memory_format=layout) for name in wide)
    assert all(ours.get_parameter(name).is_contiguous() for name in wide)


class FakeEvent:
    """Milliseconds of a clock that only `tick` moves."""

    now = 0.0
    log: list[str]

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = FakeEvent.now
        FakeEvent.log.append("event")

    def synchronize(self):
        FakeEvent.log.append("wait")

    def elapsed_time(self, end):
        return end.at - self.at


def test_a_gpus_clock_is_between_its_events(as_on_gpu, monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(FakeEvent, "log", log := [], raising=False)
    fill = SimpleNamespace(zero_=lambda: log.append("fill"))
    monkeypatch.setattr(measure, "_larger_than_caches", lambda where: fill)

    def call(milliseconds):
        FakeEvent.now += milliseconds
        log.append("call")

    times = measure.seconds({"a": lambda: call(4), "b": lambda: call(6)}, warm=True, budget=0)
    assert times == {"a": pytest.approx(4e-3), "b": pytest.approx(6e-3)}
    assert log[:5] == ["fill", "event", "call", "event", "wait"] and log.count("call") == 6


def test_on_a_gpu_kernels_serve_that_are_on_request_elsewhere():
    with pytest.raises(KeyboardInterrupt), measure.on("cuda"):
        assert measure.on_gpu() and torch.backends.cudnn.benchmark
        assert rskernels.get_backend() == "auto+triton"
        assert torch.float16 in measure.dtypes() and measure.batches() > 1
        raise KeyboardInterrupt
    assert rskernels.get_backend() == "auto"
    assert not measure.on_gpu() and measure.device().type == "cpu"


def test_cases_on_a_gpu_have_names_of_their_own():
    with measure.on("cuda"):
        on_gpu = {suite: module.cases() for suite, module in SUITES.items()}
    for suite, module in SUITES.items():
        names = [case.name for case in on_gpu[suite]]
        assert len(set(names)) == len(names), suite
        assert not set(names) & {case.name for case in module.cases()} or suite == "layer_norm", suite
    counted = [case for suite in (models, crossearth) for case in suite.cases()]
    assert all(case.images for case in counted)


def test_results_are_named_after_the_chip(as_on_gpu, monkeypatch):
    names = {
        "NVIDIA H200": "h200",
        "NVIDIA H100 80GB HBM3": "h100",
        "NVIDIA A100-SXM4-80GB": "a100",
        "NVIDIA GeForce RTX 4090": "4090",
        "NVIDIA L40S": "l40s",
        "Some Chip": "some-chip",
    }
    for name, short in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda where, name=name: name)
        assert measure.name_of_machine() == short


def test_a_models_row_has_images_per_second_and_its_share_of_the_peak(as_on_gpu, monkeypatch):
    monkeypatch.setattr(measure, "_time", lambda call: call() is None or 0.5)
    monkeypatch.setattr(report, "peak_bytes", lambda call: 2**20)
    a, b = torch.randn(4, 8), torch.randn(8, 16)
    case = Case(
        name="forward, model",
        build=lambda: {"rskernels": lambda: a @ b, "eager": lambda: a @ b},
        dtype=torch.float32,
        images=4,
        counted="eager",
    )
    row = report.run_case(case, budget=0)
    assert row["images_per_second"]["rskernels"] == 8 and row["counted_flops"] == 2 * 4 * 8 * 16
    share = report.roofline(case, row, {"float32": 4096.0, "copy": 1.0})
    assert share == {"share_of_roofline": pytest.approx(0.5), "bound_by": "arithmetic"}


@pytest.mark.parametrize("place", ["seconds", "peak_bytes", "arithmetic"])
def test_a_fault_that_shows_late_is_why_a_case_is_not_reported(as_on_gpu, monkeypatch, place):
    def faults(*_, **__):
        raise RuntimeError("CUDA error: an illegal access\nCompile with `TORCH_USE_CUDA_DSA`")

    for name in ("seconds", "peak_bytes", "arithmetic"):
        monkeypatch.setattr(report, name, lambda calls, **_: dict.fromkeys(calls, 1) if _ else 1.0)
    monkeypatch.setattr(report, place, faults)
    x = torch.ones(3)
    calls = {"rskernels": lambda: x + x, "eager": lambda: 2 * x}
    case = Case(name="late", build=lambda: calls, dtype=torch.float32, counted="eager")
    assert report.run_case(case) == {
        "case": "late",
        "not_reported": "RuntimeError: CUDA error: an illegal access",
    }


def test_a_machine_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("a CUDA device is here")
    with pytest.raises(SystemExit):
        report.main(["linear", "--device", "cuda"])
    assert "sees no CUDA device" in capsys.readouterr().err
