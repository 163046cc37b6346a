"""Zero-shot heads of image towers: class names and templates, or a saved matrix, as a linear classifier.

Logits are scale * <f / |f|, w_k>, with features f of the image and a unit vector w_k for each class: the mean over
templates of the text features of "a photo of a {class}.", as in the evaluation of CLIP.

Source: Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 3.1.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from math import log
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.errors import CheckpointError, EnvironmentFault, MismatchError, UsageError
from audit.hashing import tensors_sha256
from model_zoo.images.classes import read_class_file
from model_zoo.untrusted import check_file, reason
from model_zoo.weights.checkpoints import read_weights

TEMPLATES = ("a photo of a {}.",)
LOG_SCALE = log(100)
"""The logarithm of CLIP's scale, where weights do not hold their own as `logit_scale`."""

_MAX_LOG_SCALE = log(1000)
_MAX_MATRIX = 1 << 30

EncodeTexts = Callable[[Sequence[str]], Tensor]
"""Maps texts to their features (T, D)."""


@dataclass(frozen=True, eq=False)
class ZeroShotChoice:
    """The classes of a zero-shot head: `names` in `templates`, or a saved `matrix` (K, D).

    `digest` is a hash of what decides the head beside the tower's weights.
    """

    names: tuple[str, ...] = ()
    templates: tuple[str, ...] = TEMPLATES
    matrix: Tensor | None = None
    digest: str = ""

    @property
    def classes(self) -> int:
        """The number of classes."""
        return len(self.names) if self.matrix is None else len(self.matrix)


class ZeroShot(nn.Module):
    """An image tower with a linear classifier on its normalised features: images (N, C, H, W) -> logits (N, K)."""

    def __init__(self, visual: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(features, classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of images."""
        logits: Tensor = self.head(F.normalize(self.visual(images), dim=-1))
        return logits

    def fill(self, matrix: Tensor, log_scale: float) -> None:
        """Set the classifier to the unit vectors along the rows of a matrix (K, D), scaled."""
        scale = torch.tensor(min(log_scale, _MAX_LOG_SCALE)).exp()
        with torch.no_grad():
            self.head.weight.copy_(scale * F.normalize(matrix.float(), dim=-1))


def zero_shot_choice(options: Mapping[str, str], features: int) -> ZeroShotChoice | None:
    """Return the zero-shot head that options of a reference ask for; None for a tower without a head.

    `classes` is a JSON list of names, `templates` a JSON list of texts with {}, `head` a saved matrix of one row (or
    column) of `features` numbers a class. Raises UsageError, EnvironmentFault, MismatchError, CheckpointError.
    """
    names = _texts(options, "classes")
    templates = _texts(options, "templates") or TEMPLATES
    if "head" in options:
        if "templates" in options:
            raise UsageError("head= is a saved matrix, which needs no templates=; give one of them")
        matrix = read_matrix(Path(options["head"]), features)
        if names and len(names) != len(matrix):
            raise MismatchError(f"{options['head']} has {len(matrix)} classes, {options['classes']} names {len(names)}")
        return ZeroShotChoice(names, (), matrix, tensors_sha256(matrix))
    if not names:
        if "templates" in options:
            raise UsageError("templates= needs classes=, a JSON list of class names")
        return None
    if wrong := [text for text in templates if text.count("{}") != 1]:
        raise UsageError(f"template {wrong[0]!r} does not hold {{}} once, the place of the class name")
    digest = sha256(repr((names, templates)).encode()).hexdigest()
    return ZeroShotChoice(names, templates, None, digest)


def with_choice(sha256_of_weights: str, choice: ZeroShotChoice | None) -> str:
    """Return the hash of weights and of the head beside them."""
    return sha256(f"{sha256_of_weights}{choice.digest}".encode()).hexdigest() if choice else sha256_of_weights


@torch.no_grad()
def text_matrix(encode: EncodeTexts, choice: ZeroShotChoice) -> Tensor:
    """Return the mean of the normalised text features of each class over the templates, (K, D)."""
    rows = []
    for name in choice.names:
        features = encode([template.replace("{}", name) for template in choice.templates])
        rows.append(F.normalize(features.float(), dim=-1).mean(0))
    return torch.stack(rows)


def read_matrix(path: Path, features: int) -> Tensor:
    """Return the matrix (K, features) of an .npy file or of a weights file with one tensor, transposed where needed.

    Raises EnvironmentFault, CheckpointError, UsageError for several tensors, MismatchError for another shape.
    """
    if path.suffix == ".npy":
        found = _read_npy(path)
    else:
        tensors = list(read_weights(path, max_bytes=_MAX_MATRIX).tensors.values())
        if len(tensors) != 1:
            raise UsageError(f"head={path} holds {len(tensors)} tensors; save the matrix of the classes alone")
        found = tensors[0]
    if found.dim() == 2 and found.shape[1] != features and found.shape[0] == features:
        found = found.T
    if found.dim() != 2 or found.shape[1] != features or len(found) < 2:
        shape = "x".join(map(str, found.shape))
        raise MismatchError(f"head={path} has the shape {shape}, the image tower has {features} features")
    if not found.isfinite().all() or not (found != 0).any(1).all():
        raise MismatchError(f"head={path} holds values that are not finite, or a class without any direction")
    return found.float().contiguous()


def _read_npy(path: Path) -> Tensor:
    if not path.exists():
        raise EnvironmentFault(f"head={path} does not exist")
    check_file(path, _MAX_MATRIX)
    try:
        array = np.load(path, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.float32))
    except Exception as error:  # numpy raises many types for damaged files
        message = f"head={path} is not an .npy file of numbers ({reason(error)})"
        raise CheckpointError("not_a_checkpoint", message) from error


def _texts(options: Mapping[str, str], name: str) -> tuple[str, ...]:
    """Return the texts of a JSON list, or of a mapping from texts to their places."""
    if name not in options:
        return ()
    held = read_class_file(Path(options[name]))
    if isinstance(held, dict):
        held = sorted(held, key=lambda text: held[text] if isinstance(held[text], int) else -1)
    if not all(isinstance(text, str) and text for text in held) or len(held) < (2 if name == "classes" else 1):
        raise UsageError(f'{name}={options[name]} is not a JSON list of texts, such as ["cat", "dog"]')
    return tuple(held)


def described(choice: ZeroShotChoice | None) -> tuple[str, ...]:
    """Return a note on a zero-shot head; none without one."""
    if choice is None:
        return ()
    if choice.matrix is not None:
        return (f"zero-shot head of {choice.classes} classes from a saved matrix",)
    return (f"zero-shot head of {choice.classes} class names in {len(choice.templates)} templates",)


def scale_of(tensors: Mapping[str, Tensor]) -> float:
    """Return the logarithm of the scale in weights (`logit_scale`), CLIP's where they hold none."""
    found = tensors.get("logit_scale")
    return float(found) if found is not None and found.numel() == 1 and bool(found.isfinite().all()) else LOG_SCALE
