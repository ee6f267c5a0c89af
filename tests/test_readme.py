"""Every Python block of the README runs by itself, and a term is explained where it first stands."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("block", blocks("python"), ids=[f"block {n}" for n in range(len(blocks("python")))])
def test_a_python_block_runs_by_itself(block):
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    # it is a whole program: it imports what it uses and leaves something behind
    assert names.keys() > {"__builtins__", *re.findall(r"^(?:import|from) (\w+)$", block, re.MULTILINE)}


def test_a_term_is_explained_where_it_first_stands():
    terms = re.findall(r"(?<!\*)\*([a-z ]+)\*(?!\*)", README)
    assert {"kink", "norm", "unit", "dead", "donates", "temporary memory", "ulp", "firing rate", "dormancy", "margin"} <= {
        *terms
    }
    for term in terms:
        # a word that begins alike counts too: "donated" is no less unexplained
        first = re.search(rf"\b{term.rstrip('s')}", README)
        assert README[first.start() - 1] == "*", README[first.start() - 40 : first.end() + 40]


def test_the_two_commands():
    commands = [line for block in blocks("bash") for line in block.splitlines()]
    assert 'python -m pip install -e ".[examples]" && python examples/train_digits.py' in commands
    assert 'python -m pip install -e ".[test]" && python -m pytest -n 2' in commands


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\(([^)#]+?)\)", README):
        assert target.startswith("http") or (ROOT / target).exists(), target
