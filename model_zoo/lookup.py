"""Check model and data set references without torch: spelling, existence of files, and hashes.

Names of timm and torchvision models need those libraries, so they are checked when the model is loaded.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path
from urllib.parse import unquote

from audit.errors import EnvironmentFault, UnknownNameError, UsageError
from model_zoo.catalogue import (
    BUNDLED,
    bundled_names,
    card_beside,
    read_card,
    read_card_file,
    robustbench_row,
    robustbench_rows,
)
from model_zoo.entries import ModelRef, is_model_ref, parse_ref
from model_zoo.relative import Folders, beside, dataset_beside, matching_files, model_beside
from model_zoo.untrusted import verify_sha256

NAMED_DATASETS = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "svhn", "imagenet")
WITH_TRAINING_SPLIT = NAMED_DATASETS[:-1]  # few have the training images of ImageNet
_PATH_EXISTS: dict[str, Callable[[Path], bool]] = {
    "folder": Path.is_dir,
    "npz": Path.is_file,
    "npy": Path.is_file,
    "parquet": lambda path: path.exists() or ("*" in path.name and any(path.parent.glob(path.name))),
}
_SUBSETS = ("imagenet:robustbench-5k",)
DATASET_FORMS = (*NAMED_DATASETS, *_SUBSETS, *(f"{prefix}:<path>" for prefix in _PATH_EXISTS))
_CLASSES = "?classes="


def expand_ref(ref: str, base: Folders = None) -> list[str]:
    """Expand a pattern to references: `bundled:digits-*`, `robustbench:cifar10/Linf/*`, `file:nets/*.pth?arch=...`.

    Any other reference is returned unchanged, as is one of files that matches none, which is then reported as missing.
    Patterns of files are matched in the working folder, then in `base`; the paths stay relative.
    Raises UnknownNameError for a pattern of names that matches none.
    """
    source, _, pattern = ref.partition(":")
    if source == "file":
        path, mark, options = pattern.partition("?")
        is_pattern = bool(set("*[") & set(path)) and not Path(beside(unquote(path), base)).exists()
        files = matching_files(unquote(path), base) if is_pattern else []
        return [f"file:{name.replace('%', '%25').replace('?', '%3F')}{mark}{options}" for name in files] or [ref]
    if source not in _NAMES or not set("*?[") & set(pattern):
        return [ref]
    names = _NAMES[source]()
    found = [name for name in names if fnmatchcase(name, pattern)]
    if not found:
        raise UnknownNameError(f"{source} pattern", pattern, names)
    return [f"{source}:{name}" for name in found]


def _robustbench_names() -> list[str]:
    return [row.entry.ref.removeprefix("robustbench:") for row in robustbench_rows()]


_NAMES: dict[str, Callable[[], list[str]]] = {"bundled": bundled_names, "robustbench": _robustbench_names}


def check_model(ref: str, base: Folders = None) -> None:
    """Check a model reference by its names, files and hashes, without loading the model.

    Relative paths are also looked for in the folder `base`.
    Raises UsageError and its subclasses for an invalid reference, EnvironmentFault for a missing file, IntegrityError
    for a hash mismatch.
    """
    for each in expand_ref(ref, base):
        parsed = model_beside(parse_ref(each), base)
        if parsed.source in _MODEL_CHECKS:
            _MODEL_CHECKS[parsed.source](parsed)


def check_dataset(ref: str, base: Folders = None) -> None:
    """Check a data set reference; raises UnknownNameError, UsageError, or EnvironmentFault for a missing path.

    Relative paths are also looked for in the folder `base`.
    """
    name, class_map = split_dataset(dataset_beside(ref, base))
    if class_map and not Path(class_map).is_file():
        raise EnvironmentFault(f"data set {ref!r}: {class_map} does not exist{_suggestion(Path(class_map))}")
    prefix, colon, path = name.partition(":")
    if not colon or prefix not in _PATH_EXISTS:
        if name not in (*NAMED_DATASETS, *_SUBSETS):
            raise UnknownNameError("data set", name, DATASET_FORMS)
        return
    if not path:
        raise UsageError(f"data set {ref!r} names no path; write {prefix}:<path>")
    if not _PATH_EXISTS[prefix](Path(path)):
        raise EnvironmentFault(f"data set {ref!r}: {path} does not exist{_suggestion(Path(path))}")


def split_dataset(ref: str) -> tuple[str, str]:
    """Split a data set reference into the data set and the path of its class map, '' without one.

    >>> split_dataset("folder:photos?classes=map.json")
    ('folder:photos', 'map.json')
    """
    name, _, class_map = ref.partition(_CLASSES)
    return name, class_map


def _check_bundled(ref: ModelRef) -> None:
    verify_sha256(BUNDLED / f"{ref.target}.safetensors", read_card(ref.target)["sha256"])


def _check_robustbench(ref: ModelRef) -> None:
    dataset, threat, name = ref.target.split("/")
    robustbench_row(dataset, threat, name)


def _check_file(ref: ModelRef) -> None:
    path, arch = Path(ref.target), ref.options.get("arch", "")
    if not ref.options and (card := card_beside(path)):
        verify_sha256(path, read_card_file(card, f"the weights {path.name}")["sha256"])
        return
    if path.suffix.lower() == ".onnx":
        arch = ""
    elif not arch or "num_classes" not in ref.options:
        missing = "arch=" if not arch else "num_classes="
        raise UsageError(
            f"a file: reference needs {missing}, such as file:{ref.target}?arch=timm:resnet18&num_classes=10"
        )
    if arch and is_model_ref(arch):
        inner = parse_ref(arch)
        if inner.source == "bundled":
            read_card(inner.target)
        elif inner.source == "robustbench":
            _check_robustbench(inner)
    elif (code := Path(arch.rpartition(":")[0])).suffix == ".py" and not code.is_file():
        raise EnvironmentFault(f"the factory file {code} does not exist{_suggestion(code)}")
    if not path.is_file():
        raise EnvironmentFault(f"weights file {path} does not exist{_suggestion(path)}")
    verify_sha256(path, ref.options.get("sha256", ""))


_MODEL_CHECKS: dict[str, Callable[[ModelRef], None]] = {
    "bundled": _check_bundled,
    "robustbench": _check_robustbench,
    "file": _check_file,
}


def _suggestion(path: Path) -> str:
    """Return "; did you mean ...?" with the nearest file names beside a missing path, '' where there are none."""
    from difflib import get_close_matches

    try:
        others = sorted(other.name for other in path.parent.iterdir())
    except OSError:
        return ""
    near = get_close_matches(path.name, others, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""
