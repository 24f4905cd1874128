"""Fill in what was measured, in README, RESULTS and SPEEDRUN, from the committed files: `python -m benchmarks.results`.

They are written by hand but for places between two comments, `<!-- WHAT -->` and `<!-- / -->`. WHAT is one of

    throughput.json {device}, {threads} threads    a format string over a file of benchmarks/results
    sampling.json rows                             a table of its "rows"; the comment's next lines are columns, heading
    model: {shape}                                 and format string, without them all keys. Rows share a line where
    batch {batch}: {tokens_per_s:,.0f}             they differ only in what such a heading tells
    tiny/report.json Gold score by task            a section of a report of judge.py
    peers                                          rows, or a text, by the function named in FOUND
    tiny/chat.txt                                  the file as it is

A place whose file does not exist (a GPU's, until one was measured) stays empty. A test checks that none is out of date.
"""
import json
import re
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from string import Formatter

from benchmarks.kernels.report import builds, gpu_verdicts, summary
from judging.gold import interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLACE = re.compile(r"<!-- (?!/)(.+?)(\s-->)(.*?)<!-- / -->", re.DOTALL)


class Cells(Formatter):
    """Format strings for cells: a list is a number by seed and shown as mean ± 95 % interval, what is missing as -.

    With "each" shares are shown seed by seed.
    """

    def format_field(self, value: object, spec: str) -> str:
        if spec == "each":
            return " / ".join(f"{share:.0%}" for share in (value if isinstance(value, list) else [value["value"]]))
        if isinstance(value, str | bool | None) or value == []:
            return value if isinstance(value, str) else "yes" if value else "-" if value is None else "no"
        if isinstance(value, dict) and "low" in value:
            middle, low, high = (self.format_field(value[key], spec or ".1f") for key in ("value", "low", "high"))
            return f"{middle} [{low}, {high}]"
        if isinstance(value, dict):
            return ", ".join(f"{key} {self.format_field(part, spec)}" for key, part in value.items())
        if isinstance(value, list):
            middle, half = interval(value)
            return self.format_field(middle, spec) + (f" ± {self.format_field(half, spec or '.1f')}" if half else "")
        if spec == "GB":
            value, spec = value / 1e9, ".1f" if value > 1e10 else ".2f"
        if spec in ("", "rate"):  # without decimals that say nothing
            spec = ",.0f" if value == int(value) or (spec and value >= 100) else ",.1f"
        return format(value, spec).replace("%", " %")


cells = Cells()


def table(rows: Iterable[dict], columns: dict[str, str]) -> str:
    """Markdown. A heading is a format too: rows that are alike in the columns without braces go into one line."""
    rows = list(rows)
    if not rows:
        return ""
    columns = columns or {key: f"{{{key}}}" for key in rows[0]}
    fixed = [heading for heading in columns if "{" not in heading]
    lines: dict[object, dict[str, str]] = {}
    for number, row in enumerate(rows):
        line = {cells.vformat(heading, (), row): cells.vformat(form, (), row) for heading, form in columns.items()}
        alike = number if len(fixed) == len(columns) else tuple(line[heading] for heading in fixed)
        lines.setdefault(alike, {}).update(line)
    headings = list(next(iter(lines.values())))
    return "\n".join(f"| {' | '.join(line)} |" for line in (
        headings, ["---"] * len(headings), *(line.values() for line in lines.values())))


def by_seed(runs: list[dict]) -> dict:
    """The runs of several seeds as one, each number a list."""
    return {key: by_seed([run[key] for run in runs]) if isinstance(value, dict) else
            value if value is None else [run[key] for run in runs] for key, value in runs[0].items()}


def rows_of(report: dict, key: str) -> list[dict]:
    """What a report holds under a key, or in the section of that title; an ablation's seeds together."""
    if key not in report:
        section = next(part for part in report["sections"] if part["title"] == key)
        headings = [heading or "measure" for heading in section["columns"]]
        return [dict(zip(headings, row, strict=True)) for row in section["rows"]]
    if isinstance(report[key], dict):
        return [row | {"name": name} for name, row in report[key].items()]
    if key == "points":
        conditions = dict.fromkeys(point["condition"] for point in report[key])
        return [by_seed([point for point in report[key] if point["condition"] == condition]) | {"condition": condition}
                for condition in conditions]
    return report[key]

def peers(report: dict) -> Iterable[dict]:
    """Ours, the peers' fastest mode and the fastest floor of every model and task."""
    for shape, task in dict.fromkeys((row["shape"], row["task"]) for row in report["rows"]):
        sides = [row for row in report["rows"] if (row["shape"], row["task"]) == (shape, task)]
        ours, theirs, floor = (max((row for row in sides if row["side"].startswith(start)), default={"rate": None},
                                   key=lambda row: row["rate"]) for start in ("ours", "T", "floor"))
        ratios = [a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True)]
        yield {"shape": shape, "task": task, "ours": ours, "theirs": theirs, "floor": floor["rate"],
               "ratio": ours["rate"] / theirs["rate"], "low": min(ratios), "high": max(ratios)}


def peers_gpu(report: dict) -> Iterable[dict]:
    """Every side of every task; one that failed says why in place of its rate."""
    ours = {row["task"]: row["rate"] for row in report["rows"] if row["side"] == "ours" and "rate" in row}
    for row in report["rows"]:
        row = {"rate": row.get("error"), "unit": "", "tflops": None, "peak_mib": None} | row
        known = row["tflops"] and report["peak_tflops"] and row["task"] != "qlora"
        yield row | {"mfu": row["tflops"] / report["peak_tflops"] if known else None,
                     "ratio": ours[row["task"]] / row["rate"] if "error" not in row and row["task"] in ours else None}


def gpu_hours(report: dict) -> str:
    """What Zephyr's recipe would cost at a GPU's rates.

    UltraChat-200k is 272 steps of 512 rows of 2,048 tokens when packed (alignment-handbook, pull request 31);
    UltraFeedback has 61,135 pairs, learnt in three epochs (Tunstall et al. 2023); the talk says four hours on 16 A100.
    """
    ours = {row["task"]: row for row in report["rows"] if row["side"] == "ours"}
    chat = 272 * 512 * 2048 / ours["sft"]["rate"] / 3600
    pairs = 61135 * (3 / ours["dpo"]["rate"] + ours["dpo"]["reference_s"]) / 3600
    return (f"At these rates Zephyr's recipe takes {chat + pairs:.1f} GPU-hours: SFT on UltraChat-200k {chat:.1f}, "
            f"three epochs of DPO on UltraFeedback {pairs:.1f}. The talk: four hours on 16 A100, 64.")


def smollm2(report: dict, wanted: str) -> Iterable[dict]:
    """A row for each stage that has this measure; of a measure one interval, or the numbers by seed."""
    measures = dict.fromkeys(row["measure"] for row in report["rows"])
    stages = dict.fromkeys(row["stage"] for row in report["rows"] if row["measure"] == wanted)
    for stage in sorted(stages, key=lambda stage: stage != "base"):
        rows = [row for row in report["rows"] if row["stage"] == stage]
        by_measure = {name: [row for row in rows if row["measure"] == name] for name in measures}
        cases = {row["n"] for row in rows if row["measure"] == wanted}
        yield {"stage": stage, "seeds": len({row["seed"] for row in rows}), "cases": " or ".join(map(str, cases))} | {
            name: (found[0] if len(found) == 1 else [row["value"] for row in found]) if found else None
            for name, found in by_measure.items()}


def smollm2_reward(report: dict) -> Iterable[dict]:
    """A row for each of the three that score replies: over all held-out pairs, and by the margin of the ratings."""
    for row in smollm2(report, "accuracy, reward model"):
        for name in ("reward model", "log p per token", "length"):
            found = {key.removeprefix(f"accuracy, {name}").removeprefix(", ") or "all": value
                     for key, value in row.items() if key.startswith(f"accuracy, {name}")}
            yield {"name": name, "stage": row["stage"], "seeds": row["seeds"]} | found


FOUND = {f"smollm2_{name}": ("smollm2.json", partial(smollm2, wanted=wanted)) for name, wanted in {
    "dpo": "log p of held-out chosen, nats", "choices": "PIQA, acc", "same": "choices, a second",
    "rule": "constraints kept"}.items()}
FOUND |= {"smollm2_reward": ("smollm2.json", smollm2_reward), "peers": ("peers.json", peers),
          "peers_avx2": ("peers_avx2.json", peers),
          "peers_gpu": ("peers_gpu.json", peers_gpu), "gpu_hours": ("peers_gpu.json", gpu_hours),
          "kernels_builds": (ROOT / "tests" / "aot_baseline.json", builds),
          "kernels_cpu": ("kernels/cpu.json", summary), "kernels_gpu": ("kernels", gpu_verdicts)}


def read(file: Path) -> dict | list[dict] | None:
    """A result file, nothing if it does not exist; of a folder what GPUs wrote there."""
    if file.is_dir():
        return [json.loads(part.read_text()) for part in sorted(file.glob("*.json")) if part.name != "cpu.json"]
    return json.loads(file.read_text()) if file.is_file() else None


def made(what: str) -> str:
    """What belongs into a place."""
    first, *columns = what.split("\n")
    name, _, rest = first.partition(" ")
    if name.endswith(".txt"):
        return f"```\n{(RESULTS / name).read_text().rstrip()}\n```"
    file, function = FOUND.get(name, (name, None))
    report = read(RESULTS / file)
    if not report:
        return ""
    if "{" in rest:
        return cells.vformat(rest, (), report)
    rows = function(report) if function else rows_of(report, rest)
    return rows if isinstance(rows, str) else table(rows, dict(column.split(": ", 1) for column in columns))


def fill(place: re.Match) -> str:
    new = made(place[1])
    around = "\n" if "\n" in place[1] + new else ""
    return f"<!-- {place[1]}{place[2]}{around}{new}{around}<!-- / -->"


if __name__ == "__main__":
    for file in (ROOT / "README.md", ROOT / "RESULTS.md", ROOT / "SPEEDRUN.md"):
        file.write_text(PLACE.sub(fill, file.read_text()))
        print(f"filled in {file.name}")
