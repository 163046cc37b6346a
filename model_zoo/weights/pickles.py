"""Static analysis of pickles from their opcodes, before any of them runs, and the allow-list of metadata types.

torch's restricted unpickler runs no code, but a pickle of a kilobyte can still make it allocate gigabytes
(`bytearray(10**10)`), nest tuples until hashing them overflows the stack, or fill the memory with empty lists.
The opcodes alone reveal such files.
"""

import pickletools
import re
import struct
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any, NamedTuple

from audit.errors import UnsafeError

MAX_STEPS = 1_000_000  # an empty list takes one step and 64 bytes
MAX_DEPTH = 30
MAX_NESTED = 100_000
_LEGACY_PICKLES = 5  # magic number, protocol, system info, contents, storage keys; raw storages follow
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# Globals in the pickle of a plain state dict: tensors, dtypes, devices, and common metadata.
_HARMLESS = re.compile(
    r"torch\.(\w+Storage|storage\.UntypedStorage|_utils\._rebuild_\w+|_tensor\._rebuild_from_type_v2|Size|device|nn\.parameter\.Parameter"
    r"|bool|b?float\w*|u?int\d+|complex\d+|serialization\._get_layout)|torch\.Tensor"
    r"|collections\.(OrderedDict|Counter)|(__builtin__|builtins)\.(set|complex)|_codecs\.encode"
    r"|argparse\.Namespace|numpy\.dtype|numpy\._?core\.multiarray\.scalar"
)
# The class of the storage of float8 tensors: rebuilding one names it, and calling it allocates any number of bytes.
_NEVER_CALLED = "torch.storage.UntypedStorage"
_CALLEE = {"REDUCE": 2, "NEWOBJ": 2, "NEWOBJ_EX": 3}  # its place from the top of the stack
_CODES = {"b1": "?", "i1": "b", "u1": "B", "i2": "h", "u2": "H", "i4": "i", "u4": "I", "i8": "q", "u8": "Q"}
_CODES |= {"f2": "e", "f4": "f", "f8": "d"}


@dataclass(frozen=True)
class PickleScan:
    """The globals that the pickles of a file import, their tuple nesting, and whether the pickles are complete."""

    names: frozenset[str]
    depth: int
    nested: int
    whole: bool

    @property
    def unsafe_names(self) -> list[str]:
        """The imported globals outside the allow-list, sorted."""
        return sorted(name for name in self.names if not _HARMLESS.fullmatch(name))


def scan_pickles(data: bytes, origin: str) -> PickleScan:
    """Analyse the pickles at the start of `data` without running them.

    Raises UnsafeError for more than 1,000,000 opcodes.
    """
    interpreter, stream, whole = _PickleInterpreter(origin), BytesIO(data), True
    for number in range(_LEGACY_PICKLES):
        if number and data[stream.tell() : stream.tell() + 1] != b"\x80":
            break
        try:
            interpreter.run(pickletools.genops(stream))
        except (ValueError, EOFError):
            whole = False  # truncated, or foreign bytes between the opcodes, such as the arrays of joblib
            break
    return PickleScan(frozenset(interpreter.names), interpreter.depth, interpreter.nested, whole)


def check_tuple_nesting(found: PickleScan, origin: str) -> None:
    """Raise UnsafeError for tuples nested so deeply or so often that hashing one would not terminate."""
    if found.depth > MAX_DEPTH or found.nested > MAX_NESTED:
        message = f"{origin} nests tuples {found.depth} deep around {found.nested} values; it is not opened"
        raise UnsafeError(message)


class _Value(NamedTuple):
    """An abstract stack value: tuple depth and number of values counted with multiplicity, or a string."""

    depth: int = 0
    size: int = 1
    text: str = ""


_SCALAR = _Value()


@dataclass
class _PickleInterpreter:
    """Abstract interpreter of a pickle: its stack holds strings and tuple sizes instead of values."""

    origin: str
    names: set[str] = field(default_factory=set)
    steps: int = 0
    depth: int = 0
    nested: int = 0

    def run(self, opcodes: Iterator[tuple[pickletools.OpcodeInfo, Any, int | None]]) -> None:
        self.stack: list[_Value | None] = []  # None stands for a mark
        self.memo: dict[int, _Value] = {}
        for opcode, argument, _ in opcodes:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise UnsafeError(f"{self.origin} is a pickle of more than {MAX_STEPS:,} steps; it is not opened")
            self._record_globals(opcode.name, argument)
            self._execute(opcode, argument)

    def _record_globals(self, opcode: str, argument: Any) -> None:
        if opcode in ("GLOBAL", "INST"):
            name = str(argument).replace(" ", ".")
            self.names.add(f"and call {name}" if (opcode, name) == ("INST", _NEVER_CALLED) else name)
        elif opcode == "STACK_GLOBAL":
            self.names.add(".".join(value.text for value in self.stack[-2:] if value))
        elif opcode in _CALLEE and _NEVER_CALLED in self.names:
            callee = self.stack[-_CALLEE[opcode]] if len(self.stack) >= _CALLEE[opcode] else None
            if callee is None or callee.text == _NEVER_CALLED:
                self.names.add(f"and call {_NEVER_CALLED}")
        elif opcode.startswith("EXT"):
            self.names.add(f"entry {argument} of the extension registry")

    def _execute(self, opcode: pickletools.OpcodeInfo, argument: Any) -> None:
        name = opcode.name
        if name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            key = len(self.memo) if name == "MEMOIZE" else int(argument)
            self.memo[key] = self.stack[-1] or _SCALAR if self.stack else _SCALAR
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo.get(int(argument), _SCALAR))
        elif name == "DUP":
            self.stack.append(self.stack[-1] if self.stack else _SCALAR)
        elif name == "TUPLE":
            self._push_tuple(self._pop_to_mark())
        elif name in _TUPLES:
            self._push_tuple([self._pop() for _ in range(_TUPLES[name])])
        else:
            parts = [value.text for value in self.stack[-2:] if value] if name == "STACK_GLOBAL" else []
            self._apply_stack_effect(opcode)
            text = argument.replace(" ", ".") if name == "GLOBAL" else ".".join(parts) or argument
            if isinstance(text, str) and self.stack and self.stack[-1] is _SCALAR:
                self.stack[-1] = _Value(text=text)

    def _apply_stack_effect(self, opcode: pickletools.OpcodeInfo) -> None:
        before, after = opcode.stack_before, opcode.stack_after
        if pickletools.markobject in before:
            self._pop_to_mark()
            before = before[: before.index(pickletools.markobject)]
        for _ in before:
            self._pop()
        self.stack += [None if value is pickletools.markobject else _SCALAR for value in after]

    def _push_tuple(self, parts: list[_Value]) -> None:
        depth = 1 + max((part.depth for part in parts), default=0)
        size = sum(part.size for part in parts)
        self.depth = max(self.depth, depth)
        if depth > 1:
            self.nested = max(self.nested, size)
        self.stack.append(_Value(depth, max(1, size)))

    def _pop(self) -> _Value:
        return (self.stack.pop() or _SCALAR) if self.stack else _SCALAR

    def _pop_to_mark(self) -> list[_Value]:
        parts = []
        while self.stack:
            part = self.stack.pop()
            if part is None:
                break
            parts.append(part)
        return parts


class NumpyDtypeStandIn:
    """Replacement of numpy.dtype during unpickling, limited to twelve scalar types."""

    def __init__(self, code: str, *_: object) -> None:
        if code not in _CODES:
            raise ValueError(f"a numpy scalar of the kind {code!r:.20}")
        self.code, self.order = _CODES[code], "<"

    def __setstate__(self, state: tuple[object, ...]) -> None:
        """Read the byte order from the state that numpy stores, and ignore the rest."""
        self.order = ">" if state[1] == ">" else "<"


def unpack_scalar(kind: NumpyDtypeStandIn, data: bytes = b"") -> float:
    """Decode a pickled numpy scalar without numpy; raises struct.error for bytes of another length."""
    value: float = struct.unpack(kind.order + kind.code, data)[0]
    return value


ALLOWED: list[Any] = [
    Namespace,
    (NumpyDtypeStandIn, "numpy.dtype"),
    (unpack_scalar, "numpy.core.multiarray.scalar"),  # the name before numpy 2
    (unpack_scalar, "numpy._core.multiarray.scalar"),
]
"""Types allowed besides tensors: argparse.Namespace and numpy scalars, common as metadata of checkpoints."""
