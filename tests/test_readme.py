"""README and docs promise what there is: code runs, commands parse, links lead somewhere."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rsmodels.cli import COMMANDS, commands
from rsmodels.cli.options import parse
from rsmodels.data import list_datasets

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = PAGES[0].read_text(encoding="utf-8")


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks as words; continued lines joined, comments dropped."""
    blocks = re.findall(r"^```(?:sh)?\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)
        for line in lines
        if re.match(r"(rsmodels|torchrun|python train)", line)
    ]


def rsmodels_command(words: list[str]) -> tuple[str, list[str]]:
    """`torchrun … train.py …` and `python train.py …` are `rsmodels train …`."""
    if words[0] == "rsmodels":
        return words[1], words[2:]
    return "train", words[words.index("train.py") + 1 :]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # recipes are named from here
    for words in shell_commands(page):
        name, rest = rsmodels_command(words)
        assert name in COMMANDS, words
        if "…" in rest or "--help" in rest or not (name == "train" or rest):
            continue
        config = parse(name, COMMANDS[name], getattr(commands, name.replace("-", "_")), rest)
        assert (getattr(config, "data", None) or "synthetic") in list_datasets(), words


def test_readme_has_the_commands_and_the_three_uses() -> None:
    assert "make demo" in README and "make test" in README
    found = shell_commands(PAGES[0])
    assert any(words[0] == "torchrun" for words in found)
    assert {"check-data", "evaluate", "predict"} <= {words[1] for words in found if words[0] == "rsmodels"}
    assert "pytest benchmarks/" in README


def test_python_of_the_readme_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), names)
    assert names["logits"].shape == (2, 6, 128, 128)  # type: ignore[attr-defined]
    assert len(names["features"]) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.relative_to(ROOT)}: {target}"
