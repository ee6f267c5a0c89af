"""What the tests of the example scripts share: a quick run, the tables that it writes, how it fails, and other data."""

import csv
import re

import numpy as np
import pytest


def quick_run(script, out, capsys, *options):
    """Returns the lines that a quick run prints, having checked that it writes its files and no other."""
    script.main(["--quick", "--out", str(out), *options])
    assert sorted(path.name for path in out.iterdir()) == sorted(script.OUTPUTS)
    (picture,) = out.glob("*.png")
    check_picture(picture)
    return capsys.readouterr().out.splitlines()


def check_picture(path):
    """Checks that a file is a PNG picture of 800 pixels across."""
    header = path.read_bytes()[:20]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") == 800


def check_width(text):
    """Returns what is printed, having checked that each line has room in 80 columns."""
    assert max(map(len, re.split(r"[\r\n]", text))) <= 80
    return text


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def error_of(script, code, capsys, *options):
    """Returns the last line on stderr of a run that exits with the given code."""
    with pytest.raises(SystemExit) as exit_info:
        script.main(list(options))
    assert exit_info.value.code == code
    return capsys.readouterr().err.splitlines()[-1]


def arrays(size=(28, 28), classes=3, train=60, test=30):
    """Returns images and labels as Keras's mnist.npz holds them."""
    rng = np.random.default_rng(0)
    found = {}
    for part, n in (("train", train), ("test", test)):
        labels = np.arange(n) % classes
        images = rng.integers(0, 60, (n, *size), dtype=np.uint8)
        # a band of bright rows for each class, which a shift by a pixel leaves apart
        images[np.arange(size[0]) * classes // size[0] == labels[:, None]] = 255
        found |= {f"x_{part}": images, f"y_{part}": labels.astype(np.uint8)}
    return found
