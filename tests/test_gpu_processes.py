"""How the processes of `make gpu-check` end: late, dead, interrupted. Real ones, of a few lines."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu_check import PARTS, Check, Command, run, useful_line

ROOT = Path(__file__).resolve().parents[1]
processes = sys.modules[run.__module__]


@pytest.fixture
def check(tmp_path):
    return Check(dry=False, output=tmp_path / "out", scratch=tmp_path)


@pytest.fixture
def soon(monkeypatch):
    """Processes that are ended get less patience."""
    monkeypatch.setattr(processes, "END", 0.3)


def python(name, code, **more):
    return Command(name, (sys.executable, "-c", code), **more)


def test_processes_run_side_by_side(tmp_path):
    commands = [
        python("fine", "import os; print(os.environ['B'])", environment={"B": "3"}),
        python("bad", "raise ValueError('no good')"),
        Command("missing", ("no-such-program",)),
    ]
    found = {one.name: one for one in run(commands, time.monotonic() + 60, os.environ, 2)}
    assert found["fine"].code == 0 and found["fine"].output == "3\n"
    assert found["bad"].code == 1 and useful_line(found["bad"].output) == "ValueError: no good"
    assert found["missing"].code == 127 and "no-such-program" in found["missing"].output


def test_what_is_late_is_ended_and_what_it_told_is_kept(tmp_path, soon, check):
    file = tmp_path / "told"
    lines = '{"begun": "a"}\n{"ended": "a", "problem": "wrong"}\n{"begun": "b"}\n{"ended": "b"'
    deaf = "import signal, sys, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    slow = python("slow", f"{deaf}open({str(file)!r}, 'w').write({lines!r}); time.sleep(99)", told=file)

    def has_told():
        return file.exists() and file.read_text() == lines

    outcomes = run([slow, python("next", "")], time.monotonic() + 60, os.environ, 1, has_told)
    verdict = PARTS["tune"].verdict(check, outcomes[:1])
    assert verdict["failed"] == {"a": "wrong"} and verdict["cut_off"] == {"slow": "in b"}
    assert [(one.code, one.started) for one in outcomes] == [(None, True), (None, False)]
    assert PARTS["build"].verdict(check, outcomes[1:]) == {"status": "cut off", "never_begun": ["next"]}
    started = time.monotonic()
    (outcome,) = run([python("late", "import time; time.sleep(99)")], started + 0.6, os.environ)
    assert outcome.code is None and outcome.started and time.monotonic() - started < 30


def test_one_that_dies_goes_on_as_long_as_it_gets_further(tmp_path, check):
    file = tmp_path / "told"
    dies = f"""
import json, os
file = open({str(file)!r}, "a+")
file.seek(0)
number = sum("begun" in line for line in file)
if number < 3:
    file.write(json.dumps({{"begun": number}}) + "\\n")
    file.flush()
    if number == 1:
        os.abort()
    file.write(json.dumps({{"ended": number}}) + "\\n")
    raise SystemExit(70)
"""
    (outcome,) = run([python("one", dies, told=file, again=True)], time.monotonic() + 60, os.environ)
    assert outcome.code == 0 and outcome.died_in() == [1] and outcome.cut_in() == ""
    verdict = PARTS["build"].verdict(check, [outcome])
    assert verdict["status"] == "failed" and verdict["failed"][1].startswith("its process died")
    (outcome,) = run([python("one", "raise SystemExit(3)", again=True)], time.monotonic() + 60, os.environ)
    assert outcome.code == 3


SUITE = """
import os, signal, time, torch, pytest

@pytest.mark.parametrize("x", [1, 2])
def test_fine(x):
    assert not torch.broken

def test_wrong():
    assert 1 == 2, "told why"

@pytest.mark.skip
def test_skipped():
    pass

def test_faults():
    torch.broken = True
    raise RuntimeError("CUDA error: an illegal access\\nCompile with `TORCH_USE_CUDA_DSA`")

def test_behind_the_fault():
    assert not torch.broken

def test_dies():
    os.kill(os.getpid(), signal.SIGKILL)

def test_behind_the_death():
    assert not torch.broken

def test_slow():
    time.sleep(99)

def test_never_run():
    pass
"""
TORCH = """
broken = False

class cuda:
    is_available = staticmethod(lambda: True)

    @staticmethod
    def synchronize():
        if broken:
            raise RuntimeError("CUDA error")
"""


def test_a_suite_survives_faults_and_deaths_and_tells_all_it_found(tmp_path, soon, check):
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_it.py").write_text(SUITE)
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}

    def share(which, *more):
        file = tmp_path / f"{which.replace('/', '-')}.told"
        script = (sys.executable, str(ROOT / "benchmarks/gpu_tests.py"), str(tmp_path / "tests"))
        options = ("--share", which, "--told", str(file), *more)
        return Command("tests", (*script, *options), told=file, again=True)

    whole = share("1/1")

    def at_the_slow_one():
        return whole.told.exists() and '::test_slow"' in whole.told.read_text()

    (outcome,) = run([whole], time.monotonic() + 60, environment, interrupted=at_the_slow_one)
    verdict = PARTS["correctness"].verdict(check, [outcome])
    assert verdict["tests"] == {"passed": 4, "failed": 3, "skipped": 1, "not_run": 2}
    failed = {name.rpartition("::")[2]: why for name, why in verdict["failed"].items()}
    assert failed["test_wrong"] == "AssertionError: told why"
    assert failed["test_faults"] == "RuntimeError: CUDA error: an illegal access"
    assert failed["test_dies"].startswith("its process died") and len(failed) == 3
    assert verdict["cut_off"]["tests"].endswith("::test_slow") and verdict["status"] == "failed"
    assert 'assert 1 == 2, "told why"' in outcome.output  # the traceback, though pytest never came to its end
    few = [share(which, "--few", "1") for which in ("1/2", "2/2")]
    outcomes = run(few, time.monotonic() + 60, environment, 2)
    tests = [line["begun"].rpartition("::")[2] for one in outcomes for line in one.told if "begun" in line]
    assert sorted(tests) == ["test_fine[1]", "test_fine[2]"] and all(one.code == 0 for one in outcomes)


def test_the_useful_line_of_a_failure():
    cuda = (
        "Traceback (most recent call last):\n  x\ntorch.AcceleratorError: CUDA error: an illegal access\n"
        "CUDA kernel errors might be asynchronously reported\nFor debugging consider passing X\n"
        "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n\n"
    )
    assert useful_line(cuda) == "torch.AcceleratorError: CUDA error: an illegal access"
    fatal = "Fatal Python error: Segmentation fault"
    assert useful_line(f"{fatal}\n\nstack") == fatal
    assert useful_line("a\nb\n\n") == "b" and useful_line("") == ""


# Two parts, of which the first sleeps, and so does what it started.
SLEEPS = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job would ignore it
benchmarks, file, output = sys.argv[1:]
sys.path.insert(0, benchmarks)
import gpu_check, gpu_plan

CHILD = '''
import os, subprocess, sys, time
other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
with open(sys.argv[1], "w") as file:
    for line in ('{"begun": "a"}', '{"ended": "a", "said": "3 ms"}', '{"begun": "b"}'):
        print(line, file=file)
with open(sys.argv[1] + ".pids", "w") as file:
    print(os.getpid(), other.pid, file=file)
time.sleep(99)
'''

class Sleeps(gpu_plan.Measured):
    def commands(self, check):
        return [gpu_check.Command("one", (sys.executable, "-c", CHILD, file), told=Path(file))]

def asks(self):
    self.about = {"identity": {"triton": "3"}, "machine": {}}
    self._grant(60)
    return True

gpu_check.PARTS = {"first": Sleeps("first", 60), "second": Sleeps("second", 60)}
gpu_check.Checking._asks_the_machine = asks
sys.exit(gpu_check.main(["--dry-run", "--output", output]))
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_everything_and_keeps_what_was_found(tmp_path, number, code):
    file, output = tmp_path / "told", tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", SLEEPS, str(ROOT / "benchmarks"), str(file), str(output)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    pids = tmp_path / "told.pids"
    while not (pids.exists() and pids.read_text().endswith("\n")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == f"gpu-check: ended by {number.name}; what was found until then is in {output}\n"
    for pid in map(int, pids.read_text().split()):
        stat = Path(f"/proc/{pid}/stat")
        assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z", "it still runs"
    parts = json.loads((output / "dry-run-check.json").read_text())["parts"]
    assert list(parts) == ["first"] and parts["first"]["measured"] == {"a": "3 ms"}
    assert parts["first"]["cut_off"] == {"one": "in b"}
