"""The parts that a piecewise-linear network may be made of, each as one rule on numbers that know their errors.

Known are convolutions, linear layers, batch norm in eval mode, ReLU, pooling, branches that are added or laid side by
side, normalisation, and what only rearranges. Anything else is `Unprovable`, by name.
"""

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from audit.certificate.proof.arithmetic import Constant, Exact, Slope, inverse_root, laid_together
from audit.errors import AuditError

Number: TypeAlias = Exact | Slope
_LOWEST = -1e60  # what a maximum's margin is padded with: never the largest


class Unprovable(AuditError):
    """The network holds something that no proof can read; the message names it."""


class Walk(Protocol):
    """What rules ask of the walk that they are a part of."""

    def relu(self, value: Any) -> Any:
        """Return the value where it is positive, zero elsewhere."""

    def largest(self, windows: Any) -> Any:
        """Return the largest along axis 2 of windows (N, C, K, L), without that axis."""

    def constant(self, make: Callable[[], tuple[Constant, ...]]) -> tuple[Constant, ...]:
        """Return this node's constants, made once."""


def _convolution(walk: Walk, module: nn.Conv2d, value: Number) -> Number:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unprovable(f"a convolution with padding {module.padding_mode!r}, {module.padding!r} is not read")

    def apply(values: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(values, weight, None, module.stride, module.padding, module.dilation, module.groups)

    weight = module.weight.detach().double()
    return _biased(walk, value.linear(apply, weight, weight[0].numel()), module.bias, (1, -1, 1, 1))


def _linear(walk: Walk, module: nn.Linear, value: Number) -> Number:
    weight = module.weight.detach().double()
    return _biased(walk, value.linear(F.linear, weight, module.in_features), module.bias, (-1,))


def _biased(walk: Walk, value: Number, bias: Tensor | None, shape: Sequence[int]) -> Number:
    if bias is None:
        return value
    (constant,) = walk.constant(lambda: (Constant.of(bias.view(shape)),))
    return value.shift(constant)


def _batch_norm(walk: Walk, module: nn.BatchNorm1d | nn.BatchNorm2d, value: Number) -> Number:
    if module.training or module.running_mean is None or module.running_var is None:
        raise Unprovable("a batch norm that follows its batch is not read: eval mode and its statistics are needed")
    scale, shift = walk.constant(lambda: _folded(module))
    return value.scale(scale).shift(shift)


def _folded(module: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Constant, Constant]:
    """Return scale and shift of a batch norm, from its numbers as they are."""
    assert module.running_mean is not None
    assert module.running_var is not None
    means, variances = _fractions(module.running_mean), _fractions(module.running_var)
    weights = [Fraction(1)] * len(means) if module.weight is None else _fractions(module.weight)
    biases = [Fraction(0)] * len(means) if module.bias is None else _fractions(module.bias)
    scales = [w * inverse_root(v + Fraction(module.eps)) for w, v in zip(weights, variances, strict=True)]
    shifts = [b - m * s for b, m, s in zip(biases, means, scales, strict=True)]
    shape = torch.Size((1, len(means), 1, 1) if isinstance(module, nn.BatchNorm2d) else (1, len(means)))
    return Constant.real(scales, shape), Constant.real(shifts, shape)


def _fractions(numbers: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in numbers.detach().double().tolist()]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _max_pool(walk: Walk, module: nn.MaxPool2d, value: Number) -> Number:
    if _pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
        raise Unprovable("a maximum over windows with gaps or half windows is not read")
    kernel, stride, (down, right) = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
    wide = value.padded([right, right, down, down], _LOWEST)
    sizes = [(n - k) // s + 1 for n, k, s in zip(wide.shape[2:], kernel, stride, strict=True)]

    def windows(part: Tensor) -> Tensor:
        return F.unfold(part, kernel, stride=stride).unflatten(1, (part.shape[1], prod(kernel)))

    best: Number = walk.largest(wide.shaped(windows))
    return best.shaped(lambda part: part.unflatten(2, sizes))


def _average(walk: Walk, value: Number, total: Callable[[Tensor], Tensor], count: int) -> Number:
    summed = value.linear(lambda part, weight: total(part) * weight, torch.ones((), dtype=torch.float64), count)
    (share,) = walk.constant(lambda: (Constant.real([Fraction(1, count)], torch.Size(())),))
    return summed.scale(share)


def _average_pool(walk: Walk, module: nn.AvgPool2d, value: Number) -> Number:
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    if _pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
        raise Unprovable("an average over padded windows or with a divisor of its own is not read")
    return _average(walk, value, lambda part: F.avg_pool2d(part, kernel, stride, divisor_override=1), prod(kernel))


def _adaptive_pool(walk: Walk, module: nn.AdaptiveAvgPool2d, value: Number) -> Number:
    return _adaptive(walk, value, module.output_size)


def _adaptive(walk: Walk, value: Number, size: Any) -> Number:
    if size not in (1, (1, 1), [1, 1]):
        raise Unprovable(f"an adaptive average to the size {size!r} is not read; 1 is")
    return _mean(walk, value, (2, 3), True)


def _mean(walk: Walk, value: Number, dim: Any, keepdim: bool = False) -> Number:
    rank = len(value.shape)
    axes = sorted(axis % rank for axis in ([dim] if isinstance(dim, int) else dim))
    if 0 in axes:
        raise Unprovable("an average over images is not read")
    count = prod(value.shape[axis] for axis in axes)
    return _average(walk, value, lambda part: part.sum(axes, keepdim=keepdim), count)


def _add(walk: Walk, first: Any, second: Any) -> Any:
    if isinstance(first, Exact | Slope) and isinstance(second, Exact | Slope):
        return first.add(second)  # type: ignore[arg-type]
    value, other = (first, second) if isinstance(first, Exact | Slope) else (second, first)
    return value.shift(walk.constant(lambda: (_constant(other, value),))[0])


def _subtract(walk: Walk, first: Any, second: Any) -> Any:
    if not isinstance(first, Exact | Slope):
        return _add(walk, second.negated(), first)
    if isinstance(second, Exact | Slope):
        return first.add(second.negated())  # type: ignore[arg-type]
    return first.shift(walk.constant(lambda: (_constant(second, first, lambda value: -value),))[0])


def _multiply(walk: Walk, first: Any, second: Any) -> Any:
    value, other = (first, second) if isinstance(first, Exact | Slope) else (second, first)
    return value.scale(walk.constant(lambda: (_constant(other, value),))[0])


def _divide(walk: Walk, first: Any, second: Any) -> Any:
    return first.scale(walk.constant(lambda: (_constant(second, first, lambda value: 1 / value),))[0])


def _constant(other: Any, value: Any, function: Callable[[Fraction], Fraction] = lambda same: same) -> Constant:
    """Return a number or tensor of the network's, or a function of it, as constants."""
    if not isinstance(value, Exact | Slope) or not isinstance(other, Tensor | int | float):
        raise Unprovable("a product or quotient of two features is not piecewise linear")
    if isinstance(other, Tensor) and other.dim() > 0 and len(other) != 1 and other.dim() == len(value.shape):
        raise Unprovable("a constant that differs between images is not read")
    return Constant.of(torch.as_tensor(other, dtype=torch.float64), function)


def _flatten(walk: Walk, value: Number, start_dim: int = 0, end_dim: int = -1) -> Number:  # noqa: ARG001
    if start_dim == 0:
        raise Unprovable("a flattening that joins images is not read")
    return value.shaped(lambda part: part.flatten(start_dim, end_dim))


def _view(walk: Walk, value: Number, *shape: Any) -> Number:  # noqa: ARG001
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    return value.shaped(lambda part: part.reshape(len(part), *sizes[1:]))


def _size(walk: Walk, value: Number, dim: int | None = None) -> Any:  # noqa: ARG001
    return value.shape if dim is None else value.shape[dim]


def _item(walk: Walk, value: Any, index: Any) -> Any:  # noqa: ARG001
    if not isinstance(value, Exact | Slope):
        return value[index]
    if not isinstance(index, tuple) or index[0] != slice(None):
        raise Unprovable("a choice among images is not read")
    return value.shaped(lambda part: part[index])


def _pad(
    walk: Walk,  # noqa: ARG001
    number: Number,
    /,
    pad: Any,
    mode: str = "constant",
    value: float | None = None,
) -> Number:
    if mode != "constant" or value:
        raise Unprovable(f"a margin of the kind {mode!r} is not read; zeros are")
    return number.padded(list(pad), 0.0)


def _concatenate(walk: Walk, parts: Sequence[Number], dim: int = 0) -> Number:  # noqa: ARG001
    if dim == 0:
        raise Unprovable("images laid side by side are not read")
    return laid_together(parts, dim)  # type: ignore[arg-type]


def _dropout(walk: Walk, module: nn.Dropout | nn.Dropout2d, value: Number) -> Number:  # noqa: ARG001
    if module.training:
        raise Unprovable("a dropout in training mode is not read")
    return value


def _relu(walk: Walk, value: Number, inplace: bool = False) -> Any:  # noqa: ARG001
    return walk.relu(value)


def _same(walk: Walk, value: Number, *_: Any, **__: Any) -> Number:  # noqa: ARG001
    return value


MODULES: dict[type[nn.Module], Callable[[Walk, Any, Any], Any]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda walk, _, value: walk.relu(value),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: lambda walk, module, value: _flatten(walk, value, module.start_dim, module.end_dim),
    nn.Identity: lambda _walk, _, value: value,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.relu: _relu, F.relu: _relu, operator.add: _add, operator.iadd: _add, torch.add: _add,
    operator.sub: _subtract, torch.sub: _subtract, operator.mul: _multiply, operator.truediv: _divide,
    torch.flatten: _flatten, operator.getitem: _item, F.pad: _pad, torch.cat: _concatenate,
    F.adaptive_avg_pool2d: _adaptive, torch.mean: _mean,
}  # fmt: skip
METHODS: dict[Any, Callable[..., Any]] = {
    "relu": _relu, "flatten": _flatten, "view": _view, "reshape": _view, "size": _size, "mean": _mean,
    "contiguous": _same,
}  # fmt: skip
