"""The tensors that a pickle of torch.save describes, read without running any of it.

A pickle is a program. Of its instructions only those are followed that put together dictionaries, tuples and tensors'
descriptions; of the functions it may ask to call, a closed list is known, and none of them is called: a description is
noted where torch would make a tensor (`torch/_utils.py`). Every other name is refused. What is read is never larger than
the pickle, and no value is compared or hashed but texts.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from l4pack.checkpoint.header import DTYPE_BITS
from l4pack.errors import SourceError

MAX_PICKLE_BYTES = 16_000_000  # Maverick's has some 300 kB
_MAX_INSTRUCTIONS = 2_000_000
_STORAGES = {
    "BFloat16Storage": "BF16", "HalfStorage": "F16", "FloatStorage": "F32", "DoubleStorage": "F64", "CharStorage": "I8",
    "ByteStorage": "U8", "ShortStorage": "I16", "IntStorage": "I32", "LongStorage": "I64", "BoolStorage": "BOOL",
}  # fmt: skip
_DTYPES = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64", "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2", "float8_e8m0fnu": "F8_E8M0", "int8": "I8", "uint8": "U8", "int16": "I16", "uint16": "U16",
    "int32": "I32", "uint32": "U32", "int64": "I64", "uint64": "U64", "bool": "BOOL",
}  # fmt: skip
_TENSOR, _TYPED, _PARAMETER = (f"torch._utils._rebuild_{what}" for what in ("tensor_v2", "tensor_v3", "parameter"))
_ORDERED = "collections.OrderedDict"
_UNTYPED = "torch.storage.UntypedStorage"
_OPAQUE = ("_io.BytesIO", "_codecs.encode")  # what Transformer Engine keeps beside weights
_KNOWN = {
    _TENSOR, _TYPED, _PARAMETER, _ORDERED, _UNTYPED, *_OPAQUE,
    *(f"torch.{name}" for name in (*_STORAGES, *_DTYPES)),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Described:
    """A tensor as a pickle describes it: a storage of `held` bytes by its key, and where in it the numbers lie."""

    dtype: str
    key: str
    held: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Opaque:
    """Anything but a tensor; what it is is not looked at."""


@dataclass(frozen=True, slots=True)
class _Global:
    name: str


@dataclass(frozen=True, slots=True)
class _Storage:
    dtype: str | None
    key: str
    held: int


def described(raw: bytes, file: str) -> dict[str, Described | Opaque]:
    """What a pickle names, in its order. Raises SourceError for one that is not a dictionary of tensors by name."""
    machine = _Machine(file)
    try:
        for done, (opcode, argument, _) in enumerate(pickletools.genops(raw)):
            if done == _MAX_INSTRUCTIONS:
                raise ValueError("it does not end")
            machine.follow(opcode.name, argument)
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, UnicodeError, OverflowError) as error:
        raise SourceError(f"{file} has a data.pkl that can't be read ({error!s:.80})", hint=_DAMAGED) from error
    top = machine.stack[-1] if machine.stack else None
    if not isinstance(top, dict):
        raise SourceError(f"{file} holds no dictionary of tensors", hint=_PLAIN)
    return {name: value if isinstance(value, Described) else Opaque() for name, value in top.items()}


_DAMAGED = "the file is damaged, or not what torch.save writes: download it again"
_PLAIN = "a shard holds weights by name, as Meta released them: is this another kind of file?"


class _Machine:
    """The stack and the memory of a pickle's instructions."""

    def __init__(self, file: str) -> None:
        self.file = file
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}

    def follow(self, name: str, argument: Any) -> None:
        """Do one instruction."""
        action = _ACTIONS.get(name)
        if action is None:
            raise SourceError(
                f"{self.file} has a data.pkl with {name}, which no dictionary of tensors needs", hint=_PLAIN
            )
        action(self, argument)

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def mark(self, _: Any) -> None:
        self._marks.append(len(self.stack))

    def since_mark(self) -> list[Any]:
        place = self._marks.pop()
        values = self.stack[place:]
        del self.stack[place:]
        return values

    def last(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise IndexError("it takes more than there is")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def put(self, place: int) -> None:
        self._memo[place] = self.stack[-1]

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self.stack[-1]

    def get(self, place: int) -> None:
        self.push(self._memo[place])

    def find(self, name: str) -> None:
        if name not in _KNOWN:
            raise SourceError(
                f"{self.file} asks to call {ascii(name)[1:-1]:.100}: it holds more than tensors, and is not opened",
                hint="don't load it with other tools either; get the release from where it was published",
            )
        self.push(_Global(name))

    def items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or not all(isinstance(key, str) for key in values[::2]):
            raise TypeError("names that are no texts")
        target.update(zip(values[::2], values[1::2], strict=True))

    def append(self, values: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError("an item of no list")
        self.stack[-1].extend(values)

    def reduce(self, _: Any) -> None:
        function, arguments = self.last(2)
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise TypeError("a call of what is no function")
        self.push(_made(function.name, arguments))

    def build(self, _: Any) -> None:
        self.last(1)
        if not isinstance(self.stack[-1], dict | Opaque):
            raise TypeError("a state of what has none")

    def persistent(self, _: Any) -> None:
        (value,) = self.last(1)
        match value:
            case ("storage", _Global(kind), str(key), str(), int(held)) if held >= 0:
                if kind == _UNTYPED:
                    self.push(_Storage(None, key, held))
                else:
                    self.push(_Storage(_STORAGES[kind.removeprefix("torch.")], key, held))
            case _:
                raise TypeError("a storage that can't be one")


def _made(function: str, arguments: tuple[Any, ...]) -> Any:
    """What stands for the value of a call."""
    match arguments:
        case () if function == _ORDERED:
            return {}
        case _ if function in _OPAQUE:
            return Opaque()
        case (Described() as tensor, *_) if function == _PARAMETER:
            return tensor
        case (_Storage(str() as dtype) as storage, int(offset), tuple(shape), tuple(strides), *_) if (
            function == _TENSOR
        ):
            return _described(dtype, storage, offset, shape, strides)
        case (_Storage(None) as storage, int(offset), tuple(shape), tuple(strides), _, _, _Global(kind), *_) if (
            function == _TYPED
        ):
            return _described(_DTYPES[kind.removeprefix("torch.")], storage, offset, shape, strides)
    raise TypeError(f"a call of {function} with what it does not take")


def _described(
    dtype: str, storage: _Storage, offset: int, shape: tuple[Any, ...], strides: tuple[Any, ...]
) -> Described:
    sizes = (offset, *shape, *strides)
    if len(shape) != len(strides) or len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in sizes):
        raise ValueError("a tensor of an impossible shape")
    held = storage.held if storage.dtype is None else storage.held * DTYPE_BITS[dtype] // 8
    return Described(dtype, storage.key, held, offset, shape, strides)


def _constants(value: Callable[[], Any]) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(value())


def _stack_global(machine: _Machine, _: Any) -> None:
    module, name = machine.last(2)
    if not isinstance(module, str) or not isinstance(name, str):
        raise TypeError("a name that is no text")
    machine.find(f"{module}.{name}")


def _tuple(count: int) -> Callable[[_Machine, Any], None]:
    return lambda machine, _: machine.push(tuple(machine.last(count)))


def _nothing(machine: _Machine, argument: Any) -> None:
    """Of an instruction that only says how a pickle is written."""


_ACTIONS: Mapping[str, Callable[[_Machine, Any], None]] = {
    **dict.fromkeys(("PROTO", "FRAME", "STOP"), _nothing),
    **dict.fromkeys(
        ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINBYTES", "SHORT_BINBYTES"),
        _Machine.push,
    ),
    "NONE": _constants(lambda: None),
    "NEWTRUE": _constants(lambda: True),
    "NEWFALSE": _constants(lambda: False),
    "EMPTY_TUPLE": _constants(tuple),
    "EMPTY_LIST": _constants(list),
    "EMPTY_DICT": _constants(dict),
    "MARK": _Machine.mark,
    "TUPLE": lambda machine, _: machine.push(tuple(machine.since_mark())),
    "TUPLE1": _tuple(1),
    "TUPLE2": _tuple(2),
    "TUPLE3": _tuple(3),
    **dict.fromkeys(("BINPUT", "LONG_BINPUT"), _Machine.put),
    **dict.fromkeys(("BINGET", "LONG_BINGET"), _Machine.get),
    "MEMOIZE": _Machine.memoize,
    "GLOBAL": lambda machine, argument: machine.find(argument.replace(" ", ".", 1)),
    "STACK_GLOBAL": _stack_global,
    **dict.fromkeys(("REDUCE", "NEWOBJ"), _Machine.reduce),
    "BUILD": _Machine.build,
    "SETITEM": lambda machine, _: machine.items(machine.last(2)),
    "SETITEMS": lambda machine, _: machine.items(machine.since_mark()),
    "APPEND": lambda machine, _: machine.append(machine.last(1)),
    "APPENDS": lambda machine, _: machine.append(machine.since_mark()),
    "BINPERSID": _Machine.persistent,
}  # fmt: skip
