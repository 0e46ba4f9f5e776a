"""setup.py: an install never fails for want of a compiler, and says in one line what is missing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
GIVE_UP = "rskernels: extension not built, the plain-PyTorch reference will serve: "


@pytest.fixture
def tree(tmp_path):
    """A copy of what setup.py and rskernels need, without build products."""
    ignore = shutil.ignore_patterns("*.so", "__pycache__", "build")
    for folder in ("csrc", "rskernels"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignore)
    (tmp_path / "rsmodels").mkdir()
    for file in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    for file in ("README.md", "LICENSE"):
        (tmp_path / file).write_text("")
    return tmp_path


def run(tree, *args, **environment):
    env = {k: v for k, v in os.environ.items() if not k.startswith("RSKERNELS_") and k != "CXX"}
    env |= {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(
        [sys.executable, *args], cwd=tree, env=env, capture_output=True, text=True, timeout=280
    )


def complaints(result):
    return [line for line in (result.stdout + result.stderr).splitlines() if line.startswith(GIVE_UP)]


def test_without_a_compiler_the_package_is_pure_python(tree):
    empty = tree / "empty"
    empty.mkdir()
    built = run(tree, "setup.py", "build_ext", "--inplace", PATH=str(empty))
    assert built.returncode == 0, built.stderr
    assert len(complaints(built)) == 1 and "no C++ compiler" in complaints(built)[0]
    code = (
        # An editable install of the checkout would lend its extension to this copy.
        "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in str(f).lower()];"
        "import rskernels, torch; rskernels.explain();"
        "print(rskernels.linear(torch.ones(2, 3), torch.ones(4, 3)).sum().item(), rskernels.__file__)"
    )
    used = run(tree, "-c", code)
    assert used.returncode == 0, used.stderr
    assert used.stdout.splitlines()[-1] == f"24.0 {tree / 'rskernels' / '__init__.py'}"
    assert "not built" in used.stdout
    assert used.stderr.count("RuntimeWarning") == 1


def test_wheel_without_a_compiler_holds_the_package(tree):
    empty = tree / "empty"
    empty.mkdir()
    built = run(tree, "setup.py", "bdist_wheel", "--dist-dir", "out", CXX="no-such-compiler", PATH=str(empty))
    assert built.returncode == 0, built.stderr
    assert len(complaints(built)) == 1 and "no-such-compiler" in complaints(built)[0]
    (wheel,) = (tree / "out").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {"rskernels/__init__.py", "rskernels/py.typed", "rskernels/ops/linear.py"} <= set(names)
    assert not [name for name in names if name.endswith(".so")]


def test_without_torch_one_line_says_so(tree):
    fake = tree / "torch.py"
    fake.write_text("raise ImportError('No module named torch')\n")
    built = run(tree, "setup.py", "build_ext", "--inplace", CXX=sys.executable)
    assert built.returncode == 0, built.stderr
    assert len(complaints(built)) == 1 and "install torch" in complaints(built)[0]


@pytest.mark.skipif(not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="no C++ compiler on PATH")
def test_a_compile_error_leaves_pure_python_unless_the_extension_is_required(tree):
    for source in (tree / "csrc").rglob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    stale = tree / "rskernels" / "_C.stale.so"
    stale.write_text("")
    required = run(tree, "setup.py", "build_ext", "--inplace", RSKERNELS_REQUIRE_EXT="1")
    assert required.returncode != 0 and stale.exists()
    assert "RSKERNELS_REQUIRE_EXT" in required.stderr
    built = run(tree, "setup.py", "build_ext", "--inplace")
    assert built.returncode == 0, built.stderr
    assert len(complaints(built)) == 1 and "compiling failed" in complaints(built)[0]
    assert not stale.exists()
