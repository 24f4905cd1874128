import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import matplotlib
import numpy as np
import pytest
from conftest import exits, write_jsonl
from matplotlib.text import Text

from judging import figures, report, tables
from judging.figures import DARK, LIGHT, align, draw, show
from judging.report import clean, compare, page, text, write

NAN = math.nan
HOSTILE = """<script>alert("x")</script> & 'y'"""


def table(rows, columns=("model", "win rate, %"), **more) -> dict:
    return {"title": "Win rates", "columns": list(columns), "rows": rows, **more}


def of(*sections, **more) -> dict:
    return {"title": "Judged", "about": {"judge": "stub", "seed": 0}, "sections": list(sections), **more}


def interval(value, low, high) -> dict:
    return {"value": value, "low": low, "high": high}


# ----------------------------------------------------------------------------------------- numbers

def test_decimals_follow_the_largest_number_of_a_column():
    """74.12 has one decimal (from 10), 7.341 two, 0.652 and 0.0652 three digits, 1140.3 none; integers are left
    alone."""
    for cells, shown in (([71.234, 9.56], ["71.2", "9.6"]), ([7.341, 0.5], ["7.34", "0.50"]),
                         ([0.65249, 0.05], ["0.652", "0.050"]),
                         ([0.0652], ["0.0652"]), ([1140.3, 98.76], ["1140", "99"]), ([805, 0.652], ["805", "0.652"]),
                         ([100.0, 99.96], ["100.0", "100.0"]), ([0.0], ["0.0"]),
                         ([12345, -12345.6], ["12,345", "-12,346"])):
        assert [value for value, _ in show(cells)] == shown


def test_a_number_too_small_for_its_column_keeps_two_digits():
    """Beside 97.3 there is one decimal, enough for 1.04 but not for 0.14; and 3e-9 would need eleven decimals."""
    said = [value for value, _ in show([97.3, 0.14, -0.004, 1.04, 3e-9])]
    assert said == ["97.3", "0.14", "-0.0040", "1.0", "3.0e-09"]


def test_cells_of_every_kind():
    cells = [interval(71.2, 68.0, 74.13), interval(5.0, None, None), None, "text", True, {"other": 1}]
    assert show(cells) == [("71.2", "[68.0, 74.1]"), ("5.0", ""), ("-", ""), ("text", ""), ("true", ""),
                           ('{"other": 1}', "")]
    assert show([]) == []


def test_decimal_points_stand_below_each_other():
    assert align(["71.2", "0.14", "805", "-"]) == ["71.2 ", "0.14", "805   ", "-   "]
    assert align(["71.2", "0.14", "805"], "_", ",") == ["71.2_", "0.14", "805,__"] and align(["1", "22"]) == ["1", "22"]


def test_clean_leaves_plain_json():
    dirty = {"a": [NAN, math.inf, 1.5, np.float32(0.5), np.int64(3), np.array([1.0, NAN])],
             2: ("\x1b[m\x00\r\ny\t", "\ud800", None, True)}
    assert clean(dirty) == {"a": [None, None, 1.5, 0.5, 3, [1.0, None]],
                            "2": ["\ufffd[m\ufffd\ny\t", "\ufffd", None, True]}
    json.dumps(clean(dirty), allow_nan=False).encode()


# -------------------------------------------------------------------------------------- in the terminal

def test_a_table_by_hand():
    rows = [["SFT + DPO", interval(71.2, 68.0, 74.1), 805, -0.5], ["b", interval(9.64, 8.0, 10.31), 7, None]]
    said = text(of(table(rows, ("model", "win rate, %", "n", "shift"), text="Both orders.")))
    assert said == """Judged
======
judge: stub
seed: 0


Win rates
---------
Both orders.

model            win rate, %    n   shift
---------  -----------------  ---  ------
SFT + DPO  71.2 [68.0, 74.1]  805  -0.500
b           9.6 [8.0, 10.3]     7   -
"""


def test_no_line_is_wider_than_120_columns():
    words = "word " * 60
    wide = table([[f"model {i}", words, *[interval(50.0, 40.0, 60.0)] * 9, "x" * 300] for i in range(2)],
                 ["model", "reason", *(f"a long name of a column {i}" for i in range(9)), "reply"], text=words)
    said = text(of(wide, title="t" * 200, about={"prompt": words}))
    assert max(map(len, said.splitlines())) <= 120
    assert said.count("word") == 60 * 4 and said.count("x") == 600
    assert said.count("50.0 [40.0, 60.0]") == 18
    assert said.count("model 0") > 1  # the table was cut, and its first column repeated


def test_headers_of_numbers_wrap_before_texts_do():
    columns = ["model", *(f"mean length of replies {i}, characters" for i in range(4))]
    said = text(of(table([["a model with a rather long name", 1, 2, 3, 4]], columns)))
    assert "a model with a rather long name" in said and "characters" in said and columns[1] not in said


def test_the_terminal_says_where_a_figure_is():
    assert "see report.html" in text(of(table([], [], figure=FIGURES["bars"](2))))
    assert "figure" not in text(of(table([["a", 1]])))


def test_a_row_of_another_length_is_refused():
    with pytest.raises(ValueError, match="1 cells, expected 2"):
        text(of(table([["a"]])))


# ---------------------------------------------------------------------------------------- the page

class Balanced(HTMLParser):
    """The page's elements are closed in order; collects tags and text."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.words = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


FIGURES = {
    "ratings": lambda n: {"kind": "ratings", "names": names(n), "values": spread(n),
                          "low": [x - 30 for x in spread(n)], "high": [x + 30 for x in spread(n)],
                          "label": "Elo", "reference": 1000},
    "matrix": lambda n: {"kind": "matrix", "names": names(n), "columns": names(n),
                         "grid": [spread(n) for _ in range(n)], "label": "win rate of the row, %", "low": 0,
                         "high": 100},
    "bars": lambda n: {"kind": "bars", "names": names(n),
                       "groups": {f"series {k} of many words": [x - 40 * k for x in spread(n)]
                                  for k in range(4)}, "label": "score"},
}


def names(n: int) -> list[str]:
    kinds = ["base", "a model with a name that goes on and on and on", "模型", "SFT"]
    return [f"{kinds[i % 4]} {i}" for i in range(n)]


def spread(n: int) -> list[float]:
    return [round(37.3 + 971.7 * math.sin(i) ** 2, 2) for i in range(n)]


def drawn(figure: dict):
    """The figure laid out; every text lies inside it and, of those that fill no cell, no two lie on each other."""
    with matplotlib.rc_context(figures.SETTINGS):
        found = figures.plot(clean(figure))
        found.draw_without_rendering()
    beyond = set()  # ticks past the ends of an axis, which matplotlib keeps and does not draw
    for axis in (axis for axes in found.axes for axis in (axes.xaxis, axes.yaxis)):
        low, high = sorted(axis.get_view_interval())
        beyond |= {tick.label1 for tick in axis.get_major_ticks() if not low <= tick.get_loc() <= high}
    outside = []
    for label in found.findobj(lambda x: isinstance(x, Text) and x.get_visible() and x.get_text() and x not in beyond):
        box = label.get_window_extent()
        assert found.bbox.x0 - 1 <= box.x0 <= box.x1 <= found.bbox.x1 + 1, label
        assert found.bbox.y0 - 1 <= box.y0 <= box.y1 <= found.bbox.y1 + 1, label
        if label.get_in_layout() and not label.get_rotation():
            assert not box.padded(-2).count_overlaps(outside), label
            outside.append(box)
    return found


def texts(svg: str) -> list[str]:
    return [element.text for element in ET.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.filterwarnings("ignore:Glyph")
@pytest.mark.parametrize("kind", FIGURES)
@pytest.mark.parametrize("n", [1, 2, 5, 14])
def test_no_text_leaves_its_figure_or_covers_another(kind, n):
    drawn(FIGURES[kind](n))


@pytest.mark.parametrize("kind", FIGURES)
def test_a_figure_without_a_number_says_so(kind):
    figure = FIGURES[kind](2)
    for key in {"values", "low", "high"} & set(figure):
        figure[key] = [NAN, None]
    if kind in ("matrix", "bars"):
        figure |= {"grid": [[NAN] * 2] * 2} if kind == "matrix" else {"groups": {"a": [None, NAN]}}
    assert draw(clean(figure)) == draw(FIGURES[kind](0)) == figures.NOTHING


@pytest.mark.parametrize("kind", FIGURES)
def test_figures_take_gaps_zeros_and_markup(kind):
    figure = FIGURES[kind](3)
    for key in ("values", "low", "high"):
        if key in figure:
            figure[key] = [0.0, None, 0.0]
    if kind == "matrix":
        figure |= {"grid": [[0.0, None, 0.0]] * 3, "low": None, "high": NAN}
    if kind == "bars":
        figure["groups"] = {HOSTILE: [0.0, None, -0.0]}
    figure = clean(figure | {"names": [HOSTILE] * 3, "label": HOSTILE})
    svg = draw(figure)
    assert any(HOSTILE in text for text in texts(svg)) and "<script" not in svg
    assert HOSTILE in ET.fromstring(svg).get("aria-label")


@pytest.mark.parametrize("kind, key", [("ratings", "values"), ("matrix", "grid"), ("bars", "names")])
def test_lists_of_unequal_lengths_are_refused(kind, key):
    figure = FIGURES[kind](3)
    with pytest.raises(ValueError):
        draw(figure | {key: figure[key][:2]})
    with pytest.raises(ValueError, match="expected ratings"):
        draw(figure | {"kind": "pie"})


def test_ratings_by_hand():
    """Sorted best first; whiskers from low to high, a dashed line at the reference, a model without a number last."""
    figure = {"kind": "ratings", "names": ["PPO (sparse reward)", "high", "none"], "values": [0.0, 100.0, None],
              "low": [0.0, 90.0, None], "high": [10.0, 100.0, None], "label": "win rate, %", "reference": 50}
    (axes,) = drawn(figure).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["high", "PPO (sparse reward)", "none"]
    assert axes.get_ylim() == (2.5, -0.5) and [text.get_text() for text in axes.texts] == ["100.0", "0.0", "-"]
    assert [tuple(line.get_xdata()) for line in axes.lines] == [(90, 100), (100,), (0, 10), (0,), (50, 50)]
    said = texts(draw(figure))
    assert {"high", "PPO (sparse reward)", "none", "win rate, %", "100.0", "-"} <= set(said)


def test_bars_begin_at_zero_and_carry_their_numbers_and_names():
    (axes,) = drawn({"kind": "bars", "names": ["a", "b"], "groups": {"shift": [-100.0, 100.0]}, "label": "points"}).axes
    assert [(bar.get_x(), bar.get_width()) for bar in axes.patches] == [(0, -100), (0, 100)]
    figure = FIGURES["bars"](1)
    assert set(figure["groups"]) | {"37.3", "-82.7"} <= set(texts(draw(figure)))


def test_a_radar_goes_round_the_domains_and_lays_models_over_each_other():
    """A score is the distance from the middle; the first domain is at the top, the line closes, a gap breaks it."""
    columns = ["writing", "roleplay", "reasoning", "math", "coding", "extraction", "stem", "humanities"]
    figure = {"kind": "radar", "names": ["GPT-4", HOSTILE], "columns": columns, "label": "mean score", "low": 0,
              "high": 10, "grid": [[9.0, 8.5, 7.0, 6.5, 7.5, 9.5, 9.8, 9.9], [5.0, None, *[4.0] * 6]]}
    (axes,) = drawn(clean(figure)).axes
    assert [label.get_text() for label in axes.get_xticklabels()] == columns and axes.get_ylim() == (0, 10)
    first, second = (line.get_xydata() for line in axes.lines)
    assert first[:, 1].tolist() == [9.0, 8.5, 7.0, 6.5, 7.5, 9.5, 9.8, 9.9, 9.0] and np.isnan(second[1, 1])
    assert first[:9, 0] == pytest.approx([k * math.pi / 4 for k in range(8)] + [0])
    assert axes.get_theta_offset() == math.pi / 2 and axes.get_theta_direction() == -1
    assert {*columns, "GPT-4", "mean score"} <= set(texts(draw(clean(figure)))) and "<script" not in draw(figure)
    assert draw(figure | {"grid": [[None] * 8] * 2}) == figures.NOTHING
    for wrong in ({"grid": figure["grid"][:1]}, {"columns": columns[:3]}):
        with pytest.raises(ValueError, match="the grid is not"):
            draw(figure | wrong)


def test_scores_by_domain_are_drawn_round_beside_their_table():
    """MT-Bench's eight in the talk's order, with a table beside them; two categories or seven models: tinted cells."""
    domains = ["coding", "extraction", "humanities", "math", "reasoning", "roleplay", "stem", "writing"]

    def section(models, categories):
        rows = [{"judge": "j", "prompt": c, "turn": 1, "category": c, "model": f"m{i}", "score": 5 + i % 3}
                for i in range(models) for c in categories]
        return tables.score_sections(rows, "j")[1]

    radar = section(3, domains)
    assert radar["figure"]["kind"] == "radar" and radar["columns"][1:3] == ["writing", "roleplay"]
    assert sorted(radar["columns"][1:]) == domains and radar["figure"]["high"] == 10
    assert page(of(radar)).count("<table>") == 2 and "<svg" in page(of(radar))
    assert {section(3, domains[:2])["figure"]["kind"], section(7, domains)["figure"]["kind"]} == {"matrix"}


def test_a_figure_is_the_same_every_time_and_wears_the_colours_of_the_page():
    svg = draw(FIGURES["ratings"](2))
    assert svg == draw(FIGURES["ratings"](2)) and "var(--accent)" in svg and not re.search("#[0-9a-f]{6}", svg)


def luminance(color: list[float]) -> float:
    r, g, b = (x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in color)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b


def contrast(a: list[float], b: list[float]) -> float:
    """WCAG 2's ratio, from 1 to 21; 4.5 is what small text needs."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("palette", [LIGHT, DARK])
def test_every_text_can_be_read(palette):
    rgb = {name: [int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)] for name, color in palette.items()}
    for name in ("ink", "muted", "accent"):
        assert contrast(rgb[name], rgb["paper"]) >= 4.5
    figure = {"kind": "matrix", "names": ["a"], "columns": ["x", "y", "z"], "grid": [[-5, 50, 200]], "label": "",
              "low": 0, "high": 100}
    strengths = [cell.get_alpha() for cell in figures.plot(figure).axes[0].patches]
    assert strengths == pytest.approx([0.04, 0.28, 0.52])
    for strength in strengths:
        cell = [strength * a + (1 - strength) * p for a, p in zip(rgb["accent"], rgb["paper"], strict=True)]
        assert contrast(rgb["ink"], cell) >= 4.5


def everything() -> dict:
    rows = [[HOSTILE, NAN], ["b", interval(1.5, NAN, 2.0)]]
    return of(*({"title": f"{HOSTILE} {kind}", "text": HOSTILE, "columns": [HOSTILE, "n, %"], "rows": rows,
                 "figure": figure(4)} for kind, figure in FIGURES.items()),
              {"title": "words alone", "text": "None.", "columns": [], "rows": []}, title=HOSTILE,
              about={HOSTILE: HOSTILE, "nested": {"lr": 1e-6, "nan": NAN}})


def test_the_page_escapes_all_text_and_asks_for_nothing():
    html = page(everything())
    parsed = Balanced(html)
    assert "script" not in {tag for tag, _ in parsed.tags}
    assert "".join(parsed.words).count(HOSTILE) >= 15
    assert not re.search(r"https?://", html.replace("http://www.w3.org/2000/svg", ""))
    attributes = [key for _, attrs in parsed.tags for key in attrs]
    assert not {"src", "srcset", "onload", "onclick"} & set(attributes) and "url(" not in html.replace("url(#", "")
    assert "@import" not in html
    assert all(attrs["href"].startswith("#") for tag, attrs in parsed.tags if tag == "a")
    targets = {attrs["id"] for tag, attrs in parsed.tags if tag == "section"}
    assert {attrs["href"][1:] for tag, attrs in parsed.tags if tag == "a"} == targets and len(targets) == 5
    assert "nan" not in html.lower().replace("&#34;nan&#34;: null", "")


def test_a_page_of_four_sections_has_no_contents():
    assert "<nav" not in page(of(table([]), table([]), table([])))
    assert "<nav" in page(of(table([]), table([]), table([]), table([])))


def test_columns_of_the_page_line_up():
    """A column with intervals takes two cells of each row, and its header spans both."""
    html = page(of(table([["a", interval(71.2, 68.0, 74.1), 1], ["b", None, None]], ("model", "win rate, %", "n"))))
    head, first, second = re.findall(r"<tr>(.*?)</tr>", html)[:3]
    assert re.findall(r">([^<>]+)<", head) == ["model", "win rate, %", "n"] and head.count("colspan=2") == 1
    cells = [("name", "a"), ("number", "71.2"), ("interval", "[68.0, 74.1]"), ("number", "1")]
    assert re.findall(r"<td class=\"(\w*)\">(.*?)</td>", first) == cells
    assert [value.strip("\u2007\u2008") for value in re.findall(r"<td.*?>(.*?)</td>", second)] == ["b", "-", "", "-"]


def test_write_and_read_back(tmp_path):
    write(everything(), tmp_path / "new" / "folder")
    said = (tmp_path / "new" / "folder" / "report.json").read_text()
    assert "NaN" not in said and "Infinity" not in said
    assert json.loads(said) == clean(everything()) == report.read(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "report.html").read_text() == page(json.loads(said))
    assert text(json.loads(said)) == text(everything())


# ------------------------------------------------------------------------------------ two runs

def runs(tmp_path, first: dict, second: dict) -> list:
    for name, content in (("a", first), ("b", second)):
        write(content, tmp_path / name / "judge")
    return [tmp_path / "a" / "judge", tmp_path / "b" / "judge"]


def test_compare_by_hand(tmp_path):
    """SFT: 71.5 - 70.0 = 1.5 and n 10 - 8 = 2. DPO only in a, PPO only in b; the column "lc2" only in b; a verdict is
    no number."""
    columns = ("model", "win rate, %", "n", "verdict")
    first = of(table([["SFT", interval(70.0, 60.0, 80.0), 8, "good"], ["DPO", 80.5, 8, "best"]], columns),
               table([], title="Bias"))
    second = of(table([["PPO", 50.0, 9, "fair", 40.0], ["SFT", 71.5, 10, "good", 66.0]], (*columns, "lc2")),
                table([["x", 1]], title="Cost"))
    second["about"] = {"judge": "stub", "orders": "both", "seed": 1}
    got = compare(runs(tmp_path, first, second))
    assert got["title"] == "b against a"
    settings, alone, notes, rates, n, verdict = got["sections"]
    assert settings["columns"] == ["setting", "a", "b"]
    assert settings["rows"] == [["seed", "0", "1"], ["orders", None, "both"]]
    assert alone["rows"] == [["Bias", "a", 0], ["Cost", "b", 1]]
    assert notes == {"title": "Win rates", "text": "Only in a: DPO. Only in b: PPO. Only in b: lc2.", "columns": [],
                     "rows": []}
    assert rates["title"] == "Win rates: win rate, %"
    assert rates["columns"] == n["columns"] == ["model", "a", "b", "difference"]
    assert rates["rows"] == [["SFT", interval(70.0, 60.0, 80.0), 71.5, 1.5], ["DPO", 80.5, None, None],
                             ["PPO", None, 50.0, None]]
    assert n["rows"] == [["SFT", 8, 10, 2], ["DPO", 8, None, None], ["PPO", None, 9, None]]
    assert verdict["columns"] == ["model", "a", "b"] and verdict["rows"][0] == ["SFT", "good", "good"]
    page(got), text(got)


def test_a_run_differs_from_its_copy_in_nothing(tmp_path):
    same = of(table([["SFT", 70.0, "good"]], ("model", "win rate, %", "verdict")), table([]),
              {"title": "Note", "text": "Words.", "columns": [], "rows": []})
    got = compare(runs(tmp_path, same, same))
    assert [section["title"] for section in got["sections"]] == ["Settings that differ", "Win rates", "Win rates (2)",
                                                                 "Note"]
    assert [section["text"] for section in got["sections"]] == [
        "None.", "The same in both: win rate, %; verdict.", "The same in both: win rate, %.", "The same in both."]


def test_rows_and_sections_of_one_name_are_matched_in_order(tmp_path):
    first, second = (of(table([["SFT", x], ["SFT", 60.0]]), table([["SFT", 2 * x]])) for x in (10.0, 11.5))
    one, two = compare(runs(tmp_path, first, second))["sections"][1:]
    assert one["rows"] == [["SFT", 10.0, 11.5, 1.5], ["SFT (2)", 60.0, 60.0, 0.0]]
    assert two["title"] == "Win rates (2): win rate, %" and two["rows"] == [["SFT", 20.0, 23.0, 3.0]]


def test_a_section_that_lost_its_table_is_listed(tmp_path):
    words = {"title": "Win rates", "text": "Nothing was judged.", "columns": [], "rows": []}
    section, = compare(runs(tmp_path, of(words), of(table([["SFT", 70.0]]))))["sections"][1:]
    assert section["text"] == "Only in b: SFT. Only in b: win rate, %. \na says: Nothing was judged. \nb says:"


def test_names_that_occur_again_stay_apart():
    assert report._unique(["a", "a (2)", "a", "b", "a"]) == ["a", "a (2)", "a (3)", "b", "a (4)"]


def game(prompt, preference):
    return {"judge": "j", "prompt": prompt, "a": "m", "b": "n", "preference": preference}


def test_preferences_are_compared_by_prompt(tmp_path):
    """m against n on prompts 1, 2, 3 of both: a 1, 0, 0.5; b 1, 1 and 0.75 (judged three times: 1, 0.5, null; once from
    n's side).
    Means 150 / 3 = 50 and 275 / 3 %. Prompts 4 and 5 are only in a; the pair n and o is only in b.
    Once 4 is in b without a verdict, one of four is missing, and there are no means."""
    folders = runs(tmp_path, of(), of())
    write_jsonl(folders[0] / "judgments.jsonl", [game(i, p) for i, p in enumerate((1, 0, 0.5, 1, 1), 1)])
    rows = [game(3, 1), game(2, 0) | {"a": "n", "b": "m"}, game(1, 1), game(3, None), game(3, 0.5),
            game(1, 1) | {"a": "o"},
            {"judge": "j", "prompt": 1, "model": "m", "score": 7}]
    (folders[1] / "judgments.jsonl").write_text("".join(  # a line separator inside a text is no new line
        json.dumps(row | {"text": "x\u2028y"}, ensure_ascii=False) + "\n" for row in rows))
    section = compare(folders)["sections"][1]
    assert section["columns"] == ["judge and pair", "a, %", "b, %", "difference, points", "prompts", "no verdict",
                                  "only in a", "only in b"]
    m, n = section["rows"]
    assert m[:3] == ["j: m against n", 50, pytest.approx(275 / 3)] and m[3]["value"] == pytest.approx(125 / 3)
    assert m[4:] == [3, 0, 2, 0]
    assert 0 <= m[3]["low"] < 125 / 3 < m[3]["high"] <= 100
    assert n == ["j: n against o", None, None, None, 0, 0, 0, 1]
    write_jsonl(folders[1] / "judgments.jsonl", [*rows, game(4, None)])
    assert compare(folders)["sections"][1]["rows"][0] == [m[0], None, None, None, 3, 1, 1, 0]
    assert section["figure"]["names"] == ["j: m against n"] and section["figure"]["reference"] == 0


def test_a_shift_common_to_all_prompts_leaves_open_what_40_prompts_do(tmp_path):
    """b is 0.25 above a on every prompt: 3.8415 / 43.8415 = 0.08762 of the prompts may be elsewhere between -100 and
    100: 25 - 125 x 0.08762, 25 + 75 x 0.08762."""
    folders = runs(tmp_path, of(), of())
    for folder, shift in zip(folders, (0, 0.25), strict=True):
        write_jsonl(folder / "judgments.jsonl", [game(i, i % 4 / 4 + shift) for i in range(40)])
    gap = compare(folders)["sections"][1]["rows"][0][3]
    assert [gap["low"], gap["value"], gap["high"]] == pytest.approx([14.047, 25, 31.572], abs=1e-3)


def test_judgments_of_one_run_only_are_mentioned(tmp_path):
    folders = runs(tmp_path, of(), of())
    assert len(compare(folders)["sections"]) == 1
    write_jsonl(folders[0] / "judgments.jsonl", [game(1, 1)])
    assert str(folders[1] / "judgments.jsonl") in compare(folders)["sections"][1]["text"]


def test_what_cannot_be_compared_is_one_line(tmp_path, capsys):
    folders = runs(tmp_path, of(), of())
    exits(capsys, lambda: compare(folders[:1]), "--compare", "1 folders", "expected two")
    exits(capsys, lambda: compare([folders[0], folders[0]]), "same folder")
    exits(capsys, lambda: compare([folders[0], tmp_path / "gone"]), "gone/report.json", "cannot be read")
    start = '{"title": "x", "about": {}, "sections": [{"title": "y", '
    for broken in ("{", "[]", '{"title": "x"}', '{"title": 3, "about": {}, "sections": []}',
                   '{"title": "x", "about": [], "sections": []}', start + '"columns": ["z"], "rows": [[1, 2]]}]}',
                   start + '"columns": [], "rows": [], "figure": {"kind": "pie"}}]}', "\xff", "[" * 100_000):
        (folders[1] / "report.json").write_bytes(broken.encode("latin-1"))
        exits(capsys, lambda: compare(folders), "b/judge/report.json", "is not a report", "run the evaluation again")


@pytest.mark.parametrize("line", ["{", "[]", '{"judge": "j", "prompt": 1, "a": "m", "b": "n"}', *(
    json.dumps(game(1, 1)).replace(": 1}", f": {bad}}}") for bad in ("1.5", '"1"', "NaN", "true"))])
def test_a_broken_judgment_names_its_line(tmp_path, capsys, line):
    folders = runs(tmp_path, of(), of())
    for folder in folders:
        (folder / "judgments.jsonl").write_text(json.dumps(game(1, 1)) + "\n" + line + "\n")
    exits(capsys, lambda: compare(folders), "a/judge/judgments.jsonl line 2", "expected")
