"""The directory that an example writes: it gets finished files alone, whatever signal or full disk ends the run."""

import contextlib
import csv
import signal
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np

from common import options

PREFIX = ".unfinished-"
# Ctrl-C, what `kill` and batch systems send, and what a closed terminal sends; Windows has no SIGHUP
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]


class Outputs:
    """A directory to write. A signal raises KeyboardInterrupt with its number, but while files are written it waits.

    Attributes:
        out: the directory.
        kept: what the directory holds of this run, for the line that ends a run before its time.
        writing: whether files are being written.
        waiting: the signals that came meanwhile.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.kept = f"nothing was written to {out}"
        self.writing = False
        self.waiting: list[int] = []

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal."""
        if not self.writing:
            raise KeyboardInterrupt(number)
        self.waiting.append(number)

    @contextlib.contextmanager
    def publishing(self, *names: str, holding: str = "") -> Iterator[Path]:
        """Yields a scratch folder for files or folders of these names; in the end they move to the directory.

        They replace those of an earlier run, which stay if anything fails.

        Args:
            *names: what is written.
            holding: what the directory holds then, in words; if empty, the names.
        """
        self.writing = True
        try:
            self.out.mkdir(parents=True, exist_ok=True)  # if it was removed since the run began
            with _scratch(self.out) as scratch:
                yield scratch
                _move(names, scratch, self.out)
            self.kept = f"{self.out} holds {holding or ', '.join(names)}"
        finally:
            self.writing = False
        if self.waiting:
            raise KeyboardInterrupt(self.waiting[0])


@contextlib.contextmanager
def directory(parser: options.Parser, out: Path) -> Iterator[Outputs]:
    """Makes the directory and yields it. If it cannot be written, that is an error of the argument --out.

    A signal ends the run with the code that a shell gives for it, 130 for Ctrl-C, and a failed write with code 1. Either
    takes one line, which says what was written.
    """
    outputs = Outputs(out)
    # Python lets the main thread alone handle signals; what is ignored, as under nohup, stays ignored
    handled = SIGNALS if threading.current_thread() is threading.main_thread() else []
    handlers = {number: old for number in handled if (old := signal.getsignal(number)) not in (signal.SIG_IGN, None)}
    try:
        for number in handlers:
            signal.signal(number, outputs.stop)
        _check(parser, out)
        yield outputs
        sys.stdout.flush()  # or a full disk would show only when Python ends
    except KeyboardInterrupt as interrupt:
        outputs.writing = True  # no further signal comes between
        (number,) = interrupt.args or (signal.SIGINT,)
        parser.exit(128 + number, f"interrupted: {outputs.kept}\n")
    except OSError as error:
        name = Path(str(error.filename or "")).name
        where = f": {name}" if name and not name.startswith(PREFIX) else ""
        parser.fail(f"{error.strerror or error}{where}; {outputs.kept}")
    finally:
        for number, old in handlers.items():
            signal.signal(number, old)


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Writes a CSV file; floats have six digits."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([f"{v:.6g}" if isinstance(v, float | np.floating) else v for v in row] for row in rows)


def _check(parser: options.Parser, out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        for left in out.glob(f"{PREFIX}*"):
            # not removed, as a run that is still writing would lose its files
            print(
                f"{parser.prog}: remove {left}, which a killed run left, unless a run is writing there now", file=sys.stderr
            )
    except OSError as error:
        found = "a file" if isinstance(error, FileExistsError) else error.strerror
        parser.error(f"argument --out: must be a directory to write to, got {str(out)!r}: {found}")


@contextlib.contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """Makes a folder on the same disk, so that a file moves from it in one step, and removes it in the end."""
    with tempfile.TemporaryDirectory(prefix=PREFIX, dir=out, ignore_cleanup_errors=True) as name:
        yield Path(name)


def _move(names: Sequence[str], scratch: Path, out: Path) -> None:
    """Moves all, or none if one move fails."""
    former = scratch / "former"
    former.mkdir()
    with contextlib.ExitStack() as undo:
        for name in names:
            if (out / name).exists():  # moved away first, as a folder with files cannot be replaced
                (out / name).rename(former / name)
                undo.callback((former / name).rename, out / name)
            (scratch / name).rename(out / name)
            undo.callback((out / name).rename, scratch / name)
        undo.pop_all()
