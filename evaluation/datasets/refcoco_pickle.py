"""Turn `refs(unc).p` into JSON without loading it: the opcodes are read as data, and none of them can run anything.

A pickle is a program for a stack machine (the standard library's pickletools describes every opcode). Lists,
dictionaries, tuples, texts and numbers need a small part of it; whatever else turns up, above all what looks up or
calls something (GLOBAL, REDUCE, BUILD …), is refused with its name and place.
"""

from __future__ import annotations

import codecs
import io
import json
import pickletools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bridge_stg.runtime.errors import AnnotationError
from bridge_stg.runtime.host.files import replacing

EMPTY: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None, "NEWTRUE": lambda: True, "NEWFALSE": lambda: False,
    "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_TUPLE": list,
}  # fmt: skip
VALUES = ("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "UNICODE",
          "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8")  # fmt: skip
BYTES = ("STRING", "BINSTRING", "SHORT_BINSTRING")
"""Texts of Python 2, which the published files were written with."""
PUT, GET = ("PUT", "BINPUT", "LONG_BINPUT"), ("GET", "BINGET", "LONG_BINGET")
GROWTH = 8
"""How many values a pickle may unfold into for each of its opcodes: sharing could make a few bytes fill the memory."""

_MARK = object()


def convert_refs(pickle_file: Path, out: Path) -> int:
    """Write the refs of a pickle as JSON and return how many there are.

    Raises:
        AnnotationError: the file is no whole pickle, holds anything but plain values, or is no list of refs.
    """
    refs = read_plain_pickle(pickle_file)
    if not isinstance(refs, list) or not all(isinstance(ref, dict) and "sentences" in ref for ref in refs):
        raise AnnotationError(f"{pickle_file}: holds no list of refs; expected a file such as refs(unc).p.")
    with replacing(out) as partial:
        partial.write_text(json.dumps(refs, ensure_ascii=False), encoding="utf-8")
    return len(refs)


def read_plain_pickle(path: Path) -> Any:
    """Return what a pickle of plain values holds; tuples become lists.

    Raises:
        AnnotationError: it is no whole pickle, or holds anything but plain values.
    """
    machine = _Machine(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); expected a pickle of refs.") from None
    try:
        for name, argument, place in opcodes(data):
            if name == "STOP":
                return machine.result(place)
            machine.step(name, argument, place)
    except (ValueError, IndexError, KeyError, TypeError, UnicodeError) as error:
        raise AnnotationError(f"{path}: is no whole pickle ({error}). Fetch it again from its publisher.") from None
    raise AnnotationError(f"{path}: is no whole pickle (it has no end). Fetch it again from its publisher.")


def opcodes(data: bytes) -> Iterator[tuple[str, Any, int]]:
    """Yield (name, argument, byte) for each opcode of a pickle, as `pickletools.genops`, which refuses one thing.

    Python 2 wrote texts beyond ASCII in protocol 0 as escapes of their bytes; these are kept as bytes here.
    """
    known = {opcode.code: opcode for opcode in pickletools.opcodes}
    stream = io.BytesIO(data)
    while code := stream.read(1):
        place, opcode = stream.tell() - 1, known.get(code.decode("latin-1"))
        if opcode is None:
            raise ValueError(f"byte {place}: {code!r} is no opcode")
        if opcode.name == "STRING":
            yield opcode.name, _quoted(stream.readline()), place
        else:
            yield opcode.name, None if opcode.arg is None else opcode.arg.reader(stream), place


def _quoted(line: bytes) -> bytes:
    """Return the bytes of a text in quotes, its escapes resolved."""
    text = line.rstrip(b"\n")
    if len(text) < 2 or text[:1] not in (b"'", b'"') or text[-1:] != text[:1] or line == text:
        raise ValueError(f"{line[:20]!r} is no text in quotes")
    return codecs.escape_decode(text[1:-1])[0]  # type: ignore[attr-defined]  # what pickle itself calls


class _Machine:
    """The stack of a pickle, for the opcodes of plain values."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def refuse(self, what: str, place: int | None) -> Any:
        raise AnnotationError(
            f"{self.path}: holds {what} at byte {place}; expected lists, dictionaries, texts and numbers alone. It is "
            "no published file of refs, or it was tampered with: do not load it, fetch it again."
        )

    def step(self, name: str, argument: Any, place: int | None) -> None:
        """Apply one opcode."""
        self.steps += 1
        stack = self.stack
        if name in EMPTY:
            stack.append(EMPTY[name]())
        elif name in VALUES:
            stack.append(argument)
        elif name in BYTES:
            stack.append(_text(argument))
        elif name == "MARK":
            stack.append(_MARK)
        elif name in ("LIST", "TUPLE"):
            stack.append(self.taken())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            count = int(name[-1])
            stack[-count:] = [stack[-count:]]
        elif name == "DICT":
            stack.append(self.set_items({}, self.taken(), place))
        elif name in ("APPEND", "APPENDS"):
            items = [stack.pop()] if name == "APPEND" else self.taken()
            if not isinstance(stack[-1], list):
                self.refuse(f"{name} to no list", place)
            stack[-1].extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = [stack.pop(-2), stack.pop()] if name == "SETITEM" else self.taken()
            if not isinstance(stack[-1], dict):
                self.refuse(f"{name} to no dictionary", place)
            self.set_items(stack[-1], items, place)
        elif name in PUT or name == "MEMOIZE":
            self.memo[len(self.memo) if name == "MEMOIZE" else argument] = stack[-1]
        elif name in GET:
            stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME"):
            self.refuse(f"the opcode {name}", place)

    def taken(self) -> list[Any]:
        """Take what stands above the last mark, and the mark, off the stack."""
        items: list[Any] = []
        while (item := self.stack.pop()) is not _MARK:
            items.append(item)
        return items[::-1]

    def set_items(self, target: dict[str, Any], items: list[Any], place: int | None) -> dict[str, Any]:
        """Put keys and values, in turn, into a dictionary."""
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, str):
                self.refuse(f"a dictionary's key that is a {type(key).__name__}", place)
            target[key] = value
        return target

    def result(self, place: int | None) -> Any:
        """Return what the pickle holds; refuse one that unfolds into far more than it is, or that holds itself."""
        if len(self.stack) != 1:
            self.refuse(f"{len(self.stack)} values where one is expected", place)
        left = GROWTH * self.steps + 64
        todo = list(self.stack)
        while todo:
            value = todo.pop()
            left -= 1
            if left < 0:
                self.refuse("values that hold each other over and over", place)
            todo.extend(value if isinstance(value, list) else value.values() if isinstance(value, dict) else ())
        return self.stack[0]


def _text(value: str | bytes) -> str:
    """Return a Python 2 text: pickletools gives its bytes as Latin-1."""
    raw = value.encode("latin-1") if isinstance(value, str) else value
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")
