"""What can be told about a reference without torch: is it spelled rightly, is what it names there, is its hash right.

Names of timm and torchvision need those libraries, so they are told when the model is loaded.
"""

from collections.abc import Callable
from fnmatch import fnmatchcase
from pathlib import Path

from audit.errors import EnvironmentFault, UnknownNameError, UsageError
from model_zoo.catalogue import BUNDLED, bundled_names, card_beside, read_card, read_card_file, robustbench_row
from model_zoo.entries import ModelRef, is_model_ref, parse_ref
from model_zoo.sources.downloads import verify

NAMED_SETS = ("digits", "cifar10", "cifar100", "mnist", "fashion-mnist", "svhn")
_KINDS: dict[str, Callable[[Path], bool]] = {"folder": Path.is_dir, "npz": Path.is_file, "parquet": Path.exists}


def expand_ref(ref: str) -> list[str]:
    """Return the references that a pattern such as `bundled:digits-*` stands for; any other reference as it is.

    Raises UnknownNameError for a pattern that no bundled model matches.
    """
    source, _, pattern = ref.partition(":")
    if source != "bundled" or not set("*?[") & set(pattern):
        return [ref]
    names = [name for name in bundled_names() if fnmatchcase(name, pattern)]
    if not names:
        raise UnknownNameError("bundled pattern", pattern, bundled_names())
    return [f"bundled:{name}" for name in names]


def check_model(ref: str) -> None:
    """Raise what loading the model would raise, as far as that can be told from names, files and hashes alone.

    Raises UsageError and its kinds for a reference that is wrong, EnvironmentFault for a missing file,
    IntegrityError for another hash than promised.
    """
    for each in expand_ref(ref):
        parsed = parse_ref(each)
        if parsed.source in _CHECKS:
            _CHECKS[parsed.source](parsed)


def check_dataset(ref: str) -> None:
    """Raise UnknownNameError for a data set nobody knows, EnvironmentFault for a file or folder that is not there."""
    prefix, colon, path = ref.partition(":")
    if not colon or prefix not in _KINDS:
        if ref not in NAMED_SETS:
            raise UnknownNameError("data set", ref, (*NAMED_SETS, *(f"{kind}:<path>" for kind in _KINDS)))
        return
    if not path:
        raise UsageError(f"data set {ref!r} names no path; write {prefix}:<path>")
    if not _KINDS[prefix](Path(path)):
        raise EnvironmentFault(f"data set {ref!r}: {path} does not exist{_beside(Path(path))}")


def _check_bundled(ref: ModelRef) -> None:
    verify(BUNDLED / f"{ref.target}.safetensors", read_card(ref.target)["sha256"])


def _check_robustbench(ref: ModelRef) -> None:
    dataset, threat, name = ref.target.split("/")
    robustbench_row(dataset, threat, name)


def _check_file(ref: ModelRef) -> None:
    path, arch = Path(ref.target), ref.options.get("arch", "")
    if not ref.options and (card := card_beside(path)):
        verify(path, read_card_file(card, f"the weights {path.name}")["sha256"])
        return
    if not arch or "num_classes" not in ref.options:
        missing = "arch=" if not arch else "num_classes="
        raise UsageError(
            f"a file: reference needs {missing}, such as file:{ref.target}?arch=timm:resnet18&num_classes=10"
        )
    if is_model_ref(arch):
        inner = parse_ref(arch)
        if inner.source == "bundled":
            read_card(inner.target)
        elif inner.source == "robustbench":
            _check_robustbench(inner)
    elif (code := Path(arch.rpartition(":")[0])).suffix == ".py" and not code.is_file():
        raise EnvironmentFault(f"the factory file {code} does not exist{_beside(code)}")
    if not path.is_file():
        raise EnvironmentFault(f"weights file {path} does not exist{_beside(path)}")
    verify(path, ref.options.get("sha256", ""))


_CHECKS: dict[str, Callable[[ModelRef], None]] = {
    "bundled": _check_bundled,
    "robustbench": _check_robustbench,
    "file": _check_file,
}


def _beside(path: Path) -> str:
    """Return the tail of a sentence: the nearest names beside a path that is not there."""
    from difflib import get_close_matches

    try:
        others = sorted(other.name for other in path.parent.iterdir())
    except OSError:
        return ""
    near = get_close_matches(path.name, others, n=3, cutoff=0.5)
    return f"; did you mean {' or '.join(str(path.with_name(name)) for name in near)}?" if near else ""
