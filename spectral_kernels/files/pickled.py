"""What a pickle describes, as plain data: its instructions are read, and nothing they name is looked up or called.

`torch.save` and CIFAR-10's python batches write pickles. The few names that such files need stand for functions of ours,
which build plain values; any other name is refused.
"""

import pickletools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

LIMIT = 2**26  # bytes of a pickle
MOST = 8_000_000  # instructions, and values of a tree
_KEYS = (str, bytes, int)


class NotPlain(ValueError):
    """Bytes that are no pickle, or one that asks for more than plain data."""


@dataclass(frozen=True)
class Function:
    """What a name stands for."""

    name: str
    call: Callable[..., Any]


@dataclass(frozen=True)
class Opaque:
    """What a name that is not known stands for, and whatever is made with it: no value, and nothing was done to make it."""

    name: str


class Built(ABC):
    """A value that takes its content after it was made; `build` is given it."""

    @abstractmethod
    def build(self, state: Any) -> None: ...


def read_pickled(
    data: bytes,
    known: Mapping[str, Callable[..., Any]],
    persistent: Callable[[Any], Any] | None = None,
    *,
    lenient: bool = False,
) -> Any:
    """The value of a pickle.

    Args:
        known: functions that stand for names, by "module.name".
        persistent: from the identity of something outside of the pickle to a value.
        lenient: other names, and values of other kinds, become `Opaque`, so that what is beside them can be had.

    Raises:
        NotPlain: no pickle, a name that is not known, or what a known function refuses.
    """
    if len(data) > LIMIT:
        raise NotPlain(f"it holds {len(data)} bytes, at most {LIMIT} are read")
    machine = _Machine(known, persistent, lenient)
    try:
        for count, (opcode, argument, _place) in enumerate(pickletools.genops(data)):
            if count > MOST:
                raise NotPlain(f"it has more than {MOST} instructions")
            machine.step(opcode.name, argument)
        return machine.stack.pop()
    except NotPlain:
        raise
    # a warning is one where warnings are errors
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, Warning) as error:
        raise NotPlain(f"no pickle of plain data: {' '.join(str(error).split())[:120]}") from error


def from_latin1(text: Any, encoding: Any) -> bytes:
    """What `_codecs.encode` stands for: protocol 2 has no bytes, and writes them as text."""
    if type(text) is not str or encoding not in ("latin1", "latin-1"):
        raise NotPlain("a text in another encoding than latin1")
    return text.encode("latin-1")


class _Machine:
    """The stack and the memory that a pickle's instructions work on."""

    def __init__(
        self, known: Mapping[str, Callable[..., Any]], persistent: Callable[[Any], Any] | None, lenient: bool
    ) -> None:
        self.stack: list[Any] = []
        self._marks: list[int] = []
        self._memo: dict[int, Any] = {}
        self._known, self._persistent = known, persistent
        self._made, self._lenient = 0, lenient

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "PROTO" | "FRAME" | "STOP":
                pass
            case "BININT" | "BININT1" | "BININT2" | "LONG1" | "LONG4":
                fits = -(2**63) <= argument < 2**63
                stack.append(argument if fits else self._opaque("a whole number of more than 64 bits"))
            case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8":
                stack.append(argument)
            case "BINFLOAT" | "BYTEARRAY8":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # of Python 2, whose text is bytes
                stack.append(argument.encode("latin-1"))
            case "NONE" | "NEWTRUE" | "NEWFALSE":
                stack.append({"NONE": None, "NEWTRUE": True, "NEWFALSE": False}[name])
            case "EMPTY_LIST" | "EMPTY_TUPLE" | "EMPTY_DICT":
                stack.append({"EMPTY_LIST": list, "EMPTY_TUPLE": tuple, "EMPTY_DICT": dict}[name]())
            case "MARK":
                self._marks.append(len(stack))
            case "TUPLE":
                stack.append(tuple(self._pop_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self._pop(int(name[-1]))))
            case "APPEND":
                (item,) = self._pop(1)
                self._top(list).append(item)
            case "APPENDS":
                items = self._pop_mark()
                self._top(list).extend(items)
            case "EMPTY_SET" | "FROZENSET":
                if name == "FROZENSET":
                    self._pop_mark()
                stack.append(self._opaque("a set"))
            case "ADDITEMS":
                self._pop_mark()
                self._top(set)
            case "SETITEM":
                self._set(self._pop(2))
            case "SETITEMS":
                self._set(self._pop_mark())
            case "BINPUT" | "LONG_BINPUT" | "MEMOIZE":
                self._memo[len(self._memo) if name == "MEMOIZE" else argument] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(self._memo[argument])
            case "POP":
                self._pop(1)
            case "GLOBAL":
                self._name(argument.replace(" ", ".", 1))
            case "STACK_GLOBAL":
                module, attribute = self._pop(2)
                if type(module) is not str or type(attribute) is not str:
                    raise NotPlain("a name that is no text")
                self._name(f"{module}.{attribute}")
            case "REDUCE" | "NEWOBJ":
                function, arguments = self._pop(2)
                stack.append(self._counted(self._called(function, arguments)))
            case "NEWOBJ_EX":
                function, arguments, _names = self._pop(3)
                stack.append(self._opaque("a call by names", function))
            case "BUILD":
                (state,) = self._pop(1)
                if isinstance(stack[-1], Built):
                    stack[-1].build(state)
                elif not isinstance(stack[-1], dict | Opaque):  # a dictionary's attributes are nobody's affair
                    raise NotPlain("a state of what has none")
            case "BINPERSID" if self._persistent is not None:
                (identity,) = self._pop(1)
                stack.append(self._persistent(identity))
            case _:
                raise NotPlain(f"an instruction {name}, which plain data has no use for")

    def _opaque(self, what: str, of: Any = None) -> Opaque:
        if not self._lenient:
            raise NotPlain(what)
        return of if isinstance(of, Opaque) else Opaque(what)

    def _called(self, function: Any, arguments: Any) -> Any:
        if isinstance(function, Opaque):
            return function
        if not isinstance(function, Function) or type(arguments) is not tuple:
            raise NotPlain("a call of what is no function")
        for argument in arguments:
            if isinstance(argument, Opaque):
                return argument
        return function.call(*arguments)

    def _counted(self, value: Any) -> Any:
        """A few instructions may make much of a text that stands there once."""
        if type(value) in (bytes, str, tuple, dict):
            self._made += len(value)
        if self._made > LIMIT:
            raise NotPlain(f"its calls make more than {LIMIT} bytes")
        return value

    def _pop(self, count: int) -> list[Any]:
        if len(self.stack) < count:
            raise NotPlain("an instruction without its values")
        items = self.stack[-count:]
        del self.stack[-count:]
        return items

    def _pop_mark(self) -> list[Any]:
        start = self._marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def _top(self, kind: type) -> Any:
        top = self.stack[-1]
        if isinstance(top, Opaque):
            return kind()  # what is put into it is lost
        if type(top) is not kind:
            raise NotPlain(f"values for what is no {kind.__name__}")
        return top

    def _set(self, items: list[Any]) -> None:
        target = self._top(dict)
        for key, value in zip(items[::2], items[1::2], strict=True):
            # hashing nested tuples would go as deep as they are
            if type(key) in _KEYS:
                target[key] = value
            else:
                self._opaque(f"a key that is a {type(key).__name__}")

    def _name(self, name: str) -> None:
        known = self._known.get(name)
        if known is not None:
            self.stack.append(Function(name, known))
        else:
            self.stack.append(Opaque(name[:100]) if self._lenient else self._opaque(f"it asks for {name[:100]}"))


def as_tree(value: Any, leaf: Callable[[Any], Any]) -> Any:
    """A copy in which nothing occurs twice or in itself; of what is no plain value, what `leaf` makes of it.

    Raises:
        NotPlain: too many values, or too deep.
    """
    left = MOST

    def copied(one: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise NotPlain(f"it holds more than {MOST} values")
        if type(one) is dict:
            return {key: copied(item) for key, item in one.items()}
        if type(one) in (list, tuple):
            return type(one)(copied(item) for item in one)
        return one if one is None or type(one) in (*_KEYS, float, bool) else leaf(one)

    try:
        return copied(value)
    except RecursionError as error:
        raise NotPlain("it is nested too deep") from error
