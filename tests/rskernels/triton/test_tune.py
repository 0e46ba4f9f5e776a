"""The tuner on a tiny operator: what it tries, refuses, keeps and stores, and that launches then use it.

Time is a fake clock's; the kernels run in Triton's interpreter, or on the device where there is one.
"""

import importlib
import json
import os
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from rskernels import __main__ as command
from rskernels import __version__, dispatch, tuning
from rskernels.triton import aot, launch
from rskernels.triton import tune as tuner

CAPABILITY = 90


@triton.jit
def scale_rows(x, out, index, size, BLOCK: tl.constexpr, WRONG: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    rows = tl.load(index + at, at < size, 0)
    tl.store(out + at, tl.load(x + rows, at < size, 0.0) * (3.0 if WRONG else 2.0), at < size)


@triton.jit
def add_one(x, out, size, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at, at < size, 0.0) + 1.0, at < size)


SHIPPED = {
    "tiny.scale": {"default": {"BLOCK": 16, "WRONG": 0}, "float/large": {"BLOCK": 32, "WRONG": 0}},
    "tiny.add": {"default": {"BLOCK": 16}},
}
CANDIDATES = {
    "scale": [
        {"BLOCK": 32, "WRONG": 0},
        {"BLOCK": 64, "WRONG": 0},
        {"BLOCK": 128, "WRONG": 1},
        {"BLOCK": 48, "WRONG": 0},  # no power of two
        {"BLOCK": 256, "WRONG": 0},
        {"BLOCK": 512},
    ],
    "add": [{"BLOCK": 16}, {"BLOCK": 32}],
}


def forward(x):
    constants = launch.config("tiny.scale", "float/large", x.device)
    index = torch.arange(x.numel() - 1, -1, -1, device="cpu" if x.is_meta else x.device)
    doubled, out = x.new_empty(x.shape), x.new_empty(x.shape)
    size = x.numel()
    launch.launch(
        scale_rows, (launch.cdiv(size, constants["BLOCK"]),), x, doubled[:], index, size, **constants
    )
    more = launch.config("tiny.add", "float/odd", x.device)
    launch.launch(add_one, (launch.cdiv(size, more["BLOCK"]),), doubled, out, size, **more)
    return out


@pytest.fixture
def tiny(monkeypatch, tmp_path, device):
    """An operator "tiny" with configurations of its own, and a user's cache."""
    module = ModuleType("rskernels.triton.tiny")
    module.examples = lambda: [
        ("100 numbers", lambda: forward(torch.empty(100))),
        ("200, never touched", lambda: forward(torch.empty(200, device="meta"))),
    ]
    module.candidates = lambda kernel, shape_class: CANDIDATES[kernel]
    monkeypatch.setitem(sys.modules, "rskernels.triton.tiny", module)
    monkeypatch.setattr(tuner.aot, "OPERATORS", ("tiny",))
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / f"tiny.sm{CAPABILITY}.json").write_text(json.dumps(SHIPPED))
    for place in (launch, tuner):
        monkeypatch.setattr(place, "CONFIGS", configs)
        if hasattr(place, "capability_of"):
            monkeypatch.setattr(place, "capability_of", lambda device: CAPABILITY)
    monkeypatch.setenv("RSKERNELS_TUNING", str(tmp_path / "cache" / "tuning.json"))
    launch.shipped.cache_clear()
    tuning.forget_triton()
    yield SimpleNamespace(configs=configs, file=tmp_path / "cache" / f"tuning.sm{CAPABILITY}.json")
    launch.shipped.cache_clear()
    tuning.forget_triton()


class Clock:
    """A call takes as long as its launches of a configuration are said to."""

    def __init__(self, monkeypatch, seconds):
        self.timed, self.total = [], 0.0
        real = launch.launch

        def counting(kernel, grid, *arguments, **constants):
            self.total += seconds.get((kernel.fn.__name__, constants["BLOCK"]), 1.0)
            self.timed.append((kernel.fn.__name__, constants["BLOCK"], constants.get("WRONG")))
            real(kernel, grid, *arguments, **constants)

        monkeypatch.setattr(launch, "launch", counting)

    def __call__(self, call):
        self.total, self.timed = 0.0, []
        call()
        self.seen = [*getattr(self, "seen", []), *self.timed]
        return self.total


def test_the_fastest_right_configuration_is_kept(tiny, device, monkeypatch, capsys):
    clock = Clock(monkeypatch, {("scale_rows", 64): 0.5, ("scale_rows", 256): 0.8, ("add_one", 32): 0.99})
    found = {row.kernel: row for row in tuner.tune(device, timer=clock)}
    scale = found["tiny.scale"]
    assert scale.constants == {"BLOCK": 64, "WRONG": 0} and scale.share_of_time == 0.5
    reasons = {json.loads(key)["BLOCK"]: reason for key, reason in scale.refused.items()}
    assert reasons[128] == "another answer than the shipped configuration's"
    assert "power" in reasons[48] or "48" in reasons[48]
    assert reasons[512] == "other constants than the shipped"
    assert scale.tried == 5 and set(reasons) == {48, 128, 512}
    # Not faster by the margin: what is shipped stays.
    assert found["tiny.add"].constants == {"BLOCK": 16} and found["tiny.add"].share_of_time == 1
    # A wrong one's time is never taken, and only launches that a choice concerns are timed.
    assert not any(wrong for _, _, wrong in clock.seen)
    assert {name for name, _, _ in clock.timed} == {"scale_rows"}
    assert "0.50 of its time" in capsys.readouterr().out


def test_launches_use_what_was_tuned(tiny, device, monkeypatch):
    tuner.tune(device, timer=Clock(monkeypatch, {("scale_rows", 64): 0.5}))
    stored = json.loads(tiny.file.read_text())
    assert stored["configs"] == {"tiny.scale": {"float/large": {"BLOCK": 64, "WRONG": 0}}}
    assert stored["version"] == __version__ and stored["capability"] == CAPABILITY
    assert [path.name for path in tiny.file.parent.iterdir()] == [tiny.file.name]
    gpu = torch.device("cuda", 0)
    assert launch.config("tiny.scale", "float/large", gpu) == {"BLOCK": 64, "WRONG": 0}
    assert launch.config("tiny.scale", "half/small", gpu) == SHIPPED["tiny.scale"]["default"]
    # The interpreter and the ahead-of-time compiler are asked about the package.
    assert launch.config("tiny.scale", "float/large", torch.device("cpu"))["BLOCK"] == 32
    with launch.noting(CAPABILITY):
        assert launch.config("tiny.scale", "float/large", gpu)["BLOCK"] == 32
    # What was measured is not measured anew, unless asked.
    assert tuner.tune(device, timer=Clock(monkeypatch, {})) == []
    assert json.loads(tiny.file.read_text()) == stored
    # Slower the next time: the package's again.
    tuner.tune(device, again=True, timer=Clock(monkeypatch, {}))
    assert json.loads(tiny.file.read_text())["configs"] == {}
    assert launch.config("tiny.scale", "float/large", gpu)["BLOCK"] == 32


def test_replayed_launches_compute_what_the_operator_does(tiny, device):
    """Indices are the example's, floats are numbers, and the second launch reads what the first one wrote."""
    with launch.noting(CAPABILITY) as launches:
        forward(torch.empty(100))
    replay = tuner.Replay(launches, device)
    x = replay.launches[0].arguments[0].clone()
    replay.run()
    assert x.std() > 0.1
    torch.testing.assert_close(replay.launches[1].arguments[1], 2 * x.flip(0) + 1)
    assert len(replay.written()) == 2


def test_numbers_that_mean_something_stay(device):
    places = launch.meaningful(torch.rand(64))
    with launch.noting(CAPABILITY) as launches:
        launch.launch(add_one, (1,), places, torch.empty(64), 64, BLOCK=64)
    moved, _, _ = tuner.Replay(launches, device).launches[0].arguments
    assert torch.equal(moved.cpu(), places)


def test_a_shipped_configuration_that_does_not_run_is_said_and_passed(tiny, device, monkeypatch, capsys):
    broken = json.loads(json.dumps(SHIPPED))
    broken["tiny.scale"]["float/large"]["BLOCK"] = 48
    (tiny.configs / f"tiny.sm{CAPABILITY}.json").write_text(json.dumps(broken))
    found = tuner.tune(device, timer=Clock(monkeypatch, {}))
    assert [row.tried for row in found] == [0, 0] and all("shipped" in row.refused for row in found)
    assert "not measured, the shipped one does not run" in capsys.readouterr().out


def test_a_fault_of_the_device_ends_it_and_the_next_run_begins_behind(tiny, device, monkeypatch):
    def faulty(call):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        tuner.tune(device, timer=faulty)
    (row,) = tuner.tune(device, timer=Clock(monkeypatch, {}))
    assert json.loads(tiny.file.read_text())["configs"] == {} and row.kernel == "tiny.scale"


def test_a_class_of_two_modules_is_measured_once(tiny, device, monkeypatch):
    monkeypatch.setitem(sys.modules, "rskernels.triton.tiny_backward", sys.modules["rskernels.triton.tiny"])
    monkeypatch.setattr(tuner.aot, "OPERATORS", ("tiny", "tiny_backward"))
    found = tuner.tune(device, timer=Clock(monkeypatch, {("scale_rows", 64): 0.5}))
    assert sorted(row.kernel for row in found) == ["tiny.add", "tiny.scale"]


def test_what_crashes_the_compiler_is_found_out_in_processes_of_its_own(tmp_path):
    class Kernel:
        def __init__(self, number):
            self.number = number

        def warmup(self, grid):
            if self.number in (0, 3):
                os._exit(9)
            (tmp_path / str(self.number)).touch()

    launches = [launch.Launch(Kernel(number), (1,), (), {}) for number in range(6)]
    assert aot.warm(launches, CAPABILITY, jobs=2) == {0, 3}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2", "4", "5"]


def test_the_time_that_is_over_ends_it(tiny, device, monkeypatch, capsys):
    assert tuner.tune(device, seconds=-1, timer=Clock(monkeypatch, {})) == []
    assert "are over" in capsys.readouterr().out and not tiny.file.exists()


def test_developers_put_it_into_the_package(tiny, device, monkeypatch):
    found = tuner.tune(device, timer=Clock(monkeypatch, {("scale_rows", 64): 0.5}))
    (file,) = tuner.write_package(found, CAPABILITY)
    expected = json.loads(json.dumps(SHIPPED))
    expected["tiny.scale"]["float/large"]["BLOCK"] = 64
    assert file == tiny.configs / f"tiny.sm{CAPABILITY}.json" and json.loads(file.read_text()) == expected
    assert '  "float/large": {"BLOCK": 64, "WRONG": 0}\n' in file.read_text()
    with pytest.raises(ValueError, match="this GPU is sm_86"):
        tuner.write_package(found, 86)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"version": "0"}, "its version is '0'"),
        ({"capability": 80}, "its capability is 80, expected 90"),
        ({"configs": 3}, "it has no 'configs'"),
        ({"configs": {"tiny.gone": {}}}, "there is no kernel 'tiny.gone'"),
        ({"configs": {"tiny.scale": {"float": {"BLOCK": 64}}}}, "expected the constants BLOCK, WRONG"),
        ({"configs": {"tiny.add": {"float": {"BLOCK": "64"}}}}, "BLOCK is '64'"),
        ({"configs": {"tiny.add": {"float": {"BLOCK": 0}}}}, "BLOCK is 0"),
        ({"configs": {"tiny.add": {"float": {"BLOCK": 48}}}}, "BLOCK is 48"),
        ({"configs": {"tiny.add": {"float": {"BLOCK": 1048576}}}}, "BLOCK is 1048576"),
        ({"triton": "0.1"}, "its triton is '0.1'"),
        ({"configs": {"tiny.add": 5}}, "expected the constants"),
    ],
)
def test_a_file_that_is_no_good_is_one_warning(tiny, change, match):
    good = {
        "version": __version__,
        "capability": CAPABILITY,
        "triton": triton.__version__,
        "configs": {"tiny.add": {"float": {"BLOCK": 64}}},
    }
    tiny.file.parent.mkdir()
    tiny.file.write_text(json.dumps(good))
    gpu = torch.device("cuda", 0)
    assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 64}
    tuning.forget_triton()
    tiny.file.write_text(json.dumps(good | change))
    with pytest.warns(RuntimeWarning, match=match) as warned:
        for _ in range(2):
            assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 16}
    assert len(warned) == 1
    tuning.forget_triton()
    tiny.file.write_text("{")
    with pytest.warns(RuntimeWarning, match="ignoring the tuned configurations"):
        assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 16}


def test_a_restored_record_holds_whatever_the_files_say(tiny):
    """A resumed run sums in the same tiles, though someone tuned meanwhile."""
    known = {"version": __version__, "capability": CAPABILITY, "triton": triton.__version__}
    gpu = torch.device("cuda", 0)
    tiny.file.parent.mkdir()

    def store(block):
        tiny.file.write_text(json.dumps(known | {"configs": {"tiny.add": {"float": {"BLOCK": block}}}}))

    untuned = tuning.record()
    store(64)
    tuned = json.loads(json.dumps(tuning.record()))
    assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 64}
    store(32)
    tuning.restore(tuned)
    assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 64} and tuning.record() == tuned
    tuning.restore(untuned)
    assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 16}
    tuning.restore({**tuned, "triton": {str(CAPABILITY): known | {"version": "0.0", "configs": {}}}})
    with pytest.warns(RuntimeWarning, match="in the record that was restored: its version is '0.0'"):
        assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 16}
    tuning.forget_triton()
    assert launch.config("tiny.add", "float", gpu) == {"BLOCK": 32}


def test_tables_switched_off(tiny, device, monkeypatch):
    tiny.file.parent.mkdir()
    tiny.file.write_text("{")
    monkeypatch.setenv("RSKERNELS_TUNING", "off")
    assert tuning.triton_path(CAPABILITY) is None
    assert launch.config("tiny.add", "float", torch.device("cuda", 0)) == {"BLOCK": 16}
    with pytest.raises(ValueError, match="RSKERNELS_TUNING is 'off'"):
        tuner.tune(device)


@pytest.mark.parametrize("operator", aot.OPERATORS)
def test_every_class_of_an_operator_has_candidates(operator):
    """A few, and with the constants that the package's configurations have; kernels go by their own names."""
    module = importlib.import_module(f"rskernels.triton.{operator}")
    classes = tuner.classes_of(module.examples(), CAPABILITY)
    assert classes
    for kernel, shape_class in classes:
        rows = launch.shipped(CAPABILITY)[kernel]
        names = set(rows.get(shape_class, rows["default"]))
        found = module.candidates(kernel.partition(".")[2], shape_class)
        assert 1 <= len(found) <= 12, (kernel, shape_class)
        assert all(set(one) == names for one in found), (kernel, shape_class)


def test_the_command_tunes_on_a_gpu_only(tiny, device, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["rskernels", "tune", "--write-package"])
    monkeypatch.setitem(dispatch.UNAVAILABLE, "triton", "PyTorch sees no CUDA device")
    assert command.main() == 2
    assert "--write-package: PyTorch sees no CUDA device" in capsys.readouterr().err
    # As on a machine with a GPU; the products of the CPU are not this test's.
    monkeypatch.delitem(dispatch.UNAVAILABLE, "triton")
    monkeypatch.setattr(command, "tune", lambda: None)
    real = tuner.tune
    timer = Clock(monkeypatch, {("scale_rows", 64): 0.5})
    monkeypatch.setattr(tuner, "tune", lambda **options: real(device, timer=timer, **options))
    assert command.main() == 0
    assert tiny.file.exists() and "written: " in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["rskernels", "tune", "--operators", "linear"])
    assert command.main() == 2
    assert "'linear' has no Triton kernels; there are tiny" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["rskernels", "tune", "--seconds", "-3"])
    assert command.main() == 2
    assert "--seconds -3: expected a number above 0" in capsys.readouterr().err


def test_operators_go_by_their_public_names():
    assert tuner.modules_of(["lora_qkv", "lora_linear"]) == ["lora"]
    assert tuner.modules_of(["dilated_aspp"]) == ["dilated_aspp", "dilated_aspp_backward"]
    assert tuner.modules_of(None) is None
    with pytest.raises(ValueError, match="'lo' has no Triton kernels; there are rel_pos_attention, "):
        tuner.modules_of(["lo"])
