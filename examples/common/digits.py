"""Labelled images in three parts: scikit-learn's 8x8 handwritten digits, or a file with the arrays of Keras's mnist.npz."""

import zipfile
import zlib
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


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
        ValueError: the file is missing, is no .npz file, or does not hold such arrays; says what was wanted and found.
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
    except ValueError as error:
        raise ValueError(f"y_train must hold enough labels of each class to validate on a tenth of them: {error}") from error
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
    wanted = f"must be an .npz file with the arrays {', '.join(ARRAYS)}"
    try:
        if not zipfile.is_zipfile(path):
            found = "a file of another kind" if path.is_file() else "a directory" if path.is_dir() else "no such file"
            raise ValueError(found)
        with np.load(path, allow_pickle=False) as archive:
            if missing := set(ARRAYS) - set(archive.files):
                raise ValueError(f"{', '.join(sorted(archive.files))} without {', '.join(sorted(missing))}")
            return [np.asarray(archive[name]) for name in ARRAYS]
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{wanted}, got {str(path)!r}: {error}") from error
