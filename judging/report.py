"""A report for people: tables in the terminal, one self-contained page with figures, and two runs side by side.

    report    {"title", "about": {setting: value}, "sections": [...]}
    section   {"title", "text" if any, "columns": [...], "rows": [[cell, ...], ...], "figure" if any}
    cell      text, a number, None, or {"value", "low", "high"}, a number with its 95 % interval
    figure    {"kind": "ratings", "names", "values", "low", "high", "label", "reference" if any}   dots with whiskers
              {"kind": "matrix", "names", "columns", "grid", "label", "low", "high"}               tinted cells
              {"kind": "bars", "names", "groups": {series: values}, "label"}
              {"kind": "radar", "names", "columns", "grid", "label", "low", "high"}                a line around

Numbers are in the unit that the column's name states. What is not a finite number is None, printed as "-".
"""
import json
import math
import re
import textwrap
from collections.abc import Iterable
from itertools import chain, count, zip_longest
from pathlib import Path

import jinja2

from judging.entries import read_lines
from judging.figures import DARK, LIGHT, align, draw, is_number, is_numeric, plain, show
from judging.ratings import paired_difference
from judging.tables import MOST_UNPARSED, bounded, dots
from runtime import fail, write_text

WIDTH = 120  # of the terminal


def clean(value):
    """The same as plain JSON: NaN and infinities are None, arrays lists, control characters replaced."""
    if hasattr(value, "tolist"):  # numpy and torch
        value = value.tolist()
    if isinstance(value, dict):
        return {clean(str(k)): clean(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [clean(v) for v in value]
    if isinstance(value, str):
        return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]", "\ufffd", value.replace("\r\n", "\n"))
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -------------------------------------------------------------------------------------- in the terminal

def text(report: dict) -> str:
    """The report without its figures, in lines of at most 120 characters."""
    report = clean(report)
    lines = [*_wrap(report["title"]), "=" * min(len(report["title"]), WIDTH)]
    for key, value in report["about"].items():
        lines += _wrap(f"{key}: {plain(value)}", indent="    ")
    for section in report["sections"]:
        lines += ["", "", *_wrap(section["title"]), "-" * min(len(section["title"]), WIDTH)]
        lines += _wrap(section["text"]) if section.get("text") else []
        if section["columns"]:
            lines += ["", *_table(section["columns"], section["rows"])]
        elif section.get("figure"):
            lines += ["", "A figure: see report.html."]
    return "\n".join(lines) + "\n"


def _wrap(paragraphs: str, width: int = WIDTH, indent: str = "") -> list[str]:
    return [line for p in paragraphs.split("\n") for line in textwrap.wrap(p, width, subsequent_indent=indent) or [""]]


def _table(columns: list[str], rows: list[list]) -> list[str]:
    """Aligned columns. What is too wide wraps, headers of numbers first; then the table is cut into two."""
    numeric, cells, least, widths = [], [], [], []
    for name, column in zip(columns, _columns(columns, rows), strict=True):
        numeric.append(is_numeric(column))
        values, intervals = ([part[k] for part in show(column)] for k in (0, 1))
        if numeric[-1]:
            values = align(values)
            outer, inner = max(map(len, values)), max(map(len, intervals))
            values = [f"{v:>{outer}} {i:<{inner}}" if inner else f"{v:>{outer}}"
                      for v, i in zip(values, intervals, strict=True)]
        cells.append(values)
        widths.append(max(map(len, [name, *(line for value in values for line in value.split("\n"))])))
        least.append(max(map(len, [*name.split(), *values])) if numeric[-1] else min(widths[-1], 16))
    gaps = 2 * len(columns) - 2
    while sum(widths) + gaps > WIDTH and widths != least:
        widths[max((i for i, w in enumerate(widths) if w > least[i]), key=lambda i: (numeric[i], widths[i]))] -= 1
    if sum(widths) + gaps > WIDTH and len(columns) > 2:
        fit = max(2, sum(sum(least[:k]) + 2 * k - 2 <= WIDTH for k in range(1, len(columns))))
        rest = [0, *range(fit, len(columns))]
        return [*_table(columns[:fit], [row[:fit] for row in rows]), "",
                *_table([columns[i] for i in rest], [[row[i] for i in rest] for row in rows])]

    def lay(row: list[list[str]]) -> list[str]:
        """A row of cells, each lines of text, as lines across the table."""
        form = "  ".join(f"{{:{'>' if number else '<'}{width}}}" for number, width in zip(numeric, widths, strict=True))
        return [form.format(*line).rstrip() for line in zip_longest(*row, fillvalue="")]

    def wrap(values: tuple[str, ...]) -> list[list[str]]:
        return [[v] if number else _wrap(v, width) for v, number, width in zip(values, numeric, widths, strict=True)]

    header = [_wrap(name, width) for name, width in zip(columns, widths, strict=True)]
    deepest = max(map(len, header))
    body = [lay(wrap(values)) for values in zip(*cells, strict=True)]
    tall = any(len(lines) > 1 for lines in body)  # then an empty line keeps rows apart
    lines = [line for lines in body for line in (*lines, *[""] * tall)]
    return [*lay([[""] * (deepest - len(lines)) + lines for lines in header]),
            "  ".join("-" * width for width in widths), *(lines[:-1] if tall else lines)]


def _columns(columns: list[str], rows: list[list]) -> list[list]:
    if wrong := [row for row in rows if len(row) != len(columns)]:
        raise ValueError(f"a row has {len(wrong[0])} cells, expected {len(columns)}: {wrong[0]}")
    return [[row[i] for row in rows] for i in range(len(columns))]


# ---------------------------------------------------------------------------------------- the page

def page(report: dict) -> str:
    """One HTML page that asks for nothing: no script, no font, no picture from elsewhere."""
    report = clean(report)
    sections = list(report["sections"])
    if report.get("dialogues", {}).get("rows"):
        sections.append({"title": "Dialogues side by side", **report["dialogues"]})
    if rows := [[key, plain(value)] for key, value in report["about"].items()]:
        sections.append({"title": "Settings", "columns": ["setting", "value"], "rows": rows})
    shown = []
    for section in sections:
        figure, columns = section.get("figure") or {}, _columns(section["columns"], section["rows"])
        table = [] if figure.get("kind") == "matrix" else map(_shown, section["columns"], columns)  # all is in it
        shown.append({"title": section["title"], "text": section.get("text"), "figure": figure and draw(figure),
                      "columns": list(table), "count": len(section["rows"])})
    light, dark = ("".join(f"--{name}:{color};" for name, color in palette.items()) for palette in (LIGHT, DARK))
    template = jinja2.Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"), autoescape=True)
    return template.render(title=report["title"], light=light, dark=dark, sections=shown)


def _shown(name: str, column: list) -> tuple[str, bool, bool, list[tuple[str, str]]]:
    """A column's name, whether it is of numbers, whether these have intervals, and its cells as text and interval."""
    cells, numeric = show(column), is_numeric(column)
    values = [value for value, _ in cells]
    values = align(values, "\u2007", "\u2008") if numeric else values  # spaces as wide as a digit and a point
    intervals = [interval for _, interval in cells]
    return name, numeric, any(intervals), list(zip(values, intervals, strict=True))


def write(report: dict, folder: str | Path) -> None:
    """report.json, from which the rest can be made again, and report.html."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    report = clean(report)
    write_text(folder / "report.json", json.dumps(report, ensure_ascii=False, allow_nan=False, indent=1) + "\n")
    write_text(folder / "report.html", page(report))


# ------------------------------------------------------------------------------------ two runs

def compare(folders: list[str | Path]) -> dict:
    """A report on two runs' reports: sections matched by title, rows by their first cell, columns by name.

    Settings that differ come first, then preferences paired by prompt, then a table for each column that differs. A
    difference is the second run's number minus the first's. What only one of them has is listed.
    """
    if len(folders) != 2:
        fail(f"--compare: names {len(folders)} folders, expected two, e.g. --compare runs/a runs/b")
    runs, reports = _run_names(folders), [read(folder) for folder in folders]
    written = [{key: plain(value) for key, value in report["about"].items()} for report in reports]
    differ = [[key, written[0].get(key), written[1].get(key)] for key in dict.fromkeys([*written[0], *written[1]])
              if written[0].get(key) != written[1].get(key)]
    sections = [{"title": "Settings that differ", "columns": ["setting", *runs], "rows": differ} if differ else
                note("Settings that differ", "None.")]
    found = [dict(zip(_unique(section["title"] for section in report["sections"]), report["sections"], strict=True))
             for report in reports]
    alone = [[title, run, len(mine[title]["rows"])] for run, mine, other in zip(runs, found, found[::-1], strict=True)
             for title in mine if title not in other]
    if alone:
        sections.append({"title": "Sections of one run only", "columns": ["section", "run", "rows"], "rows": alone})
    sections += _compare_preferences([Path(folder) / "judgments.jsonl" for folder in folders], runs)
    for title, section in found[0].items():
        sections += _compare_section(title, section, found[1][title], runs) if title in found[1] else []
    return clean({"title": f"{runs[1]} against {runs[0]}", "about": dict(zip(runs, map(str, folders), strict=True)),
                  "sections": sections})


def note(title: str, said: str) -> dict:
    """A section without a table."""
    return {"title": title, "text": said, "columns": [], "rows": []}


def read(folder: str | Path) -> dict:
    """The report of a run's folder, or one line that says what is wrong with it."""
    path = Path(folder) / "report.json"
    try:
        report = clean(json.loads(path.read_text()))
        page(report), text(report)  # whatever it cannot print is not a report
        for section in report["sections"]:
            _columns(section["columns"], section["rows"])
        dict.items(report["about"])
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror}), expected the folder of a finished run: check the path")
    except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as error:
        fail(f"{path}: is not a report ({type(error).__name__}: {' '.join(str(error).split())[:80]}): run the "
             "evaluation again")
    return report


def _run_names(folders: list[str | Path]) -> list[str]:
    """The last part in which two paths differ: runs/a/judge and runs/b/judge are a and b."""
    parts = [Path(folder).resolve().parts[::-1] for folder in folders]
    if parts[0] == parts[1]:
        fail(f"--compare: {folders[0]} and {folders[1]} are the same folder, expected two runs")
    return next([x, y] for x, y in zip(*parts, strict=False) if x != y)


def _unique(names: Iterable[str]) -> list[str]:
    """A name that occurs again is told apart by a number, so that nothing is lost in a dictionary."""
    result: dict[str, None] = {}
    for name in names:
        numbered = chain([name], (f"{name} ({k})" for k in count(2)))
        result[next(label for label in numbered if label not in result)] = None
    return list(result)


def _compare_section(title: str, first: dict, second: dict, runs: list[str]) -> list[dict]:
    """A table for each column that differs: the two runs and, for numbers, the difference."""
    names = [_unique(section["columns"])[1:] for section in (first, second)]
    tables = [{key: dict(zip(own, row[1:], strict=True)) for key, row in zip(
        _unique(plain(row[0]) for row in section["rows"]), section["rows"], strict=True)}
        for own, section in zip(names, (first, second), strict=True)]
    rows = list(dict.fromkeys([*tables[0], *tables[1]]))
    same, sections = [], []
    for name in (name for name in names[0] if name in names[1]):
        pair = [[table.get(row, {}).get(name) for row in rows] for table in tables]
        if pair[0] == pair[1]:
            same.append(name)
            continue
        columns, cells = [first["columns"][0], *runs], [rows, *pair]
        if is_numeric(pair[0]) and is_numeric(pair[1]):
            numbers = ([x["value"] if isinstance(x, dict) else x for x in column] for column in pair)
            gaps = [None if None in both else both[1] - both[0] for both in zip(*numbers, strict=True)]
            columns, cells = [*columns, "difference"], [*cells, gaps]
        sections.append({"title": f"{title}: {name}", "columns": columns,
                         "rows": [list(row) for row in zip(*cells, strict=True)]})
    notes = [f"Only in {run}: {'; '.join(found)}." for run, found in (
        (runs[i], [x for x in have[i] if x not in have[1 - i]]) for have in (tables, names) for i in (0, 1)) if found]
    notes += [f"The same in both: {'; '.join(same)}."] if same else []
    texts = [section.get("text") or "" for section in (first, second)]
    notes += [f"\n{run} says: {said}" for run, said in zip(runs, texts, strict=True)] if texts[0] != texts[1] else []
    if not notes and sections:
        return sections
    return [note(title, " ".join(notes).strip() or "The same in both."), *sections]


def _compare_preferences(files: list[Path], runs: list[str]) -> list[dict]:
    """The difference in mean preference of each model, paired by prompt, where both runs kept their judgments."""
    title = "Mean preference, paired by prompt"
    missing = [str(file) for file in files if not file.is_file()]
    if missing:
        return [note(title, f"Not measured: there is no {missing[0]}.")] if len(missing) == 1 else []
    first, second = (_preferences(file) for file in files)
    rows, cells = [], {}
    for model in dict.fromkeys([*first, *second]):
        x, y = first.get(model, {}), second.get(model, {})
        common = sorted(set(x) & set(y))
        pairs = [(p, x[p], y[p]) for p in common if x[p] is not None and y[p] is not None]
        means = [None] * 3
        if pairs and len(common) - len(pairs) <= MOST_UNPARSED * len(common):
            prompts, before, after = zip(*pairs, strict=True)
            gap = paired_difference(after, before, prompts)
            cells[model] = bounded(gap["difference"], gap["low"], gap["high"])
            means = [100 * sum(before) / len(pairs), 100 * sum(after) / len(pairs), cells[model]]
        rows.append([model, *means, len(pairs), len(common) - len(pairs), len(x) - len(common), len(y) - len(common)])
    columns = ["judge and pair", *(f"{run}, %" for run in runs), "difference, points", "prompts", "no verdict",
               *(f"only in {run}" for run in runs)]
    return [{"title": title, "columns": columns, "rows": rows,
             "text": "Over the prompts for which both runs have a verdict, unless more than "
                     f"{MOST_UNPARSED:.0%} have none; the interval resamples these prompts.",
             "figure": dots(cells, "difference, points", reference=0)}]


def _preferences(file: Path) -> dict[str, dict[str, float | None]]:
    """Mean preference by judge and pair of models, and by prompt; None without a verdict."""
    found: dict[str, dict[str, list[float]]] = {}

    def game(row: dict, number: int) -> None:
        if "score" in row:
            return
        p, a, b = row["preference"], str(row["a"]), str(row["b"])
        if p is not None and not (is_number(p) and 0 <= p <= 1):
            raise ValueError
        by_prompt = found.setdefault(f"{row['judge']}: {min(a, b)} against {max(a, b)}", {})
        by_prompt.setdefault(str(row["prompt"]), []).extend([] if p is None else [p if a < b else 1 - p])

    read_lines(file, game, "is no game of judge.py, expected 'judge', 'prompt', 'a', 'b' and 'preference' from 0 to 1")
    return {pair: {prompt: sum(v) / len(v) if v else None for prompt, v in of.items()} for pair, of in found.items()}
