import errno
import io
import os
import re
import tracemalloc
import zipfile
from pathlib import Path

import jax
import numpy as np
import pytest

import train_digits
from common import digits
from scripts import arrays, error_of


def test_split_is_stratified_and_drawn_with_its_seed():
    data, other = digits.bundled(0), digits.bundled(1)
    assert [len(part.labels) for part in data[:3]] == [1257, 180, 360]
    for part in data[:3]:
        assert np.bincount(part.labels, minlength=10).min() >= 0.095 * len(part.labels)
        assert 0 <= part.images.min() < part.images.max() == 1
    seen = {image.tobytes() for part in data[:3] for image in part.images}
    assert len(seen) == 1797  # no image in two parts
    assert not np.array_equal(data.test.images, other.test.images)


def test_shift_moves_by_one_pixel_at_most():
    image = np.zeros((1, 5, 7, 1), np.float32)
    image[0, 2, 3] = 1
    shifted = np.asarray(digits.random_shift(jax.random.key(0), np.repeat(image, 300, 0)))
    moves = {tuple(at) for at in np.argwhere(shifted[..., 0])[:, 1:]}
    assert moves == {(y, x) for y in (1, 2, 3) for x in (2, 3, 4)}


def test_other_data_is_scaled_and_split(tmp_path):
    np.savez(tmp_path / "data.npz", **arrays())
    data = digits.from_file(tmp_path / "data.npz", 0)
    assert (data.classes, [len(part.labels) for part in data[:3]]) == (3, [54, 6, 30])
    assert data.test.images.max() == 1
    assert np.bincount(data.validation.labels).tolist() == [2, 2, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_train": None}, "with the arrays x_train, y_train, x_test, y_test, got .* without x_train"),
        ({"x_train": np.zeros((60, 28, 28), np.float32)}, "x_train must be uint8 images.*got float32"),
        ({"x_test": np.zeros((30, 784), np.uint8)}, r"x_test must be uint8 images.*got uint8 of shape \(30, 784\)"),
        ({"x_test": np.zeros((0, 28, 28), np.uint8)}, "x_test must be uint8 images"),
        ({"x_test": np.zeros((30, 27, 28), np.uint8)}, r"x_test must be of the size of x_train, \(28, 28\), got \(27, 28\)"),
        (
            {"y_train": np.zeros(59, np.int64)},
            r"y_train must be 60 integer labels, one per image, got int64 of shape \(59,\)",
        ),
        ({"y_test": np.zeros(30)}, "y_test must be 30 integer labels.*got float64"),
        ({"y_train": np.arange(60) % 3 - 1}, "y_train must be labels of at least 0, got -1"),
        ({"y_test": np.full(30, 7)}, "label 7 in y_test only"),
        ({"y_train": np.zeros(60, int), "y_test": np.zeros(30, int)}, "two or more, got label 0 alone"),
        (
            {"y_train": np.arange(60) % 7},
            "y_train must hold two labels or more of .*got 60 labels of 7 classes, 8 of the rarest",
        ),
        ({"y_train": np.array([2, *[0, 1] * 29, 0])}, "got 60 labels of 3 classes, 1 of the rarest"),
        ({"y_train": np.array([object()] * 60)}, "y_train holds Python objects, which are not unpickled"),
    ],
)
def test_malformed_data_is_refused(change, message, tmp_path):
    changed = {name: value for name, value in (arrays() | change).items() if value is not None}
    np.savez(tmp_path / "data.npz", allow_pickle=True, **changed)
    assert re.search(message, refusal(tmp_path / "data.npz"))


def refusal(path):
    """Returns the message of a file that is refused."""
    with pytest.raises(ValueError, match="must ") as error_info:
        digits.from_file(path, 0)
    return str(error_info.value)


def edit(path, change):
    """Changes what the archive's directory says of each member."""
    with zipfile.ZipFile(path, "a") as archive:
        for member in archive.filelist:
            change(member)
        archive.comment = b"changed"  # so that the directory is written anew


def claim(shape):
    """Returns an array's file whose header claims a shape, and which holds 10 bytes."""
    file = io.BytesIO()
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
    return file.getvalue() + bytes(10)


def test_what_is_no_file_is_not_opened(tmp_path):
    # opening the pipe would wait for ever, reading /dev/zero would fill the memory
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for path, found in (
        (tmp_path / "pipe", "a pipe"),
        (tmp_path, "a directory"),
        (Path("/dev/zero"), "a device"),
        (Path("/dev/null"), "a device"),
        (tmp_path / "no", "No such file or directory"),
        (tmp_path / "loop", "Too many levels of symbolic links"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        wanted = f"must be an .npz file with the arrays x_train, y_train, x_test, y_test, got '{path}': {found}"
        assert refusal(path) == wanted


def test_an_unreadable_file_is_refused(tmp_path, monkeypatch):
    def refused(*args):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    (tmp_path / "data.npz").touch()
    monkeypatch.setattr(Path, "open", refused)  # file modes do not bind root
    assert refusal(tmp_path / "data.npz").endswith("data.npz': Permission denied")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.write_bytes(b""), ": an empty file"),
        (lambda path: path.write_text("no archive"), ": a file of another kind"),
        (lambda path: path.write_bytes(path.read_bytes()[:50_000]), ": an archive cut short"),
        # the end of an archive alone: its directory lies before the file begins
        (lambda path: path.write_bytes(path.read_bytes()[-30:]), ": a damaged archive: "),
        # in the midst of the pixels, where only the checksum tells
        (
            lambda path: path.write_bytes(path.read_bytes().replace(b"\xff" * 99, b"\xfe" * 99)),
            "x_train cannot be read: Bad CRC",
        ),
        (lambda path: edit(path, lambda member: setattr(member, "flag_bits", 1)), "x_train is encrypted"),
        (lambda path: edit(path, lambda member: setattr(member, "compress_type", 99)), "x_train is compressed by method 99"),
        (lambda path: edit(path, lambda member: setattr(member, "file_size", 10**12)), "take 4,000,000,000,000 bytes"),
        (lambda path: edit(path, lambda member: setattr(member, "file_size", 200)), "x_train cannot be read: Bad CRC"),
        (lambda path: edit(path, lambda member: setattr(member, "header_offset", 9)), "x_train cannot be read: "),
    ],
)
def test_a_damaged_file_is_refused(damage, found, tmp_path):
    np.savez(tmp_path / "data.npz", **arrays())
    damage(tmp_path / "data.npz")
    assert found in refusal(tmp_path / "data.npz")


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (b"no array", "x_train cannot be read: the magic string"),
        (b"", "x_train cannot be read: "),
        (claim((10**12,)), "x_train claims 1,000,000,000,000 bytes and holds 10"),
        (claim((10**30, 10**30)), "x_train claims 1,0"),
        (claim((0, 28, 28)), "x_train claims 0 bytes and holds 10"),
        (claim((-5, -2)), "x_train cannot be read: "),
        (claim((2, 5)), "x_train must be uint8 images"),
    ],
)
def test_an_array_that_is_none_is_refused(content, found, tmp_path):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for name in digits.ARRAYS:
            archive.writestr(f"{name}.npy", content)
    assert found in refusal(tmp_path / "data.npz")


def test_names_of_members_are_listed_without_control_characters(tmp_path):
    with zipfile.ZipFile(tmp_path / "data.npz", "w") as archive:
        for i in range(9):
            archive.writestr(f"{i}\x1b[31m.npy", b"")
    error = refusal(tmp_path / "data.npz")
    assert r"an archive of ['0\x1b[31m.npy', '1\x1b[31m.npy'," in error
    assert error.endswith(", ...] without x_train, y_train, x_test, y_test")


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_small_file_cannot_fill_the_memory(method, tmp_path):
    for claimed in (None, 5000):  # the second archive conceals what it holds
        with zipfile.ZipFile(tmp_path / "data.npz", "w", method) as archive:
            for name in digits.ARRAYS:
                archive.writestr(f"{name}.npy", claim((5_000_000,)) + bytes(5_000_000 - 10))
                archive.filelist[-1].file_size = claimed or archive.filelist[-1].file_size
        tracemalloc.start()
        try:
            refusal(tmp_path / "data.npz")
            assert tracemalloc.get_traced_memory()[1] < 1_000_000
        finally:
            tracemalloc.stop()


def test_a_refusal_takes_one_line_and_code_2(tmp_path, capsys):
    error = error_of(train_digits, 2, capsys, "--data", "/dev/null", "--out", str(tmp_path / "out"))
    assert error.startswith("train_digits.py: error: argument --data: must be an .npz file with the arrays x_train,")
    assert error.endswith(", got '/dev/null': a device")
    assert not (tmp_path / "out").exists()
