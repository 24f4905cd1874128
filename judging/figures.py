"""Numbers as text, and figures as SVG by matplotlib, for the report (their form: judging/report.py)."""
import io
import json
import math
import re
import warnings
from collections.abc import Iterable
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

    Decimals follow the column's largest number: three significant digits, one decimal from 10, none from 1000. A cell
    too small for that keeps two digits of its own, so that 0.14 beside 97.3 is not 0.1. Integers stay as they are.
    """
    parts = [[cell.get(key) for key in ("value", "low", "high")] if is_interval(cell) else [cell] for cell in cells]
    sizes = [max((abs(x) for x in part if isinstance(x, float)), default=0) for part in parts]
    largest, shown = max(sizes, default=0), []
    decimals = 0 if largest >= 1000 else 1 if largest >= 10 or not largest else 2 - math.floor(math.log10(largest))
    for part, size in zip(parts, sizes, strict=True):
        places = 1 - math.floor(math.log10(size)) if 0 < size < 10 ** (1 - decimals) else decimals
        value, *ends = (_number(x, places) for x in part)
        shown.append((value, f"[{', '.join(ends)}]" if ends and None not in part else ""))
    return shown


def _number(cell, places: int) -> str:
    if not is_number(cell):
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

LIGHT = {"paper": "#ffffff", "ink": "#1d2127", "muted": "#626b76", "line": "#e4e7eb", "accent": "#2b62b8"}
DARK = {"paper": "#14171b", "ink": "#e6e9ed", "muted": "#98a2ae", "line": "#2c3239", "accent": "#79aefb"}
# Of at most six series: nobody tells more tints apart.
TINTS = [(LIGHT[color], opacity) for color, opacity in (
    ("accent", 1.0), ("muted", 0.6), ("accent", 0.5), ("muted", 0.3), ("accent", 0.25), ("muted", 0.15))]
NOTHING = '<p class="note">There are no numbers to draw.</p>'
SETTINGS = {
    "svg.fonttype": "none", "svg.hashsalt": "report", "text.parse_math": False, "font.size": 11,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.edgecolor": LIGHT["line"], "grid.color": LIGHT["line"],
    "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False, "axes.axisbelow": True,
    "text.color": LIGHT["ink"], "axes.labelcolor": LIGHT["ink"], "ytick.labelcolor": LIGHT["ink"],
    "xtick.labelcolor": LIGHT["muted"], "xtick.color": LIGHT["line"], "ytick.left": False, "legend.frameon": False,
}


def draw(figure: dict) -> str:
    """The figure as an inline SVG, whose colours are those of the page, light or dark."""
    import matplotlib  # here: it takes a second to import

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a glyph that matplotlib's font lacks is left to the browser's
        drawn = plot(figure)
        if drawn is None:
            return NOTHING
        file = io.StringIO()
        drawn.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", svg[svg.index("<svg"):], flags=re.S)
    svg = re.sub(r' id="[\w.]+_\d+"| xmlns:xlink="[^"]*"| font-family: [^;]*;', "", svg).replace("xlink:href", "href")
    for name, color in LIGHT.items():
        svg = svg.replace(color, f"var(--{name})")
    width, height = (72 * size for size in drawn.get_size_inches())
    name = escape(figure["label"])
    style = f"max-width:{width:.0f}px;min-width:{0.85 * width:.0f}px"
    return re.sub("<svg[^>]*>", lambda _: f'<svg viewBox="0 0 {width:.0f} {height:.0f}" style="{style}" role="img" '
                  f'aria-label="{name}" xmlns="http://www.w3.org/2000/svg">', svg, count=1)


def plot(figure: dict):
    """The figure as a matplotlib one, 720 points wide where it can be; None where there is no number to draw."""
    kinds = {"ratings": _ratings, "matrix": _matrix, "bars": _bars, "radar": _radar}
    if figure["kind"] not in kinds:
        raise ValueError(f"figure kind is {figure['kind']!r}, expected {', '.join(kinds)}")
    return kinds[figure["kind"]](figure)


def _axes(width: float, height: float, **more):
    """A figure of that many points and its axes, which make room for their labels."""
    from matplotlib.figure import Figure

    drawn = Figure((width / 72, height / 72), layout="constrained")
    drawn.get_layout_engine().set(w_pad=0.12)
    return drawn, drawn.subplots(**more)


def _short(name: str) -> str:
    name = " ".join(name.split())
    return name if len(name) <= 40 else f"{name[:39]}…"


def _names(axes, names: list[str]) -> None:
    """Names down the left, the first at the top."""
    axes.set_yticks(range(len(names)), list(map(_short, names)))
    axes.set_ylim(len(names) - 0.5, -0.5)


def _ratings(figure: dict):
    rows = list(zip(*(figure[key] for key in ("names", "values", "low", "high")), strict=True))
    rows.sort(key=lambda row: (row[1] is None, -(row[1] or 0)))
    if all(x is None for _, *row in rows for x in row):
        return None
    drawn, axes = _axes(720, 60 + 28 * len(rows))
    shown = show(value for _, value, _, _ in rows)
    for y, ((_, value, low, high), (text, _)) in enumerate(zip(rows, shown, strict=True)):
        axes.text(1.02, y, text, transform=axes.get_yaxis_transform(), va="center")
        if low is not None and high is not None:
            axes.plot([low, high], [y, y], color=LIGHT["accent"], alpha=0.55, linewidth=2)
        if value is not None:
            axes.plot([value], [y], "o", color=LIGHT["accent"])
    if figure.get("reference") is not None:
        axes.axvline(figure["reference"], color=LIGHT["muted"], linestyle="--", linewidth=1)
    _names(axes, [name for name, *_ in rows])
    axes.grid(axis="x")
    axes.set_xlabel(figure["label"])
    return drawn


def _matrix(figure: dict):
    names, columns, grid = figure["names"], figure["columns"], figure["grid"]
    if len(grid) != len(names) or any(len(row) != len(columns) for row in grid):
        raise ValueError(f"the grid is not {len(names)} rows of {len(columns)}")
    numbers = [x for row in grid for x in row if x is not None]
    if not numbers:
        return None
    low, high = (f(numbers) if figure.get(key) is None else figure[key] for f, key in ((min, "low"), (max, "high")))
    longest = max(map(len, columns))
    slanted = longest * 7 * len(columns) > 400
    height = 60 + 30 * len(names) + 5 * min(longest, 40) * slanted
    drawn, axes = _axes(max(720, 320 + 62 * len(columns)), height)
    shown = iter(show(x for row in grid for x in row))
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if value is not None:
                strength = min(1, max(0, (value - low) / (high - low))) if high > low else 0.5
                # never stronger than 0.52: the ink keeps a contrast of 4.5 on every cell, in both modes
                axes.barh(y, 0.96, 0.94, x - 0.48, color=LIGHT["accent"], alpha=0.04 + 0.48 * strength)
            axes.text(x, y, next(shown)[0], ha="center", va="center",
                      color=LIGHT["ink" if value is not None else "muted"], in_layout=False)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_xticks(range(len(columns)), list(map(_short, columns)), rotation=45 if slanted else 0,
                    ha="left" if slanted else "center", color=LIGHT["ink"])
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    _names(axes, names)
    axes.set_xlabel(figure["label"])
    return drawn


def _bars(figure: dict):
    names, groups = figure["names"], figure["groups"]
    if any(len(values) != len(names) for values in groups.values()) or len(groups) > len(TINTS):
        raise ValueError(f"groups of {[len(values) for values in groups.values()]} values for {len(names)} names")
    if all(x is None for values in groups.values() for x in values):
        return None
    thick = 0.8 / len(groups)
    drawn, axes = _axes(720, 60 + 28 * len(names) if len(groups) == 1 else 80 + 14 * (len(groups) + 1) * len(names))
    shown = iter(show(x for values in groups.values() for x in values))
    for k, ((color, opacity), (series, values)) in enumerate(zip(TINTS, groups.items(), strict=False)):
        places = [y + thick * (k - (len(groups) - 1) / 2) for y in range(len(names))]
        bars = axes.barh(places, [x or 0 for x in values], 0.94 * thick, color=color, alpha=opacity, label=series)
        axes.bar_label(bars, [next(shown)[0] for _ in values], padding=4, color=LIGHT["muted"])
    axes.axvline(0, color=LIGHT["muted"], linewidth=1)
    axes.margins(x=0.12)
    _names(axes, names)
    axes.grid(axis="x")
    axes.set_xlabel(figure["label"])
    if len(groups) > 1:
        drawn.legend(loc="outside upper left", ncols=3)
    return drawn


# Of models laid over each other: shades and dashes, for colours are those of the page.
STROKES = [(LIGHT[color], opacity, dashes) for dashes in ("-", (0, (5, 3)), (0, (1, 2)))
           for color, opacity in (("accent", 1.0), ("muted", 0.9))]


def _radar(figure: dict):
    """A line a model round the columns, from `low` in the middle to `high`; a missing number breaks the line."""
    names, columns, grid = figure["names"], figure["columns"], figure["grid"]
    if len(grid) != len(names) or any(len(row) != len(columns) for row in grid) or len(names) > len(STROKES):
        raise ValueError(f"the grid is not {len(names)} rows of {len(columns)}, or has more than {len(STROKES)} rows")
    if all(x is None for row in grid for x in row):
        return None
    drawn, axes = _axes(720, 460 + 20 * -(-len(names) // 2), subplot_kw={"projection": "polar"})
    drawn.get_layout_engine().set(w_pad=1.3)  # room for the names at the sides, which the layout does not count
    angles = [2 * math.pi * i / len(columns) for i in range(len(columns))]
    for (color, opacity, dashes), name, row in zip(STROKES, names, grid, strict=False):
        values = [math.nan if x is None else x for x in row]
        axes.plot([*angles, angles[0]], [*values, values[0]], color=color, alpha=opacity, linestyle=dashes, linewidth=2,
                  marker="o", markersize=4, label=_short(name))
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    axes.set_xticks(angles, list(map(_short, columns)), color=LIGHT["ink"])
    axes.set_ylim(figure["low"], figure["high"])
    for label, angle in zip(axes.get_xticklabels(), angles, strict=True):
        side = round(math.sin(angle), 6)
        label.set_horizontalalignment("left" if side > 0 else "right" if side < 0 else "center")
    axes.set_rlabel_position(180 / len(columns))
    axes.spines["polar"].set_color(LIGHT["line"])
    axes.set_xlabel(figure["label"])
    drawn.legend(loc="outside upper left", ncols=2)
    return drawn
