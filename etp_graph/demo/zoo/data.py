"""Image data sets: scikit-learn's digits, which are part of that package, and CIFAR-10 from a folder or a download."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from etp_graph.errors import EtpError

ENVIRONMENT = "ETP_GRAPH_DATA"

PART = 10_000  # images in one mosaic file

CLASSES = 10

# The published CIFAR ResNet weights were trained with the mean and standard deviation of ImageNet.
MEAN = (0.485, 0.456, 0.406)

STD = (0.229, 0.224, 0.225)

Bytes = NDArray[np.uint8]

Labels = NDArray[np.int64]


class DataError(EtpError):
    """A data set or a file of weights is missing or unusable, and could not be downloaded."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Split:
    """Images, float32 [n, c, h, w], and labels, int64 [n], of the training, validation and test sets."""

    train_x: Tensor
    train_y: Tensor
    val_x: Tensor
    val_y: Tensor
    test_x: Tensor
    test_y: Tensor


def data_root() -> Path:
    """Return the folder of data sets: ``$ETP_GRAPH_DATA``, else ``../shared/data`` if it exists, else a cache folder.

    ``../shared/data`` is relative to the current directory or to the checkout of the sources. The cache folder is
    ``$XDG_CACHE_HOME/etp_graph`` or ``~/.cache/etp_graph``; it may not exist yet.
    """
    chosen = os.environ.get(ENVIRONMENT)
    if chosen:
        return Path(chosen).expanduser()
    for base in (Path.cwd(), Path(__file__).resolve().parents[2]):
        candidate = base.parent / "shared" / "data"
        if candidate.is_dir():
            return candidate
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache).expanduser() if cache else Path.home() / ".cache") / "etp_graph"


def digits(*, seed: int = 0) -> Split:
    """Return 1,797 handwritten digits of 10 classes, 8x8 (Alpaydin & Kaynak 1998).

    Every class is shuffled with ``seed`` and split into 60 % training, 15 % validation and 25 % test images. Images
    have shape [n, 1, 8, 8], with pixel values 0..16 scaled to -1..1. They are part of scikit-learn; nothing is
    downloaded.

    Raises:
        DataError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise DataError('the digits are inside scikit-learn: pip install "etp-graph[demo]".') from error
    pixels, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    y = torch.as_tensor(labels, dtype=torch.int64)
    train, val, test = _stratified(y, (0.6, 0.15), seed)
    return Split(train_x=x[train], train_y=y[train], val_x=x[val], val_y=y[val], test_x=x[test], test_y=y[test])


def _stratified(labels: Tensor, fractions: tuple[float, ...], seed: int) -> list[Tensor]:
    """Return shuffled positions for each fraction of every class, and for the rest: int64, sorted by class."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for label in torch.unique(labels):
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        sizes = [round(fraction * len(members)) for fraction in fractions]
        pieces = torch.split(members, [*sizes, len(members) - sum(sizes)])
        for part, piece in zip(parts, pieces, strict=True):
            part.append(piece)
    return [torch.cat(part) for part in parts]


def cifar10(
    *, limit: int | None = None, validation: int = 5_000, test_limit: int | None = None, root: Path | None = None
) -> Split:
    """Return CIFAR-10 (Krizhevsky 2009), normalised for the published weights, shape [n, 3, 32, 32].

    Labels have the official order (airplane 0 ... truck 9). Images are ordered so that every prefix whose length is a
    multiple of ten is class-balanced; ``limit`` and ``test_limit`` take prefixes. The validation images are the first
    ``validation`` images of the training set, the same for every ``limit``.

    If the folder ``cifar10`` holds ``labels.npz``, the images are read from the lossless mosaics ``train_0.webp`` to
    ``train_4.webp`` and ``test_0.webp`` in it (100 x 100 images each). Only the needed files are decoded, in about a
    second each. Otherwise torchvision downloads the original data set into the folder. Both sources have the same
    images and labels in a different order. Images of the download are taken from the classes in turn, and within a
    class in the order of the SHA-256 of their pixels.

    Args:
        limit: number of training images, after the validation images; default: all that are left.
        validation: number of validation images, taken from the training set.
        test_limit: number of test images; default: all 10,000.
        root: folder that contains ``cifar10``; default: :func:`data_root`.

    Raises:
        DataError: there is no copy and the download fails, or more images are requested than there are.
    """
    folder = (data_root() if root is None else root) / "cifar10"
    if limit is None:
        limit = 50_000 - validation
    n_test = 10_000 if test_limit is None else test_limit
    if min(limit, validation, n_test) < 0 or limit + validation > 50_000 or n_test > 10_000:
        raise DataError(
            f"cifar10(limit={limit}, validation={validation}, test_limit={n_test}): "
            "there are 50,000 training images, validation included, and 10,000 test images."
        )
    read = _mosaics if (folder / "labels.npz").is_file() else _download
    pixels, labels = read(folder, "train", limit + validation)
    x, y = _normalise(pixels), torch.from_numpy(labels)
    pixels, labels = read(folder, "test", n_test)
    return Split(
        train_x=x[validation:], train_y=y[validation:], val_x=x[:validation], val_y=y[:validation],
        test_x=_normalise(pixels), test_y=torch.from_numpy(labels),
    )  # fmt: skip


def _normalise(pixels: Bytes) -> Tensor:
    """Convert uint8 [n, 32, 32, 3] to normalised float32 [n, 3, 32, 32], with a single copy."""
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(torch.float32, memory_format=torch.contiguous_format)
    return x.div_(255).sub_(torch.tensor(MEAN).view(3, 1, 1)).div_(torch.tensor(STD).view(3, 1, 1))


def _mosaics(folder: Path, part: str, count: int) -> tuple[Bytes, Labels]:
    """Return the first ``count`` images and labels of a part of the mosaic copy."""
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError('reading WebP images needs Pillow: pip install "etp-graph[demo]".') from error
    images = []
    for number in range(-(-count // PART)):
        path = folder / f"{part}_{number}.webp"
        try:
            with Image.open(path) as mosaic:
                rows = np.asarray(mosaic)
        except OSError as error:
            raise DataError(
                f"cannot read {path} ({error}): complete the copy of CIFAR-10, or set {ENVIRONMENT} elsewhere."
            ) from error
        if rows.shape != (3200, 3200, 3):
            raise DataError(f"{path} is {rows.shape}, not a mosaic of 100 x 100 images of 32x32 RGB.")
        tiles = rows.reshape(100, 32, 100, 32, 3).swapaxes(1, 2).reshape(PART, 32, 32, 3)
        images.append(tiles[: count - number * PART])
    with np.load(folder / "labels.npz", allow_pickle=False) as table:
        labels = table[f"{part}_labels"][:count].astype(np.int64)
    return np.concatenate([np.empty((0, 32, 32, 3), np.uint8), *images]), labels


def _download(folder: Path, part: str, count: int) -> tuple[Bytes, Labels]:
    """Return the first ``count`` images and labels of the original in a class-balanced order; downloads 170 MB once."""
    try:
        from torchvision.datasets import CIFAR10
    except ModuleNotFoundError as error:
        raise DataError(
            f"no CIFAR-10 in {folder} and no torchvision to download it: set {ENVIRONMENT} to the folder that "
            'holds cifar10/, or pip install "etp-graph[demo]".'
        ) from error
    try:
        original = CIFAR10(str(folder), train=part == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise DataError(
            f"no CIFAR-10 in {folder} and the download failed ({error}): set {ENVIRONMENT} to a folder that holds "
            "cifar10/, or try again with a network connection."
        ) from error
    pixels: Bytes = np.asarray(original.data, np.uint8)
    labels: Labels = np.asarray(original.targets, np.int64)
    order = _balanced_order(pixels, labels)[:count]
    return pixels[order], labels[order]


def _balanced_order(pixels: Bytes, labels: Labels) -> Labels:
    """Return an order that takes images from the classes in turn; a class is sorted by the SHA-256 of its images."""
    digests = np.array([hashlib.sha256(image.tobytes()).digest() for image in pixels], dtype="S32")
    by_class = [np.flatnonzero(labels == label) for label in range(CLASSES)]
    dealt = [members[np.argsort(digests[members], kind="stable")] for members in by_class]
    return np.stack(dealt, axis=1).reshape(-1)


def load_weights(model: nn.Module, name: str) -> None:
    """Load ``<data_root>/weights/<name>.safetensors`` into ``model``, in place.

    The file must hold every tensor of the model and no other. Only the batch counters of norms may be missing, because
    weights from before PyTorch 0.4.1 have none.

    Args:
        model: the architecture that the weights were trained with, for example ``resnet20()``.
        name: file name without suffix, such as ``resnet20_cifar10`` or ``resnet56_cifar10``.

    Raises:
        DataError: the file is missing or damaged, or holds weights of another architecture. The model is unchanged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = data_root() / "weights" / f"{name}.safetensors"
    if not path.is_file():
        have = sorted(other.stem for other in path.parent.glob("*.safetensors"))
        raise DataError(f"no weights at {path} (there: {have or 'nothing'}); set {ENVIRONMENT} to the folder above.")
    try:
        loaded = load_file(path)
    except SafetensorError as error:
        raise DataError(f"{path} is not a safetensors file ({error}); copy it again.") from error
    own = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    missing = {key for key in own.keys() - loaded.keys() if not key.endswith(".num_batches_tracked")}
    wrong = sorted(missing | {key for key, tensor in loaded.items() if own.get(key) != tuple(tensor.shape)})
    if wrong:
        raise DataError(
            f"{path.name} does not fit {type(model).__name__}: {len(wrong)} tensors differ, first {wrong[0]}; "
            "build the architecture that the file is named after."
        )
    model.load_state_dict(loaded)
