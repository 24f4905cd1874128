"""Numbers as text, and figures as SVG, for the report (their form: judging/report.py)."""
from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable
from html import escape

# ----------------------------------------------------------------------------------------- numbers

def is_number(cell) -> bool:
    return isinstance(cell, int | float) and not isinstance(cell, bool)


def is_interval(cell) -> bool:
    return isinstance(cell, dict) and "value" in cell


def is_numeric(cells: list) -> bool:
    """A column of numbers, perhaps with gaps: set flush right."""
    found = [cell for cell in cells if cell is not None]
    return bool(found) and all(is_number(cell) or is_interval(cell) for cell in found)


def plain(value) -> str:
    """A setting or a row's name as it was written."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def show(cells: Iterable) -> list[tuple[str, str]]:
    """A column's cells as text and interval: ("71.2", "[68.0, 74.1]"), ("some text", ""), ("-", "").

    Decimals follow the column's largest number: three significant digits, one decimal from 10, none from 1000. A cell too
    small for that keeps two digits of its own, so that 0.14 beside 97.3 is not 0.1. Integers stay as they are.
    """
    parts = [[cell.get(key) for key in ("value", "low", "high")] if is_interval(cell) else [cell] for cell in cells]
    sizes = [max((abs(x) for x in part if isinstance(x, float)), default=0) for part in parts]
    decimals, shown = _decimals(max(sizes, default=0)), []
    for part, size in zip(parts, sizes, strict=True):
        places = 1 - math.floor(math.log10(size)) if 0 < size < 10 ** (1 - decimals) else decimals
        value, *ends = (_number(x, places) for x in part)
        shown.append((value, f"[{', '.join(ends)}]" if ends and None not in part else ""))
    return shown


def _decimals(largest: float) -> int:
    if largest >= 10 or largest == 0:
        return 0 if largest >= 1000 else 1
    return 2 - math.floor(math.log10(largest))


def _number(cell, places: int) -> str:
    if cell is None or not is_number(cell):
        return "-" if cell is None else plain(cell)
    if places > 6 and cell and isinstance(cell, float):
        return f"{cell:.1e}"
    digits = f"{cell:,.{places}f}" if isinstance(cell, float) else f"{cell:,}"
    return digits if abs(cell) >= 10_000 else digits.replace(",", "")  # 1140 is a rating, 12,345 a count


def align(values: list[str], digit: str = " ", point: str = " ") -> list[str]:
    """Numbers padded on the right so that, set flush right, their decimal points stand below each other."""
    tails = [len(value) - value.index(".") if "." in value else 0 for value in values]
    longest = max(tails, default=0)
    return [value + (digit * (longest - tail) if tail or not longest else point + digit * (longest - 1))
            for value, tail in zip(values, tails, strict=True)]


# ----------------------------------------------------------------------------------------- figures

BOX = 720  # width of a figure, px; a matrix may be wider
LIGHT = {"paper": "#ffffff", "ink": "#1d2127", "muted": "#626b76", "line": "#e4e7eb", "accent": "#2b62b8"}
DARK = {"paper": "#14171b", "ink": "#e6e9ed", "muted": "#98a2ae", "line": "#2c3239", "accent": "#79aefb"}
# More than six series and no reader tells their tints apart: they become a matrix.
TINTS = [f"fill:color-mix(in srgb,var(--{color}) {percent}%,var(--paper))" for color, percent in (
    ("accent", 100), ("muted", 60), ("accent", 50), ("muted", 30), ("accent", 25), ("muted", 15))]
NOTHING = '<p class="note">There are no numbers to draw.</p>'


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most `most` round numbers, 1, 2 or 5 times a power of ten apart, the first <= low and the last >= high."""
    if high - low <= 1e-9 * max(abs(low), abs(high)):
        low, high = (low - abs(low) / 10, high + abs(high) / 10) if low else (0.0, 1.0)
    power = math.floor(math.log10((high - low) / most))
    for step, exponent in ((s, e) for e in range(power, power + 3) for s in (1, 2, 5)):
        unit = step * 10.0 ** exponent
        # the slack forgives 0.3 / 0.1 = 2.9999999999999996
        first, last = math.floor(low / unit + 1e-9), math.ceil(high / unit - 1e-9)
        if last - first < most:
            return [round(k * unit, max(0, -exponent)) for k in range(first, last + 1)]
    raise ValueError(f"no ticks between {low} and {high}")


def text_width(words: str) -> float:
    """Of a 12 px label in px, on the generous side: fonts differ, and an SVG cannot ask."""
    return sum(12.0 if c > "\u2e7f" or c in "mwMW@%…" else 4.6 if c in " .,:;|!'()[]ijl" else 8.4 if c.isupper() else 7.5 for c in words)


def _label(x: float, y: float, words: str, anchor: str = "start", room: float = math.inf, style: str = "") -> str:
    """A text element; where it is cut, the whole stands in its tooltip."""
    short = words = " ".join(words.split())
    while text_width(short) > room and len(short) > 1:
        short = short.rstrip("…")[:-1] + "…"
    tip = f"<title>{escape(words)}</title>" if short != words else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{style}">{tip}{escape(short)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" class="{style}"/>'


def _svg(width: float, height: float, parts: list[str], name: str) -> str:
    return (f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="max-width:{width:.0f}px;min-width:{0.85 * width:.0f}px" role="img" '
            f'aria-label="{escape(name)}">{"".join(parts)}</svg>')


def _scale(marks: list[float], start: float, end: float) -> Callable[[float], float]:
    return lambda value: start + (value - marks[0]) / (marks[-1] - marks[0]) * (end - start)


def _tick_labels(marks: list[float]) -> list[str]:
    places = max(0, -math.floor(math.log10(marks[1] - marks[0]) + 1e-9))
    return [_number(float(mark), places) for mark in marks]


def _x_axis(marks: list[float], place: Callable, top: float, bottom: float, name: str) -> list[str]:
    left, right = place(marks[0]), place(marks[-1])
    parts = [_label((left + right) / 2, bottom + 40, name, "middle", right - left)]
    for mark, number in zip(marks, _tick_labels(marks), strict=True):
        parts += [_line(place(mark), top, place(mark), bottom, "grid"), _label(place(mark), bottom + 18, number, "middle", style="soft")]
    return parts


def _ratings(figure: dict) -> str:
    rows = list(zip(*(figure[key] for key in ("names", "values", "low", "high")), strict=True))
    rows.sort(key=lambda row: (row[1] is None, -(row[1] or 0)))
    reference = figure.get("reference")
    numbers = [x for _, *row in rows for x in row if x is not None]
    if not numbers:
        return NOTHING
    marks = ticks(*(f(numbers if reference is None else [*numbers, reference]) for f in (min, max)))
    shown = [value for value, _ in show(value for _, value, _, _ in rows)]
    left = min(220, max(text_width(name) for name, *_ in rows)) + 16
    right, top = BOX - 28 - max(map(text_width, shown)), 22 if reference is not None else 8
    place, bottom = _scale(marks, left + 8, right - 8), top + 28 * len(rows)
    parts = _x_axis(marks, place, top, bottom, figure["label"])
    if reference is not None:
        parts += [_line(place(reference), top - 4, place(reference), bottom, "reference"),
                  _label(place(reference), top - 9, f"{reference:g}", "middle", style="soft")]
    for i, ((name, value, low, high), number) in enumerate(zip(rows, shown, strict=True)):
        y = top + 28 * i + 14
        parts.append(_label(left - 12, y + 4, name, "end", left - 16))
        if low is not None and high is not None:
            parts.append(_line(place(low), y, place(high), y, "whisker"))
        if value is not None:
            parts.append(f'<circle cx="{place(value):.1f}" cy="{y:.1f}" r="4.5" class="dot"/>')
        parts.append(_label(BOX - 8, y + 4, number, "end"))
    return _svg(BOX, bottom + 52, parts, figure["label"])


def _matrix(figure: dict) -> str:
    names, columns, grid = figure["names"], figure["columns"], figure["grid"]
    if len(grid) != len(names) or any(len(row) != len(columns) for row in grid):
        raise ValueError(f"the grid is not {len(names)} rows of {len(columns)}")
    numbers = [x for row in grid for x in row if x is not None]
    if not numbers:
        return NOTHING
    low, high = (f(numbers) if figure.get(key) is None else figure[key] for f, key in ((min, "low"), (max, "high")))
    shown = [value for value, _ in show(x for row in grid for x in row)]
    left = min(200, max(map(text_width, names))) + 16
    wide = max(max(map(text_width, shown)) + 12, min(84, (BOX - left) / len(columns)))
    widest = min(150, max(map(text_width, columns)))
    slanted = widest > wide - 8
    top = 0.71 * widest + 24 if slanted else 28
    width = left + wide * len(columns) + (0.71 * widest + 4 if slanted else 8)
    parts = []
    for j, name in enumerate(columns):
        x = left + wide * (j + 0.5)
        heading = _label(x, top - 10, name, "start" if slanted else "middle", widest)
        parts.append(f'<g transform="rotate(-45 {x:.1f} {top - 10:.1f})">{heading}</g>' if slanted else heading)
    for i, name in enumerate(names):
        parts.append(_label(left - 12, top + 30 * i + 19, name, "end", left - 16))
        for j, value in enumerate(grid[i]):
            x, y = left + wide * j, top + 30 * i
            if value is not None:
                strength = min(1, max(0, (value - low) / (high - low))) if high > low else 0.5
                # never stronger than 0.52: the ink keeps a contrast of 4.5 on every cell, in both modes
                parts.append(f'<rect x="{x + 1:.1f}" y="{y + 1:.1f}" width="{wide - 2:.1f}" height="28" rx="2" class="accent" '
                             f'fill-opacity="{0.04 + 0.48 * strength:.2f}"/>')
            number = shown[i * len(columns) + j]
            parts.append(_label(x + wide / 2, y + 19, number, "middle", style="soft" if value is None else ""))
    width, bottom = max(width, min(BOX, text_width(figure["label"]) + 16)), top + 30 * len(names)
    parts.append(_label(8, bottom + 24, figure["label"], room=width - 16))
    return _svg(width, bottom + 36, parts, figure["label"])


def _points(figure: dict) -> str:
    names = figure.get("names") or [""] * len(figure["x"])
    points = [p for p in zip(figure["x"], figure["y"], names, strict=True) if p[0] is not None and p[1] is not None]
    if not points:
        return NOTHING
    xs, ys = ([p[k] for p in points] for k in (0, 1))
    x_marks, y_marks = ticks(min(xs), max(xs), 8), ticks(min(ys), max(ys))
    left, right, top, bottom = max(map(text_width, _tick_labels(y_marks))) + 16, BOX - 24, 34, 354
    across, up = _scale(x_marks, left, right), _scale(y_marks, bottom, top)
    missing = len(figure["x"]) - len(points)
    parts = [_label(8, 16, figure["y_label"], room=BOX - 16),
             *_x_axis(x_marks, across, top, bottom, figure["x_label"] + (f" ({missing} without a number)" if missing else ""))]
    for mark, name in zip(y_marks, _tick_labels(y_marks), strict=True):
        parts += [_line(left, up(mark), right, up(mark), "grid"), _label(left - 8, up(mark) + 4, name, "end", style="soft")]
    if figure.get("line"):
        slope, intercept = figure["line"]
        ends = sorted((y - intercept) / slope for y in (y_marks[0], y_marks[-1])) if slope else [min(xs), max(xs)]
        first, last = max(min(xs), ends[0]), min(max(xs), ends[1])
        if first < last and (slope or y_marks[0] <= intercept <= y_marks[-1]):
            parts.append(_line(across(first), up(slope * first + intercept), across(last), up(slope * last + intercept), "fit"))
    radius = 4.5 if len(points) <= 60 else 3
    taken = [(across(x) - radius, up(y) - radius, across(x) + radius, up(y) + radius) for x, y, _ in points]
    for x, y, name in points:
        tip = f"{name}: " if name else ""
        parts.append(f'<circle cx="{across(x):.1f}" cy="{up(y):.1f}" r="{radius:g}" class="dot" fill-opacity="0.75">'
                     f"<title>{escape(f'{tip}{x:g}, {y:g}')}</title></circle>")
        width = text_width(name)
        spots = [(8, 4, "start", 0), (-8, 4, "end", width), (0, -9, "middle", width / 2), (0, 17, "middle", width / 2)]
        for dx, dy, anchor, before in spots if name and len(points) <= 60 else []:
            x1, y2 = across(x) + dx - before, up(y) + dy + 3
            box = (x1, y2 - 13, x1 + width, y2)
            free = all(box[0] > b[2] or b[0] > box[2] or box[1] > b[3] or b[1] > box[3] for b in taken)
            if free and left <= x1 and x1 + width <= right and top - 10 <= box[1] and y2 <= bottom:
                taken.append(box)
                parts.append(_label(across(x) + dx, up(y) + dy, name, anchor, style="halo"))
                break
    return _svg(BOX, bottom + 52, parts, f"{figure['y_label']} against {figure['x_label']}")


def _bars(figure: dict) -> str:
    names, groups = figure["names"], figure["groups"]
    if any(len(values) != len(names) for values in groups.values()):
        raise ValueError(f"groups of {[len(values) for values in groups.values()]} values for {len(names)} names")
    numbers = [x for values in groups.values() for x in values if x is not None]
    if not numbers:
        return NOTHING
    if len(groups) > len(TINTS):
        grid = [list(row) for row in zip(*groups.values(), strict=True)]
        return _matrix({"names": names, "columns": list(groups), "grid": grid, "label": figure["label"]})
    marks = ticks(min(0, *numbers), max(0, *numbers))
    shown = [value for value, _ in show(x for values in groups.values() for x in values)]
    room = max(map(text_width, shown)) + 8
    edge = min(220, max(map(text_width, names))) + 4
    left, right, top = edge + 12 + (room if min(numbers) < 0 else 0), BOX - room - 4, 8
    parts, at = [], 8.0
    for tint, series in zip(TINTS, groups, strict=False) if len(groups) > 1 else []:
        if at + 18 + text_width(series) > BOX and at > 8:
            at, top = 8.0, top + 20
        parts += [f'<rect x="{at:.1f}" y="{top}" width="11" height="11" rx="2" style="{tint}"/>',
                  _label(at + 17, top + 10, series, room=BOX - at - 24)]
        at += 40 + text_width(series)
    top += 26 if len(groups) > 1 else 0
    thick, block = (16, 28) if len(groups) == 1 else (13, 13 * len(groups) + 16)
    bottom, place = top + block * len(names), _scale(marks, left, right)
    parts += _x_axis(marks, place, top, bottom, figure["label"])
    for i, name in enumerate(names):
        middle = top + block * (i + 0.5)
        parts.append(_label(edge, middle + 4, name, "end", edge - 4))
        for k, (tint, (series, values)) in enumerate(zip(TINTS, groups.items(), strict=False)):
            value, y = values[i], middle - thick * len(groups) / 2 + thick * k
            start, end = sorted((place(0), place(value or 0)))
            parts.append(f'<rect x="{start:.1f}" y="{y + 0.5:.1f}" width="{end - start:.1f}" height="{thick - 1}" style="{tint}">'
                         f'<title>{escape(f"{name}, {series}: {shown[k * len(names) + i]}")}</title></rect>')
            side = (start - 5, "end") if (value or 0) < 0 else (end + 5, "start")
            parts.append(_label(side[0], y + thick / 2 + 4, shown[k * len(names) + i], side[1], style="soft"))
    return _svg(BOX, bottom + 52, [*parts, _line(place(0), top, place(0), bottom, "zero")], figure["label"])


def draw(figure: dict) -> str:
    """The figure as an inline SVG."""
    match figure["kind"]:
        case "ratings":
            return _ratings(figure)
        case "matrix":
            return _matrix(figure)
        case "points":
            return _points(figure)
        case "bars":
            return _bars(figure)
    raise ValueError(f"figure kind is {figure['kind']!r}, expected ratings, matrix, points or bars")
