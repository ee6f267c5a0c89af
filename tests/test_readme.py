"""Every Python block of the README runs; a block sees what the blocks above it defined."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def blocks(path, language):
    return re.findall(rf"^```{language}\n(.*?)^```$", path.read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("quick_compilation")
def test_python_blocks_run():
    scope: dict[str, object] = {}
    found = blocks(ROOT / "README.md", "python")
    for block in found:
        exec(compile(block, "README.md", "exec"), scope)
    assert found


def test_the_two_commands():
    commands = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    assert 'python -m pip install -e ".[examples]" && python examples/train_digits.py' in commands
    assert 'python -m pip install -e ".[test]" && python -m pytest -n 2' in commands


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+?)\)", (ROOT / "README.md").read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target
