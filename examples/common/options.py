"""The command line of the examples: help, errors in one line, types that refuse what cannot work, and the progress bar."""

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm


class Parser(argparse.ArgumentParser):
    """An argument parser that reports an error in one line on stderr, without the usage, and exits with code 2.

    Its help says which files the script writes, and ends with an example: the arguments of a run.
    """

    def __init__(self, prog: str, description: str, writes: Sequence[str], example: str) -> None:
        *most, last = writes
        files = f"{', '.join(most)} and {last}" if most else last
        super().__init__(
            prog,
            description=f"{description} Writes {files} to the directory --out, in place of those of an earlier run.",
            epilog=f"example: python examples/{prog} {example}",
            allow_abbrev=False,
        )

    def option(self, name: str, text: str, *, default: Any, **settings: Any) -> None:
        """Adds an option whose help ends with its default."""
        self.add_argument(name, default=default, help=f"{text} (default: %(default)s)", **settings)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")

    def fail(self, message: str) -> NoReturn:
        """Exits with code 1 and one line on stderr: the training failed, or missed the figure that it is to show."""
        self.exit(1, f"{self.prog}: {' '.join(message.split())}\n")


def demonstration(prog: str, description: str, writes: Sequence[str]) -> Parser:
    """Returns a parser of --quick, --out and --seed, for the scripts without options of their own."""
    parser = Parser(prog, description, writes, "--quick --out runs/trial")
    parser.add_argument("--quick", action="store_true", help="a short trial, of seconds")
    out = Path("runs") / Path(prog).stem
    parser.option("--out", "directory to write", type=path, default=out)
    parser.option("--seed", "seed of everything random", type=seed, default=0)
    return parser


def progress(iterable: Iterable[Any] | None = None, **settings: Any) -> tqdm:
    """Returns a progress bar as wide as the terminal, or of 80 columns in a file or pipe."""
    width = {"dynamic_ncols": True} if sys.stderr.isatty() else {"ncols": 80}
    return tqdm(iterable, **width, **settings)


def positive_int(text: str) -> int:
    """Returns a whole number from 1 to a million; with larger ones the number of steps might not fit 32 bits."""
    return _whole(text, 1, 10**6)


def natural(text: str) -> int:
    """Returns a whole number from 0 to a million."""
    return _whole(text, 0, 10**6)


def seed(text: str) -> int:
    """Returns a seed that JAX, NumPy and scikit-learn accept."""
    return _whole(text, 0, 2**32 - 1)


def seeds(first: int, n: int) -> list[int]:
    """Returns n successive seeds; after the largest that `seed` accepts comes 0."""
    return [(first + i) % 2**32 for i in range(n)]


def positive_float(text: str) -> float:
    """Returns a positive finite number."""
    value = _number(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a positive finite number, got {text!r}")
    return value


def nonnegative_float(text: str) -> float:
    """Returns a finite number of 0 or more."""
    value = _number(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def path(text: str) -> Path:
    """Returns a path. An empty one is refused: an unset shell variable gives it, and it would mean the current directory."""
    if not text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a path, got {text!r}")
    return Path(text)


def _whole(text: str, low: int, high: int) -> int:
    try:
        value = int(text)
    except ValueError:
        value = None
    if value is None or not low <= value <= high:
        kind = "a positive integer" if low == 1 else "an integer of at least 0"
        raise argparse.ArgumentTypeError(f"must be {kind}, at most {high}, got {text!r}")
    return value


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
