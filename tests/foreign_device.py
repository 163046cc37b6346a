"""A second device, emulated on the CPU: its tensors hold real values, and what fails on a GPU for want of a copy fails.

Its tensors call themselves `meta`, torch's own name for a device without memory: it needs no driver, no kernel and no
registration, and outside `foreign_device` nothing is changed. Every operation runs on the CPU tensors within, so values
are the CPU's. As on a GPU, a CPU tensor beside one of the device is a fault unless it is a single number in an
elementwise operation, or an index; so are a CPU generator that draws there, the device's own generator, whose numbers
are not the CPU's, and `.numpy()`. Copies between the devices are written down, and so are operations that a GPU can
only finish by telling the CPU what came out: after each of them it stands idle.

Not emulated: kernels, rounding, streams, pinned memory, mixed precision, and the check of a solver's error code.
"""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

import audit

_KIND = "meta"
_PACKAGE = str(Path(audit.__file__).parent)
_ATEN = torch.ops.aten
_INDEXING = {_ATEN.index, _ATEN.index_put, _ATEN.index_put_, _ATEN._unsafe_index, _ATEN._index_put_impl_}
_COPIES = {_ATEN.copy_, _ATEN._to_copy}
_ONE_NUMBER = {_ATEN.fill_, _ATEN.fill, _ATEN.masked_fill, _ATEN.masked_fill_, _ATEN.index_fill, _ATEN.index_fill_}
_WAITS = {
    _ATEN._local_scalar_dense, _ATEN.nonzero, _ATEN.masked_select, _ATEN._unique2, _ATEN.unique_dim, _ATEN.equal,
    _ATEN.unique_consecutive, _ATEN.bincount,
}  # fmt: skip


class DeviceFault(RuntimeError):
    """What a GPU would have refused, or answered with other numbers than the CPU."""


class Crossing(NamedTuple):
    """A copy to the device, or a wait for it: of which operation, and which line of the package asked for it."""

    to_host: bool
    operation: str
    where: str


class ForeignTensor(Tensor):
    """A tensor of the emulated device; `payload` is the CPU tensor that holds its values."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    payload: Tensor

    @staticmethod
    def __new__(cls, payload: Tensor) -> "ForeignTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, payload.size(), strides=payload.stride(), storage_offset=payload.storage_offset(),
            dtype=payload.dtype, device=torch.device(_KIND),
        )  # fmt: skip
        made.payload = payload
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return f"ForeignTensor({self.payload})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise DeviceFault(f"{func} of a tensor of the emulated device, outside of it")


class ForeignDevice(TorchDispatchMode):
    """The device while it is there: what went wrong on it, and what crossed over to it or back."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = torch.device(_KIND)
        self.faults: list[DeviceFault] = []
        self.crossings: list[Crossing] = []

    def waits(self) -> Counter[str]:
        """Return how often each line of the package had the CPU wait for the device."""
        return Counter(crossing.where for crossing in self.crossings if crossing.to_host)

    def fault(self, message: str) -> DeviceFault:
        """Note a fault and return it to be raised: whoever catches it does not hide it."""
        self.faults.append(DeviceFault(f"{message} ({_where()})"))
        return self.faults[-1]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in _leaves((*args, *kwargs.values())) if isinstance(leaf, Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, ForeignTensor)]
        asked = kwargs.get("device")
        if not ours and asked is None:
            return func(*args, **kwargs)
        stays = bool(ours) if asked is None else torch.device(asked).type == _KIND
        if ours:
            self._check_neighbours(func, args, kwargs, tensors)
        if stays:
            self._check_draws(func, args, kwargs)
        self._note(func, args, ours, stays=stays)
        if asked is not None:
            kwargs["device"] = torch.device("cpu")
        return _run(func, args, kwargs, ours, stays=stays)

    def _check_neighbours(self, func: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
        packet, written = func.overloadpacket, kwargs.get("out", args[0] if args else None)
        if packet in _COPIES:
            return
        if packet in _INDEXING:
            tensors = [args[0], *(leaf for leaf in _leaves((*args[2:], *kwargs.values())) if isinstance(leaf, Tensor))]
        numbers = packet in {*_ONE_NUMBER, *_INDEXING} or torch.Tag.pointwise in func.tags
        for tensor in tensors:
            if isinstance(tensor, ForeignTensor):
                continue
            if tensor.dim() or not numbers or (func._schema.is_mutable and tensor is written):
                raise self.fault(f"{func} of tensors on two devices: {tuple(tensor.shape)} is on the CPU")

    def _check_draws(self, func: Any, args: Any, kwargs: Any) -> None:
        if any(isinstance(leaf, torch.Generator) for leaf in (*args, *kwargs.values())):
            raise self.fault(f"{func} draws on the device from a generator of the CPU")
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise self.fault(f"{func} draws from the device's own generator")

    def _note(self, func: Any, args: Any, ours: list[ForeignTensor], *, stays: bool) -> None:
        """Write down a copy between devices, and a wait of the CPU for the device."""
        packet, back = func.overloadpacket, False
        if packet in _COPIES:
            source, there = (args[0], stays) if packet is _ATEN._to_copy else (args[1], _on(args[0]))
            if _on(source) == there:
                return
            back = _on(source)
        elif ours and packet in _INDEXING:
            indices = [index for index in args[1] if isinstance(index, Tensor)]
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            # a mask that one number is written through needs no count
            back = masks and not (packet is not _ATEN.index and args[2].numel() == 1)
            if not back and all(_on(index) for index in indices):
                return
        elif ours and packet in _WAITS:
            back = True
        else:
            return
        self.crossings.append(Crossing(back, str(packet), _where()))


class _Names(TorchFunctionMode):
    """What torch treats otherwise for the name `meta`, or for subclasses, than for a device with values."""

    def __init__(self, device: ForeignDevice) -> None:
        super().__init__()
        self.owner = device

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.pop("device", None)
            made = func(*args, **kwargs)
            return made if device is None else made.to(device)
        if not (args and _on(args[0])):
            return func(*args, **kwargs)
        if func is Tensor.new_tensor:
            return torch.tensor(*args[1:], **{"dtype": args[0].dtype, **kwargs}).to(args[0].device)
        if func is Tensor.tolist:
            return args[0].cpu().tolist()
        if func in (Tensor.numpy, Tensor.__array__):
            raise self.owner.fault("a tensor of the device is no NumPy array")
        found = func(*args, **kwargs)
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            args[0].payload = args[1].payload
        return found


@contextmanager
def foreign_device() -> Iterator[ForeignDevice]:
    """Give the emulated device, and raise the first of its faults in the end even where somebody caught it."""
    device = ForeignDevice()
    named = [patch.object(torch, name, _for_cpu(getattr(torch, name))) for name in ("autocast", "is_autocast_enabled")]
    with named[0], named[1], device, _Names(device):
        yield device
    if device.faults:
        raise device.faults[0]


def home(result: Any) -> Any:
    """Return a result, of whatever nesting, with the values of the device's tensors on the CPU."""
    return tree_map(_payload, result)


def _run(func: Any, args: Any, kwargs: Any, ours: list[ForeignTensor], *, stays: bool) -> Any:
    """Return what the operation gives on the CPU, as tensors of the device where it stays there."""
    known = {id(tensor.payload): tensor for tensor in ours}
    plain = {name: _mapped(_payload, value) for name, value in kwargs.items()}
    found = func(*_mapped(_payload, args), **plain)
    if torch.Tag.inplace_view in func.tags:
        with no_dispatch():
            func(*args, **kwargs)  # the outside has a shape of its own to change
    for tensor in ours:
        if tensor.shape != tensor.payload.shape:
            raise NotImplementedError(f"{func} changes the shape of a tensor of the emulated device in place")

    def wrapped(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return known.get(id(leaf)) if id(leaf) in known else ForeignTensor(leaf) if stays else leaf

    return _mapped(wrapped, found)


def _leaves(values: tuple[Any, ...]) -> list[Any]:
    """Return arguments of an operation, and what those that are lists hold: torch's own trees take far longer."""
    return [leaf for value in values for leaf in (value if isinstance(value, list | tuple) else (value,))]


def _mapped(change: Callable[[Any], Any], value: Any) -> Any:
    """Return a value, or lists and tuples of values, with a change made to each."""
    if isinstance(value, list | tuple) and not isinstance(value, torch.Size):
        return type(value)([_mapped(change, each) for each in value])
    return change(value)


def _payload(leaf: Any) -> Any:
    return leaf.payload if isinstance(leaf, ForeignTensor) else leaf


def _on(leaf: Any) -> bool:
    return isinstance(leaf, ForeignTensor)


def _for_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes the kind of a device first, which does not know this one: it hears of the CPU."""
    return lambda kind="cpu", *args, **kwargs: function("cpu" if kind == _KIND else kind, *args, **kwargs)


def _where() -> str:
    """Return the innermost line of the package that is running, such as `pgd.py:131`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_filename.startswith(_PACKAGE):
            return f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}"
        frame = frame.f_back
    return "outside of the package"
