"""What the measuring processes of `make gpu-check` do: their order, what a failure leaves, what is kept."""

from __future__ import annotations

import json
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu_parts, gpu_pass, measure, report
from benchmarks.gpu_parts import Figures
from benchmarks.gpu_processes import told
from benchmarks.measure import Case


def test_the_targets_come_first():
    with measure.on("cuda"):
        cases = gpu_parts.operators_cases()
        whole = gpu_parts.models_cases()
    wanted = sum(map(len, gpu_parts.TARGETS.values()))
    first = [(suite, case.name) for suite, case in cases[:wanted]]
    for suite, beginnings in gpu_parts.TARGETS.items():
        for begins in beginnings:
            assert [name for one, name in first if one == suite and name.startswith(begins)], begins
    assert all(name.endswith("bfloat16") for _, name in first)
    names = [case.name for _, case in whole]
    assert names[0] == "forward, SAM ViT-B encoder, 1024 pixels, batch 8, bfloat16"
    assert {"forward, RS-SAM ViT-B, 1024 pixels, batch 8, bfloat16"} < set(names)


MACHINE = {"processor": "chip", "capability": "9", "torch": "2", "peers": {"triton": "3"}, "host": "a"}


@pytest.fixture
def figures(tmp_path, monkeypatch):
    """The results as a new process finds them."""
    monkeypatch.setattr(measure, "machine", lambda: MACHINE)
    limits = {"float32": 2e9, "copy": 3e9}
    return lambda sources="code": Figures(tmp_path / "x.json", sources, limits)


def test_results_keep_the_rows_of_other_cases(figures, monkeypatch, tmp_path):
    for row in ({"case": "a", "v": 1}, {"case": "b", "v": 2}, {"case": "a", "v": 3}):
        figures().keep("lora", row)
    figures().keep("lora", {"case": "b", "v": 4}, first=True)
    suite = json.loads((tmp_path / "x.json").read_text())["suites"]["lora"]
    assert [(row["case"], row["v"]) for row in suite["cases"]] == [("a", 3), ("b", 2)]
    assert suite["matrix_peak_gflops"] == {"float32": 2.0} and suite["copy_gbytes_per_second"] == 3
    monkeypatch.setattr(measure, "machine", lambda: MACHINE | {"host": "b", "driver": "1"})
    assert len(figures().results["suites"]["lora"]["cases"]) == 2
    monkeypatch.setattr(measure, "machine", lambda: MACHINE | {"processor": "another"})
    other = figures()
    assert other.results["suites"] == {} and "another chip" in other.note
    assert (tmp_path / "x.json.old").exists() and not (tmp_path / "x.json").exists()
    (tmp_path / "x.json").write_text("{")
    assert "is set aside" in figures().note


def test_a_second_run_goes_on_where_the_first_stopped(figures):
    cases = [("lora", SimpleNamespace(name=name)) for name in "abcd"]

    def order(sources="code"):
        return "".join(case.name for _, case in figures(sources).order(cases))

    assert order() == "abcd"
    for name in "ca":
        figures().keep("lora", {"case": name})
        time.sleep(0.002)
    assert order() == "bdca"
    figures("new code").keep("lora", {"case": "b"})
    assert order("new code") == "dcab"


def case_of(name, ours):
    x = torch.ones(3)
    return "lora", Case(name, lambda: {"rskernels": lambda: ours(x), "eager": lambda: x + x}, torch.float32)


def test_a_case_that_fails_leaves_the_others(figures, tmp_path, monkeypatch):
    """The first one's fault shows when its memory is asked for; then the device answers no more."""
    monkeypatch.setattr(report, "seconds", lambda calls, **_: dict.fromkeys(calls, 1.0))
    monkeypatch.setattr(report, "peak_bytes", lambda call: call() is None)
    uses = []

    def faults(x):
        uses.append(x)
        if len(uses) > 1:
            raise RuntimeError("CUDA error: late\nCompile with `TORCH_USE_CUDA_DSA`")
        return x + x

    cases = [case_of("a", faults), case_of("b", lambda x: 2 * x)]
    monkeypatch.setattr(measure, "on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(gpu_parts, "answers", lambda: False)
    file, until = tmp_path / "told", time.monotonic() + 100
    assert not gpu_parts.run(cases, figures(), until, file)
    problem = {"ended": "lora: a", "problem": "RuntimeError: CUDA error: late"}
    assert told(file)[1:] == [{"begun": "lora: a"}, problem]
    assert gpu_parts.run(cases, figures(), until, file)  # the next process
    *_, last, left = told(file)
    assert last["ended"] == "lora: b" and last["said"] and left == {"left": 0}
    rows = {row["case"]: row for row in figures().results["suites"]["lora"]["cases"]}
    assert rows["a"]["not_reported"] and rows["b"]["ratio"] == {"eager": 1.0}


def test_no_case_is_begun_that_is_likely_to_be_cut_off(figures, tmp_path, monkeypatch):
    monkeypatch.setattr(report, "run_case", lambda case, **_: {"case": case.name, "not_reported": "fake"})
    cases = [case_of("long", None), case_of("short", None)]
    file = tmp_path / "told"
    assert gpu_parts.run(cases, figures(), time.monotonic() + gpu_parts.GRACE - 1, file)
    assert told(file)[1:] == [{"left": 2}]
    figures().keep("lora", {"case": "long", "took_seconds": 90.0})
    assert gpu_parts.run(cases, figures(), time.monotonic() + gpu_parts.GRACE + 9, file)
    begun = [line["begun"] for line in told(file) if "begun" in line]
    assert begun == ["lora: short"] and told(file)[-1] == {"left": 1}


def test_a_pass_names_every_operator_and_what_failed(tmp_path, monkeypatch, capsys):
    def broken(dtype):
        raise RuntimeError("Triton Error: no\nmore")

    def fine(dtype):
        return gpu_pass.some(3, dtype=dtype)

    file = tmp_path / "told"
    monkeypatch.setattr(gpu_pass, "CALLS", (broken, fine))
    assert gpu_pass.run(file)
    problems = {line["ended"]: line["problem"] for line in told(file) if "ended" in line}
    assert problems["broken, float32"] == problems["broken, bfloat16"] == "RuntimeError: Triton Error: no"
    assert problems["fine, bfloat16"] == "" and len(problems) == 4
    assert "fine, float32 ...\nfine, float32: done\n" in capsys.readouterr().out
    file.unlink()
    monkeypatch.setattr(gpu_pass, "answers", lambda: False)
    assert not gpu_pass.run(file) and len(told(file)) == 2
