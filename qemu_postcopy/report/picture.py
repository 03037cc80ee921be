"""Charts of a report: SVG with axes, and PNG pictures inside of it where there are many points.

Pure; what is drawn has the page's colours of text, so that it can be read on light and dark ground.
"""

from __future__ import annotations

import struct
import zlib
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from html import escape
from itertools import cycle
from math import log

#: Readable on white and on black, and apart for those who see colours differently (after Okabe and
#: Ito, "Color Universal Design", 2008; the blue is lighter).  The last one is for all others.
COLOURS = ("#2f80d0", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#888888")
#: Steps from few to many faults in one point.
LEVELS = 8
FAINTEST = 0.65
#: Room for labels, in the pixels of the drawing.
LEFT, RIGHT, TOP, BOTTOM = 76, 12, 8, 34


def level_of(count: int, most: int) -> int:
    """0 to LEVELS - 1, by the logarithm: one stall must not make everything else invisible."""
    return round((LEVELS - 1) * log(count) / log(most)) if count > 1 and most > 1 else 0


def png(width: int, height: int, points: Mapping[int, tuple[int, int]]) -> bytes:
    """A picture with ``points`` (at y * width + x, from the top) of a colour's and level's number;
    all else is transparent.  See the PNG specification (W3C), sections 5 and 11."""
    rows = [bytearray(width + 1) for _ in range(height)]  # each begins with its filter: none
    for place, (colour, level) in points.items():
        rows[place // width][place % width + 1] = 1 + colour * LEVELS + level
    palette, opacity = bytearray(3), bytearray(1)
    for hexadecimal in COLOURS:
        for level in range(LEVELS):
            palette += bytes.fromhex(hexadecimal[1:])
            opacity.append(round(255 * (FAINTEST + (1 - FAINTEST) * level / (LEVELS - 1))))
    header = struct.pack(">IIBBBBB", width, height, 8, 3, 0, 0, 0)
    chunks = (
        (b"IHDR", header),
        (b"PLTE", bytes(palette)),
        (b"tRNS", bytes(opacity)),
        (b"IDAT", zlib.compress(b"".join(rows), 9)),
        (b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def picture(width: int, height: int, points: Mapping[int, tuple[int, int]]) -> str:
    """The same as a part of a drawing."""
    data = b64encode(png(width, height, points)).decode()
    return (
        f'<image x="{LEFT}" y="{TOP}" width="{width}" height="{height}" '
        f'style="image-rendering:pixelated" href="data:image/png;base64,{data}"/>'
    )


def ticks(highest: float, about: int, *, binary: bool = False) -> list[float]:
    """Round values from 0 to ``highest``, at most so many and at least a third of that; ``binary``:
    round as powers of two are."""
    if highest <= 0:
        return [0.0]
    step = 1.0
    steps = cycle((2.0,) if binary else (2.0, 2.5, 2.0))  # 1, 2, 5, 10 ...
    while step * about < highest:
        step *= next(steps)
    return [step * index for index in range(int(highest / step) + 1)]


def chart(
    content: str,
    width: int,
    height: int,
    across: Sequence[tuple[float, str]],
    up: Sequence[tuple[float, str]],
    label: str,
    across_label: str,
) -> str:
    """A drawing with its axes: ``across`` and ``up`` are the marks, each at a share (0 to 1)."""
    parts = [
        f'<svg role="img" aria-label="{escape(label)}" viewBox="0 0 {width + LEFT + RIGHT} '
        f'{height + TOP + BOTTOM}">'
        f'<rect class="ground" x="{LEFT}" y="{TOP}" width="{width}" height="{height}"/>'
    ]
    for share, text in up:
        y = TOP + height * (1 - share)
        parts.append(
            f'<path class="grid" d="M{LEFT} {y:.1f}h{width}"/>'
            f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{escape(text)}</text>'
        )
    for share, text in across:
        x = LEFT + width * share
        parts.append(
            f'<path class="grid" d="M{x:.1f} {TOP}v{height}"/>'
            f'<text x="{x:.1f}" y="{TOP + height + 15}" text-anchor="middle">{escape(text)}</text>'
        )
    parts.append(content)
    parts.append(
        f'<text x="{LEFT + width / 2}" y="{TOP + height + 31}" text-anchor="middle">'
        f"{escape(across_label)}</text></svg>"
    )
    return "".join(parts)


def line(values: Sequence[float], width: int, height: int, highest: float) -> str:
    """A line through the values, from the left to the right."""
    steps = len(values)
    points = " ".join(
        f"{LEFT + (index + 1) * width / steps:.1f},{TOP + height * (1 - value / highest):.1f}"
        for index, value in enumerate(values)
        # In a stretch that is level its two ends are enough.
        if index in (0, steps - 1) or value != values[index - 1] or value != values[index + 1]
    )
    return f'<polyline class="line" points="{LEFT},{TOP + height} {points}"/>'


def bars(
    rows: Sequence[tuple[str, Sequence[int]]], width: int, describe: Callable[[int], str]
) -> str:
    """A bar for each row, of one part for each colour; the row's sum at its end."""
    most = max(sum(parts) for _, parts in rows)
    out = [
        f'<svg role="img" aria-label="latencies" viewBox="0 0 {width + LEFT + RIGHT} '
        f'{20 * len(rows) + 6}">'
    ]
    for place, (label, parts) in enumerate(rows):
        y, x = 20 * place + 3, float(LEFT + 34)
        room = width - 34 - 120
        out.append(f'<text x="{LEFT + 28}" y="{y + 12}" text-anchor="end">{escape(label)}</text>')
        for colour, count in enumerate(parts):
            length = room * count / most
            if length >= 0.05:
                out.append(
                    f'<rect x="{x:.1f}" y="{y}" width="{length:.1f}" height="14" '
                    f'fill="{COLOURS[colour]}"/>'
                )
            x += length
        out.append(f'<text x="{x + 5:.1f}" y="{y + 12}">{escape(describe(sum(parts)))}</text>')
    return "".join(out) + "</svg>"
