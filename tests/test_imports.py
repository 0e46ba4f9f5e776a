"""Which way imports go. The rule is docs/architecture.md's picture; this test keeps it."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MODULES = sorted(path for package in ("rskernels", "rsmodels") for path in (ROOT / package).rglob("*.py"))

# What each part of rsmodels may import from rsmodels, besides itself. `rskernels` is open to whoever
# computes; `files` (atomic writes), `arguments` (their checks) and `torch` to everybody.
ALLOWED: dict[str, set[str]] = {
    "files": set(),
    "arguments": set(),
    "weights": set(),
    "registry": {"weights"},
    "layers": set(),
    "encoders": {"layers", "registry", "weights"},
    "heads": {"layers", "registry", "weights"},
    "style": {"weights"},
    "methods": {"layers", "encoders", "heads", "style", "registry", "weights"},
    "data": set(),
    "evaluation": {"data", "registry"},
    "training": {"data", "evaluation", "registry"},
    "pretraining": {"data", "evaluation", "training", "registry", "weights"},
    "predict": {"data", "evaluation", "registry"},
    "style_stats": {"data", "evaluation", "training", "pretraining", "style"},
    "cli": {"data", "evaluation", "training", "pretraining", "predict", "style_stats", "registry"},
}
USES_KERNELS = {"layers", "encoders", "heads", "methods", "training", "evaluation", "cli", "registry"}
# What an import inside a function may name: extras and the compiled part, which a plain install lacks.
OPTIONAL = {
    "rskernels._C",
    "huggingface_hub",
    "torchgeo",
    "tensorboard",
    "torch.utils.tensorboard",
    "wandb",
    "umap",
    "xformers",
    "scipy",  # installed; slow to import, and only training's matching needs it
    "timm",  # installed, but it imports torchvision and Pillow: only CNN students need it
}


def part_of(path: Path) -> str:
    """`rsmodels/encoders/sam_vit.py` -> "encoders", `rsmodels/cli.py` -> "cli"."""
    relative = path.relative_to(ROOT)
    return relative.parts[1].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    """Every absolute module name that a file imports, relative imports resolved, with its node."""
    package = path.relative_to(ROOT).parent.parts
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from rsmodels import registry` imports a module, not a name of the package.
            found += [
                (f"{module}.{alias.name}" if module == "rsmodels" else module, node) for alias in node.names
            ]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    part = part_of(path)
    kernels = path.is_relative_to(ROOT / "rskernels")
    for name, node in imports(path):
        top, _, rest = name.partition(".")
        where = f"{path.relative_to(ROOT)}:{node.lineno} imports {name}"
        if top == "rsmodels":
            assert not kernels, f"{where}: rskernels knows nothing of models"
            target = rest.partition(".")[0]
            if part in ("__init__", "__main__") or not target:
                continue
            assert target in {part, "files", "arguments", "__init__"} | ALLOWED[part], where
        elif top == "rskernels" and not kernels and part not in ("__init__", "__main__"):
            assert part in USES_KERNELS, where


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_import_inside_a_function(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        for node in ast.walk(function):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names += [f"{node.module}.{alias.name}" for alias in node.names]
            for name in names:
                optional = any(f"{name}.".startswith(f"{package}.") for package in OPTIONAL)
                assert optional, f"{path.relative_to(ROOT)}:{node.lineno}: import of {name} inside a function"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nobody_touches_sys_path(path: Path) -> None:
    assert "sys.path" not in path.read_text(encoding="utf-8")


# What reads and writes files, and what timm brings along.
IO_PACKAGES = ["rasterio", "jsonargparse", "matplotlib", "scipy"]
TIMM_PACKAGES = ["timm", "torchvision", "PIL", "yaml", "tqdm", "huggingface_hub"]


@pytest.mark.parametrize(
    ("hidden", "ktda"),
    [([*IO_PACKAGES, *TIMM_PACKAGES], False), (IO_PACKAGES, True)],
    ids=["all but KTDA", "KTDA, whose students are timm's"],
)
def test_models_run_without_the_packages_for_files(hidden: list[str], ktda: bool) -> None:
    """`import rsmodels`, building a model and running it take torch, numpy and safetensors; for KTDA timm."""
    code = (
        "import sys\n"
        f"for name in {hidden!r}: sys.modules[name] = None\n"
        "import rsmodels, torch\n"
        f"names = [n for n in rsmodels.list_models('*_tiny') if n.startswith('ktda') == {ktda}]\n"
        "assert names\n"
        "for name in names:\n"
        "    model = rsmodels.create_model(name, num_classes=2, image_size=64).eval()\n"
        "    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 2, 64, 64), name\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
