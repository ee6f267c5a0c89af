"""The directory that an example writes: its files appear at the end of the run, and Ctrl-C leaves none half-written."""

import contextlib
import csv
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from common import options


class Outputs:
    """A directory to write, and a scratch folder inside it where files stay until complete; it is removed in the end.

    Attributes:
        out: the directory.
        scratch: the folder; on the same disk, so that a file moves to `out` in one step.
        kept: a sentence on what was written so far, for Ctrl-C.
    """

    def __init__(self, out: Path, scratch: Path) -> None:
        self.out = out
        self.scratch = scratch
        self.kept = f"nothing was written to {out}"

    def table(self, name: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
        """Writes a CSV file to scratch; floats have six digits."""
        with (self.scratch / name).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row] for row in rows)

    def publish(self, *names: str) -> None:
        """Moves files or folders from scratch to the directory; those of an earlier run are replaced."""
        for name in names:
            if (self.out / name).is_dir():  # a folder with files cannot be replaced, but it can be moved away
                (self.out / name).rename(self.scratch / f"former {name}")
            (self.scratch / name).replace(self.out / name)
        self.kept = f"{self.out} holds {', '.join(names)}"


@contextlib.contextmanager
def directory(parser: options.Parser, out: Path) -> Iterator[Outputs]:
    """Makes the directory and yields it. Ctrl-C inside exits with code 130 and one line that says what was written.

    If the directory cannot be written, that is an error of the argument --out.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(prefix=".unfinished-", dir=out)
    except OSError as error:
        parser.error(f"argument --out: must be a directory to write to, got {str(out)!r}: {error.strerror}")
    with scratch:
        outputs = Outputs(out, Path(scratch.name))
        try:
            yield outputs
        except KeyboardInterrupt:
            print(f"interrupted: {outputs.kept}", file=sys.stderr)
            sys.exit(130)
