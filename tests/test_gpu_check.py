"""The plan of `make gpu-check`, and how it reads what its processes say. No part is run."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_parts, measure
from benchmarks.gpu_check import PARTS, Check, Command, Outcome
from rskernels.triton import aot

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def check(tmp_path):
    return Check(dry=False, output=tmp_path / "out", scratch=tmp_path, name="h200", capability=90)


def test_the_whole_check_ends_within_nine_minutes():
    assert sum(PARTS.values()) <= 530
    assert all(seconds > 2 * gpu_check.GRACE for seconds in PARTS.values())


@pytest.mark.parametrize("dry", [False, True])
def test_every_part_has_a_plan(tmp_path, dry, monkeypatch):
    monkeypatch.setattr(gpu_check, "operators", lambda: ["lora"])
    check = Check(dry=dry, output=tmp_path, scratch=tmp_path)
    plan = {part: check.commands(part, seconds) for part, seconds in PARTS.items()}
    assert all(plan.values())
    for commands in plan.values():
        assert len({command.name for command in commands}) == len(commands)
    files = {path.stem for path in (ROOT / "tests/rskernels/triton").glob("test_*.py")}
    names = [command.name for command in plan["correctness"]]
    assert files <= set(names) and ("pass" in names) != dry
    tests = [
        argument for command in plan["correctness"] for argument in command.arguments if "::" in argument
    ]
    assert bool(tests) == dry and all((ROOT / test.split("::")[0]).exists() for test in tests)
    assert [command.name for command in plan["sanitizer"]] == (["pass"] if dry else ["memcheck", "racecheck"])
    flags = " ".join(plan["benchmark"][0].arguments)
    assert f"--device {'cpu' if dry else 'cuda'}" in flags and f"--seconds {PARTS['benchmark'] - 12}" in flags
    assert ("TORCHDYNAMO_DISABLE" in plan["models"][0].environment) == dry
    assert "--chips 90" in " ".join(plan["aot"][0].arguments)


def test_its_list_of_operators_is_that_of_the_compiler():
    assert gpu_check.operators() == list(aot.OPERATORS)


def test_processes_run_side_by_side_and_end_in_time(tmp_path):
    def python(name, code, **environment):
        return Command(name, (sys.executable, "-c", code), environment)

    commands = [
        python("fine", "import os; print('noise'); print('{\"a\": ' + os.environ['B'] + '}')", B="3"),
        python("bad", "raise SystemExit('no good')"),
        Command("missing", ("no-such-program",)),
    ]
    found = {one.name: one for one in gpu_check.run(commands, 60, os.environ, 2)}
    assert found["fine"].code == 0 and found["fine"].last_json() == {"a": 3}
    assert found["bad"].code == 1 and found["bad"].last_line() == "no good"
    assert found["missing"].code == 127
    late = gpu_check.run(
        [python("slow", "import time; time.sleep(99)"), python("next", "")], 0.5, os.environ, 1
    )
    assert [(one.name, one.code) for one in late] == [("slow", None), ("next", None)]


def xml(check, name, tests, failures=0, skipped=0):
    (check.scratch / f"{name}.xml").write_text(
        f'<x><testsuite tests="{tests}" failures="{failures}" errors="0" skipped="{skipped}"/></x>'
    )


def test_correctness_needs_tests_that_passed(check):
    xml(check, "test_a", 5, skipped=1)
    xml(check, "test_b", 3)
    good = [Outcome("test_a", 0, ""), Outcome("test_b", 0, ""), Outcome("pass", 0, '{"calls": 24}')]
    verdict = check.verdict("correctness", good)
    assert verdict["status"] == "passed"
    assert verdict["tests"] == {"passed": 7, "failed": 0, "skipped": 1}
    xml(check, "test_b", 3, failures=1)
    verdict = check.verdict("correctness", [good[0], Outcome("test_b", 1, "x\n1 failed, 2 passed")])
    assert verdict["status"] == "failed" and verdict["failed"] == {"test_b": "1 failed, 2 passed"}
    assert check.verdict("correctness", [good[0], Outcome("test_b", None, "")])["status"] == "cut off"
    xml(check, "test_a", 5, skipped=5)
    assert check.verdict("correctness", good[:1])["status"] == "failed"


def test_a_checker_that_is_refused_is_a_skip_that_says_so(check):
    refused = Outcome("memcheck", 1, "========= COMPUTE-SANITIZER\n========= Error: Device not supported.\n")
    fine = Outcome("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards\n")
    verdict = check.verdict("sanitizer", [refused, Outcome("racecheck", 127, "")])
    assert verdict["status"] == "skipped"
    assert verdict["skipped"] == {"memcheck": "Error: Device not supported.",
                                  "racecheck": "compute-sanitizer is not installed"}  # fmt: skip
    assert check.verdict("sanitizer", [refused, fine])["status"] == "passed"
    bad = Outcome("racecheck", 86, "========= RACECHECK SUMMARY: 2 hazards displayed\n")
    assert check.verdict("sanitizer", [refused, bad])["status"] == "failed"
    assert check.verdict("sanitizer", [Outcome("memcheck", 0, ""), bad])["status"] == "failed"


def test_other_parts_tell_what_they_found(check):
    (check.scratch / "lora.aot.json").write_text('{"rows": [["lora", "k", 90]]}')
    assert check.verdict("aot", [Outcome("lora", 0, "")])["kernels"] == [["lora", "k", 90]]
    assert check.verdict("aot", []) == {"status": "skipped", "reason": "there is nothing to run"}
    found = {"cases": 3, "left": 2, "not_reported": []}
    verdict = check.verdict("benchmark", [Outcome("benchmark", 0, f"a case\n{json.dumps(found)}\n")])
    assert verdict["status"] == "passed" and verdict["benchmark"] == found
    found["not_reported"] = ["lora, forward: rskernels: outputs disagree"]
    assert check.verdict("benchmark", [Outcome("benchmark", 0, json.dumps(found))])["status"] == "failed"


def run_main(monkeypatch, tmp_path, codes, *arguments):
    """`main` with processes that end with `codes` (0 unless named); returns its exit code and the summary."""
    about = {"processor": "NVIDIA H200", "capability": "9.0"}
    machine = json.dumps({"name": "h200", "machine": about, "capability": 90, "chip": 90})

    def run(commands, seconds, environment, at_once):
        assert environment["PYTHONPATH"].startswith(str(ROOT)) and "RSKERNELS_BACKEND" not in environment
        for command in commands:
            for argument in command.arguments:
                if argument.startswith("--junitxml="):
                    suite = '<testsuite tests="1" failures="0" errors="0" skipped="0"/>'
                    Path(argument.partition("=")[2]).write_text(suite)
        return [
            Outcome(one.name, codes.get(one.name, 0), machine if one.name == "machine" else "{}")
            for one in commands
        ]

    monkeypatch.setenv("RSKERNELS_BACKEND", "cpp")
    monkeypatch.setattr(gpu_check, "run", run)
    code = gpu_check.main(["--output", str(tmp_path), *arguments])
    files = list(tmp_path.glob("*-check.json"))
    return code, json.loads(files[0].read_text()) if files else None


def test_the_exit_code_is_that_of_correctness(monkeypatch, tmp_path, capsys):
    code, summary = run_main(monkeypatch, tmp_path, {})
    assert code == 0 and list(summary["parts"]) == list(PARTS)
    assert {path.name for path in tmp_path.iterdir()} == {"h200-check.json"}
    # One part again: what the others found stays.
    code, summary = run_main(monkeypatch, tmp_path, {"models": 1}, "--parts", "models")
    assert (
        code == 0 and summary["parts"]["models"]["status"] == "failed" and len(summary["parts"]) == len(PARTS)
    )
    assert (tmp_path / "logs" / "h200-models-models.txt").exists()
    code, summary = run_main(monkeypatch, tmp_path, {"test_tune": 1}, "--parts", "correctness")
    assert code == 1 and summary["parts"]["correctness"]["status"] == "failed"
    assert "have not passed" in capsys.readouterr().err


def test_without_a_device_it_says_what_to_do(monkeypatch, tmp_path, capsys):
    code, summary = run_main(monkeypatch, tmp_path, {"machine": 1})
    assert code == 1 and summary is None and "--dry-run" in capsys.readouterr().err
    code, summary = run_main(monkeypatch, tmp_path, {}, "--dry-run")
    assert code == 0 and summary["dry_run"] and (tmp_path / "dry-run-check.json").exists()


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


def test_results_keep_the_rows_of_other_cases(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "machine", lambda: {"processor": "chip"})
    path, limits = tmp_path / "x.json", {"float32": 2e9, "copy": 3e9}
    for row in ({"case": "a", "v": 1}, {"case": "b", "v": 2}, {"case": "a", "v": 3}):
        gpu_parts.keep(path, "lora", row, limits)
    suite = json.loads(path.read_text())["suites"]["lora"]
    assert suite["cases"] == [{"case": "a", "v": 3}, {"case": "b", "v": 2}]
    assert suite["matrix_peak_gflops"] == {"float32": 2.0} and suite["copy_gbytes_per_second"] == 3
    monkeypatch.setattr(measure, "machine", lambda: {"processor": "another"})
    gpu_parts.keep(path, "linear", {"case": "c"}, limits)
    assert list(json.loads(path.read_text())["suites"]) == ["linear"]
