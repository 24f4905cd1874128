"""Write the README's tables from the committed result files: `python -m benchmarks.readme`. A test checks that they match."""
from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def tiny_table(report: dict) -> str:
    """The recipe's models: gold score over seeds, and what stands behind it."""
    lines = ["| model | gold score | by seed | wins vs SFT | first turn | follow-ups | ended turns | words |",
             "|---|---|---|---|---|---|---|---|"]
    for name, m in report["models"].items():
        seeds = " ".join(f"{g:.1f}" for g in m["gold_by_seed"].values())
        lines.append(f"| {name} | **{m['gold']:.1f}** ± {m['gold_interval']:.1f} | {seeds} | {m['win_rate']:.1f} % | {m['first_turn']:.1f} "
                     f"| {m['follow_up']:.1f} | {m['ended']:.1f} % | {m['words']:.1f} |")
    return "\n".join(lines)


def category_table(report: dict) -> str:
    """Gold score by task."""
    tasks = list(next(iter(report["models"].values()))["category"])
    lines = ["| model | " + " | ".join(task.replace("_", " ") for task in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{m['category'][task]:.0f}" for task in tasks) + " |" for name, m in report["models"].items()]
    return "\n".join(lines)


def throughput_table(report: dict) -> str:
    """SFT and DPO beside the floor of their matmuls."""
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}.", "",
             "| model | work | compute | rate | floor of its matmuls | share |", "|---|---|---|---|---|---|"]
    lines += [f"| {r['shape']} | {r['work']} | {r['dtype']} | {r['rate']:,.{1 if r['rate'] < 100 else 0}f} {r['unit']} "
              f"| {r['floor_rate']:,.{1 if r['floor_rate'] < 100 else 0}f} | {100 * r['share_of_floor']:.0f} % |" for r in report["rows"]]
    return "\n".join(lines)


TABLES = {"tiny": (tiny_table, "tiny/judge.json"), "categories": (category_table, "tiny/judge.json"),
          "throughput": (throughput_table, "throughput.json")}


def filled(text: str) -> str:
    """The README with every part between <!-- NAME --> and <!-- /NAME --> made anew."""
    for name, (table, file) in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{table(json.loads((RESULTS / file).read_text()))}\n{end}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print(f"wrote the tables of {readme}")
