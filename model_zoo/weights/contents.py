"""The contents of a weights file: as stored, and under the names of a network."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class Weights:
    """The named tensors of a checkpoint, the sha256 of its file, and a note for every unwrapping.

    `metadata` holds the versions that torch stores beside a state dict, by the path of the module; `extra` the extra
    state of modules that is no tensor, by name; `prefix` is the prefix of the names that the user chose, None for any.
    """

    tensors: dict[str, Tensor]
    sha256: str
    notes: tuple[str, ...] = ()
    metadata: dict[str, dict[str, object]] | None = None
    extra: dict[str, object] = field(default_factory=dict)
    prefix: str | None = None


@dataclass(frozen=True)
class Renamed:
    """The contents of a checkpoint under one renaming: what lies under the names of a network, and what was left.

    `notes` describe the renaming; `left` are the stored names that the rule does not reach.
    """

    tensors: dict[str, Tensor]
    metadata: dict[str, dict[str, object]] | None = None
    extra: dict[str, object] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    left: tuple[str, ...] = ()
    prefix: str = ""
