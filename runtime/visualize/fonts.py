"""Fonts that have the letters of a query: Pillow's own one, else one that is installed."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PREFERRED = (
    "DejaVuSans", "NotoSans-Regular", "arial", "Arial Unicode", "NotoSansCJK-Regular", "wqy-microhei",
    "DroidSansFallbackFull", "msyh", "malgun",
)  # fmt: skip
"""Names, without suffix, of sans-serif fonts of Linux, Windows and macOS, which are tried first."""
STYLED = ("bold", "italic", "oblique", "light", "mono", "serif", "condensed", "math", "symbol", "emoji")
PLACEHOLDERS = ("lastresort", "blank", "notdef", "fallback-placeholder")
"""Fonts that draw a placeholder for every character."""
SUFFIXES = (".ttf", ".ttc", ".otf", ".otc")
NO_LETTER = "\uffff"  # a character that no font has


@functools.lru_cache
def font(size: int) -> Font:
    """Return Pillow's own font, which is the same on every system, in `size` pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def font_for(text: str, size: int) -> Font:
    """Return Pillow's own font if it has the text's letters, else the installed font that has most of them."""
    file = font_file(_letters(text))
    return font(size) if file is None else installed_font(file, size)


def missing_letters(text: str) -> str:
    """Return the characters of a text, each once, that `font_for` lacks: no font on this system has all others too."""
    return "".join(sorted(_missing(_letters(text), font_for(text, 20))))


def drawable(text: str, name: str) -> str:
    """Return a text in the letters of its font.

    A few missing ones become question marks; if half of the text or more is missing, `name` is returned.
    """
    missing = missing_letters(text)
    if 2 * sum(character in missing for character in text) >= len("".join(text.split())) and missing:
        return name
    return "".join("?" if character in missing else character for character in text)


def _letters(text: str) -> frozenset[str]:
    return frozenset("".join(text.split()))


@functools.lru_cache(256)
def font_file(letters: frozenset[str]) -> str | None:
    """Return the first font file that has all of the letters, or most; None for Pillow's own font."""
    best, least = None, len(_missing(letters, font(20)))
    for file in font_files() if least else ():
        with contextlib.suppress(OSError):  # a damaged font, or one of bitmaps in other sizes
            missing = len(_missing(letters, installed_font(file, 20)))
            if missing < least:
                best, least = file, missing
        if not least:
            break
    return best


@functools.lru_cache(64)
def installed_font(file: str, size: int) -> Font:
    """Load a font file. Raises OSError if it cannot be read, or has bitmaps in other sizes only."""
    from PIL import ImageFont

    return ImageFont.truetype(file, size)


def _missing(letters: frozenset[str], text_font: Font) -> set[str]:
    """Return the characters that a font lacks, and draws as a placeholder box."""

    def drawn(character: str) -> tuple[tuple[int, int], bytes]:
        mask = text_font.getmask(character)
        return mask.size, bytes(mask)

    ascii_free = {character for character in letters if not character.isascii()}
    placeholder = drawn(NO_LETTER) if ascii_free else None
    return {character for character in ascii_free if drawn(character) == placeholder}


@functools.lru_cache(1)
def font_files() -> tuple[str, ...]:
    """Return the installed font files: the preferred ones, then regular styles, then all others."""
    files = {path for folder in _font_folders() for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES}

    def rank(path: Path) -> tuple[int, bool, str]:
        name = path.stem.lower()
        preferred = [place for place, wanted in enumerate(PREFERRED) if name == wanted.lower()]
        return (*preferred, len(PREFERRED))[0], any(style in name for style in STYLED), str(path)

    kept = (path for path in files if not any(word in path.stem.lower() for word in PLACEHOLDERS))
    return tuple(str(path) for path in sorted(kept, key=rank))


def _font_folders() -> list[Path]:
    home = Path(os.path.expanduser("~"))
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA", str(home))
        return [Path(os.environ.get("WINDIR", r"C:\Windows")) / "Fonts", Path(local) / "Microsoft/Windows/Fonts"]
    if sys.platform == "darwin":
        return [home / "Library/Fonts", Path("/Library/Fonts"), Path("/System/Library/Fonts")]
    shared = os.environ.get("XDG_DATA_DIRS") or "/usr/local/share:/usr/share"
    own = os.environ.get("XDG_DATA_HOME") or str(home / ".local/share")
    return [Path(folder) / "fonts" for folder in (own, *shared.split(":"))] + [home / ".fonts"]
