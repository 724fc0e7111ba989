"""How text heads answer: options that are checked without loading what answers."""

from __future__ import annotations

from dataclasses import dataclass

from bridge_stg.runtime.errors import BridgeError
from bridge_stg.runtime.host.parse import is_count

MODES = ("auto", "joint", "two-step")
"""Values of `TextOptions.mode`."""


@dataclass(frozen=True)
class TextOptions:
    """How text heads answer.

    Attributes:
        mode: one of `MODES`; `auto` chooses by the length of the video.
        grammar: whether answers are constrained to the JSON form; otherwise the model writes freely.
        drafts: whether entries are drafted from those before; the answers are equal, with fewer calls of the model.
        max_tokens: maximum tokens of an answer; it is cut there.
    """

    mode: str = "auto"
    grammar: bool = True
    drafts: bool = True
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise BridgeError("options.invalid", f"mode={self.mode!r}: expected one of {', '.join(MODES)}")
        check_max_tokens(self.max_tokens)


def check_max_tokens(value: int) -> None:
    """Raise BridgeError if a maximum length is not a whole number of 1 or more."""
    if not is_count(value):
        raise BridgeError("options.out_of_range", f"max_tokens={value!r}: expected 1 or more")
