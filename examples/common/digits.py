"""Labelled images in three parts: scikit-learn's 8x8 handwritten digits, or a file with the arrays of Keras's mnist.npz."""

import contextlib
import math
import reprlib
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

ARRAYS = ("x_train", "y_train", "x_test", "y_test")
# deflating makes images a few times smaller; a file that grows by more than this was made to fill the memory
INFLATION = 100
KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


class Part(NamedTuple):
    """Images of shape (n, height, width, 1), float32 in [0, 1], and their n labels, int32 from 0."""

    images: np.ndarray
    labels: np.ndarray


class Digits(NamedTuple):
    """The parts of a data set, and its number of classes."""

    train: Part
    validation: Part
    test: Part
    classes: int


def bundled(split_seed: int) -> Digits:
    """Returns scikit-learn's 1,797 digits: 360 to test, 180 to validate, the rest to train; classes have equal shares."""
    images, labels = load_digits(return_X_y=True)
    images = images.reshape(-1, 8, 8, 1).astype(np.float32) / 16
    rest, test = _split(Part(images, labels.astype(np.int32)), 360, split_seed)
    train, validation = _split(rest, 180, split_seed)
    return Digits(train, validation, test, classes=10)


def from_file(path: Path, split_seed: int) -> Digits:
    """Returns the images of an .npz file; a tenth of its training images of each class is set apart to validate.

    Args:
        path: a file with the uint8 images x_train and x_test, (n, height, width), and their labels y_train and y_test.
        split_seed: seed for the choice of the validation images.

    Raises:
        ValueError: the file cannot be read, is no .npz file, or does not hold such arrays; says what was wanted and found.
    """
    x_train, y_train, x_test, y_test = _read(path)
    for name, images, labels in (("train", x_train, y_train), ("test", x_test, y_test)):
        if images.dtype != np.uint8 or images.ndim != 3 or images.size == 0:
            raise ValueError(
                f"x_{name} must be uint8 images, (n, height, width), got {images.dtype} of shape {images.shape}"
            )
        if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
            raise ValueError(
                f"y_{name} must be {len(images)} integer labels, one per image, got {labels.dtype} of shape {labels.shape}"
            )
        if labels.min() < 0:
            raise ValueError(f"y_{name} must be labels of at least 0, got {labels.min()}")
    if x_train.shape[1:] != x_test.shape[1:]:
        raise ValueError(f"x_test must be of the size of x_train, {x_train.shape[1:]}, got {x_test.shape[1:]}")
    classes = np.unique(y_train)
    unseen = np.setdiff1d(y_test, classes)
    if len(classes) < 2 or unseen.size:
        found = f"label {unseen[0]} in y_test only" if unseen.size else f"label {classes[0]} alone"
        raise ValueError(f"y_train must hold every label, and two or more, got {found}")

    def part(images: np.ndarray, labels: np.ndarray) -> Part:
        # labels may skip numbers; classes are counted without gaps
        return Part(images[..., None].astype(np.float32) / 255, np.searchsorted(classes, labels).astype(np.int32))

    try:
        train, validation = _split(part(x_train, y_train), 0.1, split_seed)
    except ValueError as error:  # it names arguments of scikit-learn
        found = f"{len(y_train)} labels of {len(classes)} classes, {np.unique_counts(y_train).counts.min()} of the rarest"
        raise ValueError(
            f"y_train must hold two labels or more of each class, a tenth of all one of each, got {found}"
        ) from error
    return Digits(train, validation, part(x_test, y_test), len(classes))


def random_shift(key: Array, images: Array) -> Array:
    """Returns the images, each moved at random by -1, 0 or 1 pixel down and across; pixels that move in are 0."""
    n, height, width, channels = images.shape
    padded = jnp.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)))
    corners = jax.random.randint(key, (n, 2), 0, 3)

    def crop(image: Array, corner: Array) -> Array:
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (height, width, channels))

    return jax.vmap(crop)(padded, corners)


def _split(part: Part, size: float, seed: int) -> tuple[Part, Part]:
    images, held_images, labels, held_labels = train_test_split(
        *part, test_size=size, stratify=part.labels, random_state=seed
    )
    return Part(images, labels), Part(held_images, held_labels)


def _read(path: Path) -> list[np.ndarray]:
    """Returns the four arrays; whatever the file claims, it takes memory for at most INFLATION times its real size."""
    try:
        # asked before opening: a pipe would wait for ever, and a device may have no end
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError(KINDS.get(stat.S_IFMT(status.st_mode), "no regular file"))
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                file.seek(0)
                start = file.read(2)
                raise ValueError(
                    "an archive cut short" if start == b"PK" else "a file of another kind" if start else "an empty file"
                )
            with _damage("a damaged archive"):
                archive = zipfile.ZipFile(file)
            members = _members(archive, INFLATION * status.st_size)
            return [_array(archive, name, member) for name, member in members.items()]
    except (OSError, ValueError) as error:
        found = error.strerror if isinstance(error, OSError) and error.strerror else error
        wanted = f"must be an .npz file with the arrays {', '.join(ARRAYS)}"
        raise ValueError(f"{wanted}, got {str(path)!r}: {found}") from error


def _members(archive: zipfile.ZipFile, limit: int) -> dict[str, zipfile.ZipInfo]:
    """Returns the entries of the four arrays in the archive's directory, if they are such as NumPy writes."""
    entries = {entry.filename: entry for entry in archive.infolist()}
    if missing := [name for name in ARRAYS if f"{name}.npy" not in entries]:
        # reprlib shortens the list and escapes what a terminal would obey
        raise ValueError(f"an archive of {reprlib.repr(sorted(entries))} without {', '.join(missing)}")
    members = {name: entries[f"{name}.npy"] for name in ARRAYS}
    for name, member in members.items():
        if member.flag_bits & 1:
            raise ValueError(f"{name} is encrypted")
        # zipfile inflates these two in pieces of a given size, the others at once
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{name} is compressed by method {member.compress_type}, where NumPy stores or deflates")
    if (size := sum(member.file_size for member in members.values())) > limit:
        raise ValueError(f"its arrays take {size:,} bytes, more than {INFLATION} times the file")
    return members


def _array(archive: zipfile.ZipFile, name: str, member: zipfile.ZipInfo) -> np.ndarray:
    with _damage(f"{name} cannot be read"), archive.open(member) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        held = member.file_size - file.tell()
    if dtype.hasobject:
        raise ValueError(f"{name} holds Python objects, which are not unpickled")
    # NumPy would ask for the memory that the header claims
    if (claimed := math.prod(shape) * dtype.itemsize) != held:
        raise ValueError(f"{name} claims {claimed:,} bytes and holds {held:,}")
    with _damage(f"{name} cannot be read"), archive.open(member) as file:
        return np.lib.format.read_array(file, allow_pickle=False)


@contextlib.contextmanager
def _damage(what: str) -> Iterator[None]:
    """Turns what zipfile and NumPy raise for damaged bytes into a ValueError. Nothing but calls of these stands inside.

    They document no list of types; BadZipFile, zlib.error, EOFError, struct.error and others were seen.
    """
    try:
        yield
    except Exception as error:
        raise ValueError(f"{what}: {str(error) or type(error).__name__}") from error
