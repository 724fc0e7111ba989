"""Draw the generator's sprite sheet from Noto Color Emoji (Debian package fonts-noto-color-emoji, OFL 1.1).

Usage: python assets/demo/make_sprites.py NotoColorEmoji.ttf bridge_stg/sprites.png
"""

from __future__ import annotations

import sys

from PIL import Image, ImageDraw, ImageFont

EMOJI = {
    "car": "🚗", "bus": "🚌", "dog": "🐕", "cat": "🐈", "ball": "⚽",
    "airplane": "✈", "bicycle": "🚲", "tree": "🌳", "bird": "🐦", "boat": "⛵",
}  # fmt: skip
CELL = 128


def main(font_path: str, out: str) -> None:
    """Draw each emoji at the font's bitmap size, crop it and centre it in a CELL × CELL square."""
    font = ImageFont.truetype(font_path, 109)
    sheet = Image.new("RGBA", (CELL * len(EMOJI), CELL))
    for column, character in enumerate(EMOJI.values()):
        canvas = Image.new("RGBA", (160, 160))
        ImageDraw.Draw(canvas).text((12, 12), character, font=font, embedded_color=True)
        sprite = canvas.crop(canvas.getbbox())
        sprite.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        sheet.paste(sprite, (column * CELL + (CELL - sprite.width) // 2, (CELL - sprite.height) // 2))
    sheet.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:3])
