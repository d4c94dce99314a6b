"""Small data sets in each published layout, written by the tests themselves."""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import tarfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def pixels(seed: int, *shape: int) -> np.ndarray:
    """Random bytes."""
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def idx_bytes(array: np.ndarray) -> bytes:
    return bytes((0, 0, 8, array.ndim)) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def write_idx_set(folder: Path, *, packed: bool = False, train: int = 40, test: int = 20, side: int = 28) -> dict:
    """The four files; returns what they hold."""
    folder.mkdir(parents=True, exist_ok=True)
    held = {
        "train-images-idx3-ubyte": pixels(1, train, side, side),
        "train-labels-idx1-ubyte": (np.arange(train) % 10).astype(np.uint8),
        "t10k-images-idx3-ubyte": pixels(2, test, side, side),
        "t10k-labels-idx1-ubyte": (np.arange(test) % 10).astype(np.uint8),
    }
    for name, array in held.items():
        if packed:
            (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
        else:
            (folder / name).write_bytes(idx_bytes(array))
    return held


def python2_pickle(entries: dict[bytes, object]) -> bytes:
    """A dictionary pickled as Python 2 pickled the published batches: byte strings, arrays of numpy.core."""

    def text(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    def item(value: object) -> bytes:
        if isinstance(value, bytes):
            return text(value)
        if isinstance(value, int):
            return number(value)
        if isinstance(value, list):
            return b"](" + b"".join(map(item, value)) + b"e"
        assert isinstance(value, np.ndarray) and value.dtype == np.uint8
        shape = b"(" + b"".join(map(number, value.shape)) + b"t"
        kind = b"cnumpy\ndtype\n" + text(b"u1") + number(0) + number(1) + b"\x87R"
        kind += b"(" + number(3) + text(b"|") + b"NNN" + number(-1) + number(-1) + number(0) + b"tb"
        made = b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n" + number(0) + b"\x85" + text(b"b") + b"\x87R"
        return made + b"(" + number(1) + shape + kind + b"I00\n" + text(value.tobytes()) + b"tb"

    return b"\x80\x02}(" + b"".join(text(key) + item(value) for key, value in entries.items()) + b"u."


CIFAR10 = [b"airplane", b"automobile", b"bird", b"cat", b"deer", b"dog", b"frog", b"horse", b"ship", b"truck"]


def cifar10_batches(each: int = 20) -> dict[str, dict[bytes, object]]:
    """What the published files of a small CIFAR-10 would hold."""
    held: dict[str, dict[bytes, object]] = {}
    for number, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
        held[name] = {
            b"batch_label": name.encode(),
            b"labels": [(place + number) % 10 for place in range(each)],
            b"data": pixels(number, each, 3072),
            b"filenames": [b"%d.png" % place for place in range(each)],
        }
    held["batches.meta"] = {b"num_cases_per_batch": each, b"label_names": list(CIFAR10), b"num_vis": 3072}
    return held


def write_batches(folder: Path, held: dict[str, dict[bytes, object]], python2: bool = True) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in held.items():
        (folder / name).write_bytes(python2_pickle(entries) if python2 else pickle.dumps(entries))
    return folder


def pack(folder: Path, archive: Path) -> Path:
    """An archive with a folder in it."""
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as zipped:
            for path in sorted(folder.rglob("*")):
                zipped.write(path, Path(folder.name) / path.relative_to(folder))
        return archive
    mode = {".gz": "w:gz", ".xz": "w:xz", ".tar": "w"}[archive.suffix]
    with tarfile.open(archive, mode) as packed:
        packed.add(folder, folder.name)
    return archive


def image_bytes(array: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, kind)
    return stream.getvalue()


def write_folders(
    root: Path,
    *,
    classes: tuple[str, ...] = ("ant", "bee", "cat"),
    train: int = 6,
    test: int = 2,
    size: tuple[int, int] = (8, 8),
    test_folder: str = "val",
    kind: str = "PNG",
) -> dict[str, list[np.ndarray]]:
    """An image folder; returns the images by "train" and "test", in the order of the files' names."""
    held: dict[str, list[np.ndarray]] = {"train": [], "test": []}
    suffix = {"PNG": ".png", "JPEG": ".JPEG"}[kind]
    for part, folder, count in (("train", "train", train), ("test", test_folder, test)):
        for number, name in enumerate(classes):
            place = root / folder / name
            place.mkdir(parents=True, exist_ok=True)
            for image in range(count):
                array = pixels(1000 * number + 10 * image + (part == "test"), *size, 3)
                (place / f"{name}_{image:03}{suffix}").write_bytes(image_bytes(array, kind))
                held[part].append(array)
    return held


def voc_object(name: str, box: tuple[float, float, float, float], difficult: int = 0) -> str:
    corners = "".join(f"<{key}>{value}</{key}>" for key, value in zip(("xmin", "ymin", "xmax", "ymax"), box))
    part = "<part><name>head</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>2</xmax><ymax>2</ymax></bndbox></part>"
    return f"<object><name>{name}</name><difficult>{difficult}</difficult><bndbox>{corners}</bndbox>{part}</object>"


def write_voc(
    root: Path, images: dict[str, list[str]], sets: dict[str, list[str]] | None, size: tuple[int, int] = (30, 40)
) -> Path:
    """A folder of VOC's: objects by the image's name; the split's files, or none."""
    for folder in ("Annotations", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (name, objects) in enumerate(images.items()):
        (root / "JPEGImages" / f"{name}.jpg").write_bytes(image_bytes(pixels(number, *size, 3), "JPEG"))
        (root / "Annotations" / f"{name}.xml").write_text(f"<annotation>{''.join(objects)}</annotation>")
    if sets is not None:
        main = root / "ImageSets" / "Main"
        main.mkdir(parents=True)
        for name, members in sets.items():
            (main / f"{name}.txt").write_text("".join(f"{member}\n" for member in members))
    return root
