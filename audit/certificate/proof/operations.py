"""Operations of piecewise-linear networks, each as one rule on numbers with rigorous error bounds.

Supported are convolutions, linear layers, batch norm in eval mode, ReLU, pooling, sums and concatenations of branches,
normalisation, and changes of shape. Any other operation raises `Unprovable` with its name.

A number is an enclosure, enclosed derivatives, or the bounds over a ball of `certificate.robust_images`.
"""

import operator
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

from audit.certificate.proof.arithmetic import Constant, inverse_square_root
from audit.certificate.proof.numbers import Interpreter, Number, Unprovable

_LOWEST = -1e60  # padding of a maximum: never the largest


class Convolution:
    """The linear map of a convolution without its bias, and the transposed map."""

    def __init__(self, module: nn.Conv2d) -> None:
        self._settings: tuple[Any, ...] = (module.stride, module.padding, module.dilation, module.groups)

    def __call__(self, values: Tensor, weight: Tensor) -> Tensor:
        """Return the convolved values."""
        return F.conv2d(values, weight, None, *self._settings)

    @property
    def geometry(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int], int]:
        """Stride, padding and dilation along rows and columns, and the number of groups."""
        stride, padding, dilation, groups = self._settings
        return _pair(stride), _pair(padding), _pair(dilation), groups

    def transposed(self, rows: Tensor, weight: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the transposed map of rows (M, ...), as (M, *shape)."""
        return conv2d_input([len(rows), *shape], weight, rows, *self._settings)


def _convolution(interpreter: Interpreter, module: nn.Conv2d, value: Number) -> Number:
    if module.padding_mode != "zeros" or isinstance(module.padding, str):
        raise Unprovable(f"convolution with padding {module.padding_mode!r}, {module.padding!r} is not supported")

    weight = module.weight.detach().double()
    convolved = value.linear(Convolution(module), weight, weight[0].numel())
    return _biased(interpreter, convolved, module.bias, (1, -1, 1, 1))


def _linear(interpreter: Interpreter, module: nn.Linear, value: Number) -> Number:
    weight = module.weight.detach().double()
    return _biased(interpreter, value.linear(F.linear, weight, module.in_features), module.bias, (-1,))


def _biased(interpreter: Interpreter, value: Number, bias: Tensor | None, shape: Sequence[int]) -> Number:
    if bias is None:
        return value
    (constant,) = interpreter.constant(lambda: (Constant.of(bias.view(shape)),))
    return value.shift(constant)


def _batch_norm(interpreter: Interpreter, module: nn.BatchNorm1d | nn.BatchNorm2d, value: Number) -> Number:
    if module.training or module.running_mean is None or module.running_var is None:
        raise Unprovable(
            "batch norm with batch statistics is not supported: eval mode and running statistics are needed"
        )
    scale, shift = interpreter.constant(lambda: _folded(module))
    return value.scale(scale).shift(shift)


def _folded(module: nn.BatchNorm1d | nn.BatchNorm2d) -> tuple[Constant, Constant]:
    """Return scale and shift of a batch norm in eval mode, from its parameters as exact numbers."""
    assert module.running_mean is not None
    assert module.running_var is not None
    means, variances = _fractions(module.running_mean), _fractions(module.running_var)
    weights = [Fraction(1)] * len(means) if module.weight is None else _fractions(module.weight)
    biases = [Fraction(0)] * len(means) if module.bias is None else _fractions(module.bias)
    scales = [w * inverse_square_root(v + Fraction(module.eps)) for w, v in zip(weights, variances, strict=True)]
    shifts = [b - m * s for b, m, s in zip(biases, means, scales, strict=True)]
    shape = torch.Size((1, len(means), 1, 1) if isinstance(module, nn.BatchNorm2d) else (1, len(means)))
    return Constant.of_fractions(scales, shape), Constant.of_fractions(shifts, shape)


def _fractions(numbers: Tensor) -> list[Fraction]:
    return [Fraction(value) for value in numbers.detach().double().tolist()]


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _max_pool(interpreter: Interpreter, module: nn.MaxPool2d, value: Number) -> Number:
    if _pair(module.dilation) != (1, 1) or module.ceil_mode or module.return_indices:
        raise Unprovable("max pooling with dilation, ceil_mode or return_indices is not supported")
    kernel, stride, (down, right) = _pair(module.kernel_size), _pair(module.stride), _pair(module.padding)
    wide = value.pad([right, right, down, down], _LOWEST)
    sizes = [(n - k) // s + 1 for n, k, s in zip(wide.shape[2:], kernel, stride, strict=True)]

    def windows(part: Tensor) -> Tensor:
        return F.unfold(part, kernel, stride=stride).unflatten(1, (part.shape[1], prod(kernel)))

    best: Number = interpreter.maximum(wide.rearrange(windows))
    return best.rearrange(lambda part: part.unflatten(2, sizes))


def _average(interpreter: Interpreter, value: Number, total: Callable[[Tensor], Tensor], count: int) -> Number:
    summed = value.linear(lambda part, weight: total(part) * weight, torch.ones((), dtype=torch.float64), count)
    (share,) = interpreter.constant(lambda: (Constant.of_fractions([Fraction(1, count)], torch.Size(())),))
    return summed.scale(share)


def _average_pool(interpreter: Interpreter, module: nn.AvgPool2d, value: Number) -> Number:
    kernel, stride = _pair(module.kernel_size), _pair(module.stride)
    if _pair(module.padding) != (0, 0) or module.ceil_mode or module.divisor_override:
        raise Unprovable("average pooling with padding, ceil_mode or divisor_override is not supported")
    return _average(
        interpreter, value, lambda part: F.avg_pool2d(part, kernel, stride, divisor_override=1), prod(kernel)
    )


def _adaptive_pool(interpreter: Interpreter, module: nn.AdaptiveAvgPool2d, value: Number) -> Number:
    return _adaptive(interpreter, value, module.output_size)


def _adaptive(interpreter: Interpreter, value: Number, size: Any) -> Number:
    if size not in (1, (1, 1), [1, 1]):
        raise Unprovable(f"adaptive average pooling to the size {size!r} is not supported; legal: 1")
    return _mean(interpreter, value, (2, 3), True)


def _mean(interpreter: Interpreter, value: Number, dim: Any, keepdim: bool = False) -> Number:
    rank = len(value.shape)
    axes = sorted(axis % rank for axis in ([dim] if isinstance(dim, int) else dim))
    if 0 in axes:
        raise Unprovable("a mean over the batch is not supported")
    count = prod(value.shape[axis] for axis in axes)
    return _average(interpreter, value, lambda part: part.sum(axes, keepdim=keepdim), count)


def _add(interpreter: Interpreter, first: Any, second: Any) -> Any:
    if isinstance(first, Number) and isinstance(second, Number):
        return first.add(second)
    value, other = (first, second) if isinstance(first, Number) else (second, first)
    return value.shift(interpreter.constant(lambda: (_constant(other, value),))[0])


def _subtract(interpreter: Interpreter, first: Any, second: Any) -> Any:
    if not isinstance(first, Number):
        return _add(interpreter, second.negate(), first)
    if isinstance(second, Number):
        return first.add(second.negate())
    return first.shift(interpreter.constant(lambda: (_constant(second, first, lambda value: -value),))[0])


def _multiply(interpreter: Interpreter, first: Any, second: Any) -> Any:
    value, other = (first, second) if isinstance(first, Number) else (second, first)
    return value.scale(interpreter.constant(lambda: (_constant(other, value),))[0])


def _divide(interpreter: Interpreter, first: Any, second: Any) -> Any:
    return first.scale(interpreter.constant(lambda: (_constant(second, first, lambda value: 1 / value),))[0])


def _constant(other: Any, value: Any, function: Callable[[Fraction], Fraction] = lambda same: same) -> Constant:
    """Return a function of a number or tensor of the network as constants."""
    if not isinstance(value, Number) or not isinstance(other, Tensor | int | float):
        raise Unprovable("a product or quotient of two features is not piecewise linear")
    if isinstance(other, Tensor) and other.dim() > 0 and len(other) != 1 and other.dim() == len(value.shape):
        raise Unprovable("a constant that differs between images is not supported")
    return Constant.of(torch.as_tensor(other, dtype=torch.float64), function)


def _flatten(interpreter: Interpreter, value: Number, start_dim: int = 0, end_dim: int = -1) -> Number:  # noqa: ARG001
    if start_dim == 0:
        raise Unprovable("flattening the batch dimension is not supported")
    return value.rearrange(lambda part: part.flatten(start_dim, end_dim))


def _view(interpreter: Interpreter, value: Number, *shape: Any) -> Number:  # noqa: ARG001
    sizes = list(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else list(shape)
    return value.rearrange(lambda part: part.reshape(len(part), *sizes[1:]))


def _size(interpreter: Interpreter, value: Number, dim: int | None = None) -> Any:  # noqa: ARG001
    return value.shape if dim is None else value.shape[dim]


def _item(interpreter: Interpreter, value: Any, index: Any) -> Any:  # noqa: ARG001
    if not isinstance(value, Number):
        return value[index]
    if not isinstance(index, tuple) or index[0] != slice(None):
        raise Unprovable("indexing the batch dimension is not supported")
    return value.rearrange(lambda part: part[index])


def _pad(
    interpreter: Interpreter,  # noqa: ARG001
    number: Number,
    /,
    pad: Any,
    mode: str = "constant",
    value: float | None = None,
) -> Number:
    if mode != "constant" or value:
        raise Unprovable(f"padding of mode {mode!r} with value {value!r} is not supported; legal: constant zeros")
    return number.pad(list(pad), 0.0)


def _concatenate(interpreter: Interpreter, parts: Sequence[Number], dim: int = 0) -> Number:  # noqa: ARG001
    if dim == 0:
        raise Unprovable("concatenation along the batch dimension is not supported")
    return parts[0].concatenate(parts[1:], dim)


def _dropout(interpreter: Interpreter, module: nn.Dropout | nn.Dropout2d, value: Number) -> Number:  # noqa: ARG001
    if module.training:
        raise Unprovable("dropout in training mode is not supported")
    return value


def _relu(interpreter: Interpreter, value: Number, inplace: bool = False) -> Any:  # noqa: ARG001
    return interpreter.relu(value)


def _same(interpreter: Interpreter, value: Number, *_: Any, **__: Any) -> Number:  # noqa: ARG001
    return value


MODULES: dict[type[nn.Module], Callable[[Interpreter, Any, Any], Any]] = {
    nn.Conv2d: _convolution,
    nn.Linear: _linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.ReLU: lambda interpreter, _, value: interpreter.relu(value),
    nn.MaxPool2d: _max_pool,
    nn.AvgPool2d: _average_pool,
    nn.AdaptiveAvgPool2d: _adaptive_pool,
    nn.Flatten: lambda interpreter, module, value: _flatten(interpreter, value, module.start_dim, module.end_dim),
    nn.Identity: lambda _interpreter, _, value: value,
    nn.Dropout: _dropout,
    nn.Dropout2d: _dropout,
}
FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.relu: _relu,
    F.relu: _relu,
    operator.add: _add,
    operator.iadd: _add,
    torch.add: _add,
    operator.sub: _subtract,
    torch.sub: _subtract,
    operator.mul: _multiply,
    operator.truediv: _divide,
    torch.flatten: _flatten,
    operator.getitem: _item,
    F.pad: _pad,
    torch.cat: _concatenate,
    F.adaptive_avg_pool2d: _adaptive,
    torch.mean: _mean,
}
METHODS: dict[Any, Callable[..., Any]] = {
    "relu": _relu,
    "flatten": _flatten,
    "view": _view,
    "reshape": _view,
    "size": _size,
    "mean": _mean,
    "contiguous": _same,
}
