"""The plan of `make gpu-check`, and what is made of what its processes tell. No part is run."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_check, gpu_parts
from benchmarks.gpu_check import PARTS, Check, Outcome
from rskernels.triton import aot

ROOT = Path(__file__).resolve().parents[1]
plan = sys.modules[Check.__module__]


@pytest.fixture
def check(tmp_path):
    return Check(dry=False, output=tmp_path / "out", scratch=tmp_path, name="h200", capability=90)


def told(*lines, code=0, output="", name="one"):
    return Outcome(name, code, output, list(lines))


def ended(name, problem="", **more):
    return {"ended": name, "problem": problem, **more}


def test_the_whole_check_ends_within_nine_minutes():
    """The question, the charts and the ends of processes are in the budgets."""
    assert plan.QUESTION + sum(part.seconds for part in PARTS.values()) + plan.CHARTS <= 535
    assert all(part.seconds > 2 * gpu_parts.GRACE for part in PARTS.values() if part.alone)
    assert max(PARTS, key=lambda name: PARTS[name].seconds) == "correctness"


@pytest.mark.parametrize("dry", [False, True])
def test_every_part_has_a_plan(tmp_path, dry, monkeypatch):
    monkeypatch.setattr(plan, "cores", lambda: 16)
    check = Check(dry=dry, output=tmp_path, scratch=tmp_path, until=1234.5)
    commands = {name: part.commands(check) for name, part in PARTS.items()}
    for some in commands.values():
        assert len({command.name for command in some}) == len(some) > 0
    first, *_, last = commands["correctness"]
    assert (first.name == "pass") != dry and last.again and last.environment["OMP_NUM_THREADS"] == "1"
    assert len(commands["correctness"]) == 16 == PARTS["correctness"].at_once()
    assert ("--few" in last.arguments) == dry == ("TRITON_INTERPRET" in last.environment)
    sanitizers = ["pass"] if dry else ["memcheck", "racecheck"]
    assert [command.name for command in commands["sanitizer"]] == sanitizers
    flags = " ".join(commands["benchmark"][0].arguments)
    assert f"--device {'cpu' if dry else 'cuda'}" in flags and "--until 1234.5" in flags
    assert ("TORCHDYNAMO_DISABLE" in commands["models"][0].environment) == dry
    assert "--chips 90" in " ".join(commands["aot"][0].arguments)
    assert [one.name for one in commands["aot"]] == list(aot.OPERATORS)


def test_correctness_needs_tests_that_passed(check):
    fine = [{"collected": 1}, {"begun": "a"}, {"ended": "a", "outcome": "passed"}]
    verdict = PARTS["correctness"].verdict(check, [told(*fine, name="tests-1"), told(name="pass")])
    assert verdict["status"] == "passed"
    assert verdict["tests"] == {"passed": 1, "failed": 0, "skipped": 0, "not_run": 0}
    skipped = [{"collected": 1}, {"begun": "a"}, {"ended": "a", "outcome": "skipped"}]
    assert PARTS["correctness"].verdict(check, [told(*skipped, name="tests-1")])["status"] == "failed"
    fewer = told({"collected": 2}, *fine[1:], name="tests-1")
    assert PARTS["correctness"].verdict(check, [fewer])["status"] == "failed"
    broken = told(name="tests-2", code=2, output="ImportError: no module\n1 error")
    verdict = PARTS["correctness"].verdict(check, [told(*fine, name="tests-1"), broken])
    assert verdict["status"] == "failed" and verdict["failed"] == {"tests-2": "ImportError: no module"}
    bad_pass = told({"begun": "linear"}, ended("linear", "ValueError: x"), name="pass")
    verdict = PARTS["correctness"].verdict(check, [told(*fine, name="tests-1"), bad_pass])
    assert verdict["status"] == "failed" and verdict["failed"] == {"linear": "ValueError: x"}


SUMMARY = "========= ERROR SUMMARY: 0 errors\n"
REFUSED = "========= COMPUTE-SANITIZER\n========= Error: Device not supported. Please refer to\n"


def test_a_checker_that_is_refused_is_a_skip_that_says_so(check):
    refused = told(ended("linear", "cut"), name="memcheck", code=1, output=REFUSED)
    fine = told(name="racecheck", output="========= RACECHECK SUMMARY: 0 hazards\n")
    missing = told(name="racecheck", code=127)
    verdict = PARTS["sanitizer"].verdict(check, [refused, missing])
    assert verdict == {
        "status": "skipped",
        "skipped": {"memcheck": "Error: Device not supported. Please refer to",
                    "racecheck": "compute-sanitizer is not installed"},
    }  # fmt: skip
    assert PARTS["sanitizer"].verdict(check, [refused, fine])["status"] == "passed"
    silent = told(name="memcheck", output="nothing was said")
    assert "without a summary" in PARTS["sanitizer"].verdict(check, [silent])["skipped"]["memcheck"]


@pytest.mark.parametrize(
    ("code", "output"),
    [
        (86, "========= Invalid __global__ read\n=========   Host Frame: Unable to find symbol\n"),
        (86, f"{REFUSED}========= ERROR SUMMARY: 2 errors\n"),
        (1, f"UserWarning: expandable_segments not supported on this platform\nValueError: x\n{SUMMARY}"),
        (1, "========= Error: process didn't terminate successfully\n"),
    ],
)
def test_what_the_checker_finds_is_never_a_skip(check, code, output):
    fine = told(name="racecheck", output=SUMMARY)
    verdict = PARTS["sanitizer"].verdict(check, [told(name="memcheck", code=code, output=output), fine])
    assert verdict["status"] == "failed" and set(verdict["failed"]) == {"memcheck"}
    assert "skipped" not in verdict


def test_a_benchmark_tells_what_it_measured(check):
    lines = [{"begun": "lora: a"}, {"ended": "lora: a", "said": "3 ms"}, {"begun": "lora: b"}]
    verdict = PARTS["benchmark"].verdict(check, [told(*lines, code=None)])
    assert verdict["status"] == "cut off" and verdict["cut_off"] == {"one": "in lora: b"}
    assert verdict["measured"] == {"lora: a": "3 ms"}
    assert PARTS["benchmark"].verdict(check, [told(*lines[:2], {"left": 4})])["left"] == 4
    assert PARTS["benchmark"].verdict(check, [told({"left": 4})])["status"] == "cut off"
    bad = told(*lines[:2], {"begun": "b"}, ended("b", "rskernels: outputs disagree"))
    assert PARTS["benchmark"].verdict(check, [bad])["failed"] == {"b": "rskernels: outputs disagree"}


IDENTITY = {"processor": "NVIDIA H200", "capability": "9.0", "torch": "2.11", "triton": "3.6"}


def fake_run(answers, identity=IDENTITY, host="a"):
    """`run` whose processes tell what `answers` has for their names, or that all went well."""
    about = {"name": "h200", "machine": {"host": host}, "identity": identity, "capability": 90, "chip": 90}

    def fine(name):
        if name == "machine":
            return told({"machine": about}, name=name)
        lines = [{"collected": 1}, {"begun": name}, {"ended": name, "outcome": "passed", "said": "1 ms"}]
        return told(*lines, name=name, output=SUMMARY)

    def run(commands, until, environment, at_once, interrupted):
        assert environment["PYTHONPATH"].startswith(str(ROOT)) and "RSKERNELS_BACKEND" not in environment
        return [answers.get(one.name) or fine(one.name) for one in commands]

    return run


@pytest.fixture
def main(monkeypatch, tmp_path, capsys):
    """`main` with fake processes; returns exit code, parts of the summary and what was printed."""

    def call(*arguments, identity=IDENTITY, host="a", **answers):
        monkeypatch.setenv("RSKERNELS_BACKEND", "cpp")
        monkeypatch.setattr(gpu_check, "run", fake_run(answers, identity, host))
        try:
            code = gpu_check.main(["--output", str(tmp_path), *arguments])
        except SystemExit as error:
            code = error.code
        files = list(tmp_path.glob("*-check.json"))
        printed = capsys.readouterr()
        return code, json.loads(files[0].read_text())["parts"] if files else None, printed.out + printed.err

    return call


def test_the_exit_code_is_that_of_correctness(main, tmp_path):
    code, parts, _ = main()
    assert code == 0 and list(parts) == list(PARTS)
    assert {path.name for path in tmp_path.iterdir()} == {"h200-check.json"}
    # One part again: what the others found stays.
    code, parts, _ = main("--parts", "models", models=told(code=1, output="ValueError: x", name="models"))
    assert code == 0 and parts["models"]["failed"] == {"models": "ValueError: x"}
    assert len(parts) == len(PARTS)
    log = tmp_path / "logs" / "h200-models-models.txt"
    assert log.read_text() == "ValueError: x"
    main("--parts", "models")
    assert not log.exists()
    code, parts, printed = main("--parts", "correctness", **{"tests-1": told(code=3, name="tests-1")})
    assert code == 1 and parts["correctness"]["status"] == "failed" and "have not passed" in printed


def test_verdicts_of_other_sources_and_versions_are_dropped_with_a_line(main, monkeypatch):
    assert main()[0] == 0
    code, parts, printed = main("--parts", "build", host="another host")
    assert code == 0 and len(parts) == len(PARTS) and "dropped" not in printed
    code, parts, printed = main("--parts", "build", identity=IDENTITY | {"triton": "3.7"})
    assert code == 1 and set(parts) == {"build"} and "another chip or other versions" in printed
    assert main(identity=IDENTITY)[0] == 0
    digest = gpu_check.digest

    def edited(folders):
        return "other" if "tests/rskernels" in folders else digest(folders)

    monkeypatch.setattr(gpu_check, "digest", edited)
    code, parts, printed = main("--parts", "build")
    assert code == 1 and set(parts) == set(PARTS) - {"correctness"}
    assert "dropped what it has of correctness, of other sources" in printed


def test_a_digest_is_that_of_sources(tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    (tmp_path / "a" / "__pycache__").mkdir(parents=True)
    (tmp_path / "a" / "x.py").write_text("1")
    before = plan.digest(["a"])
    (tmp_path / "a" / "__pycache__" / "x.pyc").write_text("1")
    assert plan.digest(["a"]) == before
    (tmp_path / "a" / "x.py").write_text("2")
    assert plan.digest(["a"]) != before
    for part in PARTS.values():
        assert part.sources and all((ROOT / folder).is_dir() for folder in part.sources)


def test_tuned_configurations_belong_to_a_triton_and_to_sources(check, capsys):
    def checking(triton):
        one = gpu_check.Checking(check, 1, None)
        one.about = {"identity": IDENTITY | {"triton": triton}}
        return one

    check.tuned.parent.mkdir()
    check.tuned.write_text('{"configs": {}, "measured_with": {"triton": "3.6"}}')
    check.output.mkdir()
    checking("3.6")._keeps_what_was_tuned()
    check.tuned.unlink()
    checking("3.6")._takes_over_what_was_tuned()
    assert json.loads(check.tuned.read_text())["configs"] == {}
    check.tuned.unlink()
    checking("3.7")._takes_over_what_was_tuned()
    assert not check.tuned.exists() and "of another Triton or other sources" in capsys.readouterr().out
    assert [path.name for path in check.output.iterdir()] == ["h200-tuned.json.old"]


def test_bad_options_are_one_line(main, tmp_path):
    (tmp_path / "file").touch()
    for bad in (("--output", str(tmp_path / "file")), ("--output", "/proc/foo"), ("--scale", "0"),
                ("--scale", "nan"), ("--scale", "inf"), ("--parts", "lunch")):  # fmt: skip
        code, parts, printed = main(*bad)
        assert code == 2 and parts is None and printed.startswith("gpu-check: ") and printed.count("\n") == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"parts": 3}'])
def test_a_damaged_summary_is_set_aside(main, tmp_path, damage):
    (tmp_path / "h200-check.json").write_text(damage)
    code, parts, printed = main("--parts", "correctness")
    assert code == 0 and set(parts) == {"correctness"} and "is set aside" in printed
    assert (tmp_path / "h200-check.json.old").read_text() == damage


def test_without_a_device_it_says_what_to_do(main, tmp_path):
    silent = told(name="machine", code=1, output="trace\nback\nerror: PyTorch sees no CUDA device\n")
    code, parts, printed = main("--parts", "correctness", machine=silent)
    expected = "gpu-check: PyTorch sees no CUDA device; --dry-run shows what would be done\n"
    assert code == 1 and parts is None and printed == expected
    code, _, _ = main("--dry-run")
    assert code == 0 and json.loads((tmp_path / "dry-run-check.json").read_text())["dry_run"]
