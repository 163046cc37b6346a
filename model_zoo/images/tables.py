"""Read data sets from parquet files in the Hugging Face layout: one file, or the shards of one split."""

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from glob import glob
from itertools import chain, islice
from pathlib import Path
from typing import Any

from torch import Tensor

from audit.errors import AuditError, EnvironmentFault, UnsafeError, UsageError
from model_zoo.images.decoding import decode
from model_zoo.images.labels import integer_labels, numbered_classes
from model_zoo.images.named import RawImages, check_count, stack
from model_zoo.images.preprocessing import Preprocessing
from model_zoo.untrusted import check_file, check_unpacked_size, printable, reason

_BATCH = 128
_MAX_ROWS = 20_000_000
_SLACK = 1_000_000
_SHARD = re.compile(r"(?P<split>.+)-\d+-of-\d+\.parquet")


def read_parquet(path: Path, count: int | None, preprocessing: Preprocessing | None = None) -> RawImages:
    """Return the first rows of parquet files in the Hugging Face layout: a struct with `bytes`, and `label`.

    The path is a file, a pattern such as `data/validation-*.parquet`, or a folder with the shards of one split. Images
    are turned upright by their EXIF orientation, as `datasets` does. Only the requested images are decoded. Raises
    EnvironmentFault for an unreadable file, UsageError for missing columns or images of unequal size.
    """
    files = parquet_files(path)
    found = [_read_labels(file) for file in files]
    names = found[0][1]
    numbers = integer_labels([label for labels, _ in found for label in labels], str(path))
    if not len(numbers):
        raise UsageError(f"{path} has no rows; give a file with images")
    classes = names or numbered_classes(numbers, str(path))  # before images are decoded, which takes longest
    check_count(count, len(numbers), path)
    chosen = len(numbers[:count])
    decoded = chain.from_iterable(_read_images(file, preprocessing) for file in files)
    pixels, indices = stack(islice(decoded, chosen), chosen), tuple(range(chosen))
    return RawImages(pixels, numbers[:chosen], classes, indices, len(numbers), numbered=not names)


def parquet_files(path: Path) -> list[Path]:
    """Return the file of a path, or the files that a pattern or a folder with one split names, in order.

    Raises EnvironmentFault where there is none, UsageError for a folder with several splits.
    """
    if "*" in path.name or "?" in path.name:
        found = [Path(name) for name in sorted(glob(str(path)))]
    elif path.is_dir():
        found = sorted(path.glob("*.parquet")) or sorted(path.glob("data/*.parquet"))
        splits = sorted({match["split"] for file in found if (match := _SHARD.fullmatch(file.name))})
        if len(splits) > 1:
            message = f"folder {path} holds the splits {', '.join(splits)}"
            raise UsageError(f"{message}; name one, such as parquet:{found[0].parent}/{splits[-1]}-*.parquet")
        if not found:
            raise EnvironmentFault(f"folder {path} holds no parquet files; give a file, or a folder with shards")
    else:
        found = [path] if path.exists() else []
    if not found:
        raise EnvironmentFault(f"parquet file {path} does not exist; give the path of a file")
    return found


def _read_labels(path: Path) -> tuple[list[Any], tuple[str, ...]]:
    """Return the labels of all rows of a file, and the names of the classes, () without."""
    with _opened(path) as file:
        _, column = _find_columns(file.schema_arrow.names, path)
        batches = file.iter_batches(columns=[column])
        labels = [label for batch in batches for label in batch.column(0).to_pylist()]
        return labels, _class_names(file.schema_arrow.metadata or {}, column)


def _read_images(path: Path, preprocessing: Preprocessing | None) -> Iterator[tuple[str, Tensor]]:
    """Yield the images of a file, each with its origin."""
    with _opened(path) as file:
        column, _ = _find_columns(file.schema_arrow.names, path)
        for row, data in enumerate(_images(file, column, path)):
            origin = f"row {row} of {path}"
            yield origin, decode(origin, data, preprocessing)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Open a parquet file after checks of its size, converting the errors of damaged files to EnvironmentFault."""
    # Imported here because pyarrow takes half a second that other data sets do not need.
    import pyarrow.parquet

    check_file(path)
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            _check_size(file.metadata, path)
            yield file
    except AuditError:
        raise
    except Exception as error:  # pyarrow and Python raise different types for every damaged part
        message = f"{path} cannot be read as a Hugging Face image parquet ({reason(error)})"
        raise EnvironmentFault(f"{message}; fetch it again") from error


def _find_columns(names: Sequence[str], path: Path) -> tuple[str, str]:
    image = next((name for name in ("image", "img") if name in names), None)
    label = next((name for name in ("label", "labels", "fine_label") if name in names), None)
    if image is None or label is None:
        raise UsageError(
            f"{path} needs a column 'image' or 'img' and a column 'label'; it has {', '.join(map(printable, names))}"
        )
    return image, label


def _check_size(metadata: Any, path: Path) -> None:
    """Raise UnsafeError for more rows than any data set has, or an implausible unpacked size."""
    if metadata.num_rows > _MAX_ROWS:
        raise UnsafeError(f"{path} claims {metadata.num_rows} rows, more than {_MAX_ROWS}; it is not read")
    unpacked = sum(metadata.row_group(index).total_byte_size for index in range(metadata.num_row_groups))
    check_unpacked_size(unpacked, path, _SLACK)


def _images(file: Any, column: str, path: Path) -> Iterator[bytes]:
    unpacked = 0
    for batch in file.iter_batches(batch_size=_BATCH, columns=[column]):
        unpacked += batch.nbytes  # an image repeated in every row takes no space in the file
        check_unpacked_size(unpacked, path, _SLACK)
        yield from (item["bytes"] for item in batch.column(0).to_pylist())


def _class_names(metadata: dict[bytes, bytes], label: str) -> tuple[str, ...]:
    """Return the class names that the `datasets` library writes into the schema, () without them."""
    try:
        features = json.loads(metadata.get(b"huggingface", b"{}"))["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (ValueError, KeyError, TypeError):
        return ()
