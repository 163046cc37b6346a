"""What the rules of a network's operations ask of numbers, and of the interpreter that applies them."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from audit.certificate.proof.arithmetic import Apply, Constant
from audit.errors import AuditError


class Unprovable(AuditError):
    """The network contains an operation that the proof does not support; the message names it."""


@runtime_checkable
class Number(Protocol):
    """Numbers of a network's values (N, ...), with the affine operations that the rules are made of."""

    @property
    def shape(self) -> torch.Size:
        """The shape of the numbers."""

    def rearrange(self, change: Callable[[Tensor], Tensor], /) -> Self:
        """Return the numbers after a change of shape or order."""

    def negate(self) -> Self:
        """Return the negated numbers."""

    def pad(self, sides: list[int], value: float, /) -> Self:
        """Return the numbers padded with a constant."""

    def shift(self, constant: Constant, /) -> Self:
        """Return the numbers with constants added, broadcast."""

    def add(self, other: Self, /) -> Self:
        """Return the sums."""

    def scale(self, constant: Constant, /) -> Self:
        """Return the products with constants, broadcast."""

    def linear(self, apply: Apply, weight: Tensor, fan_in: int, /) -> Self:
        """Return a linear map of the numbers; each output is a sum of at most `fan_in` products with weights."""

    def concatenate(self, others: Sequence[Self], axis: int, /) -> Self:
        """Return these numbers and others along an axis."""


class Interpreter(Protocol):
    """The interface that rules use of the interpreter that applies them."""

    def relu(self, value: Any) -> Any:
        """Return max(value, 0)."""

    def maximum(self, windows: Any) -> Any:
        """Return the maximum (N, C, L) along axis 2 of windows (N, C, K, L)."""

    def constant(self, make: Callable[[], tuple[Constant, ...]]) -> tuple[Constant, ...]:
        """Return this node's constants, computed once."""
