"""What `kernels/bench.py` measured, as tables, figures and a verdict; made from the rows alone, so anyone can make them again.

A contest is all rows of one kernel, shape and pass. The best baseline of a contest is its fastest row that is neither
ours nor a floor. Ceilings are what the same run measured: GB/s of a copy, TFLOP/s of a large matmul.
"""
from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What one kernel should reach on a Hopper GPU: state of the art for plain Triton."""

    what: str
    kernels: tuple[str, ...]
    shape: str | None          # None: every shape, the worst counts
    passes: tuple[str, ...]    # together, if more than one
    measure: str               # "x best baseline", "TFLOP/s", "of ceiling", "of SHAPE" (rates); "ms", "GiB extra": lower is better
    ambitious: float


TARGETS = [
    Target("attention forward, 4 x 2048", ("attention",), "4 x 2048", ("forward",), "x best baseline", 0.92),
    Target("attention backward, 4 x 2048", ("attention",), "4 x 2048", ("backward",), "x best baseline", 0.85),
    Target("attention forward, 4 x 4096", ("attention",), "4 x 4096", ("forward",), "TFLOP/s", 580),
    Target("packed 128-2048, forward and backward", ("attention",), "packed 128-2048", ("forward", "backward"), "of 4 x 2048", 0.92),
    Target("window 4096 at 16k, forward", ("attention",), "1 x 16384, window 4096", ("forward",), "of 1 x 16384", 0.90),
    Target("decode, 64 x 2048", ("decode",), "64 x 2048", ("forward",), "of ceiling", 0.89),
    Target("logprobs and entropy, forward, V 128256", ("logprobs and entropy",), "8192 x 4096 x 128256", ("forward",), "ms", 12.8),
    Target("logprobs, forward and backward, V 128256", ("logprobs",), "8192 x 4096 x 128256", ("both",), "ms", 50),
    Target("logprobs, forward and backward, V 151936", ("logprobs",), "8192 x 4096 x 151936", ("both",), "ms", 60),
    Target("the same, memory", ("logprobs",), "8192 x 4096 x 151936", ("both",), "GiB extra", 2.0),
    Target("logprobs, frozen head, V 32000", ("logprobs, frozen head",), "8192 x 4096 x 32000", ("both",), "ms", 10.0),
    Target("NF4 dequantise", ("NF4 dequantise",), None, ("forward",), "of ceiling", 0.92),
    Target("NF4 linear, 16 rows", ("NF4 linear",), "16 x 14336 x 4096", ("forward",), "x best baseline", 2.1),
    Target("RMSNorm, rotary, SwiGLU: the worst", ("RMSNorm", "rotary", "SwiGLU"), None, ("forward", "backward"), "of ceiling", 0.90),
]


def contests(rows: list[dict]) -> dict[tuple, list[dict]]:
    """(kernel, shape, pass) -> its rows, as they were measured."""
    found: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["pass"] in ("forward", "backward", "both"):
            found.setdefault((row["kernel"], row["shape"], row["pass"]), []).append(row)
    return found


def ours(rows: list[dict]) -> dict | None:
    return next((row for row in rows if row["impl"] == "ours" and row["status"] == "ok"), None)


def best(rows: list[dict]) -> dict | None:
    """The fastest that is neither ours nor a floor."""
    others = [row for row in rows if row["status"] == "ok" and not row["impl"].startswith(("ours", "floor"))]
    return min(others, key=lambda row: row["ms"], default=None)


def ceilings(rows: list[dict]) -> dict[str, float]:
    return {row["unit"]: row["rate"] for row in rows if row["kernel"] in ("copy", "matmul") and row["status"] == "ok"}


# ------------------------------------------------------------------------------------------------------------ verdict

def value(target: Target, rows: list[dict]) -> float | None:
    """What was measured for a target; None if it was not."""
    held = {key: group for key, group in contests(rows).items()
            if key[0] in target.kernels and key[1] == (target.shape or key[1]) and key[2] in target.passes}
    mine = [ours(group) for group in held.values()]
    if not held or not all(mine):
        return None
    ms = sum(row["ms"] for row in mine)
    if target.measure == "ms":
        return ms
    if target.measure == "GiB extra":
        return max(row["extra_bytes"] for row in mine) / 2**30
    if target.measure == "x best baseline":
        others = [best(group) for group in held.values()]
        return sum(row["ms"] for row in others) / ms if all(others) else None
    if target.measure == "of ceiling":
        top = ceilings(rows)
        return min(row["rate"] / top[row["unit"]] for row in mine) if all(row["unit"] in top for row in mine) else None
    rate = sum(row["amount"] for row in mine) / ms / 1e9
    if target.measure == "TFLOP/s":
        return rate
    dense = value(target._replace(shape=target.measure.removeprefix("of "), measure="TFLOP/s"), rows)
    return rate / dense if dense else None


def verdict(rows: list[dict], mark: str = "") -> str:
    """A line for each target; with `mark` between the columns as a table."""
    lines = failures(rows)
    for target in TARGETS:
        found, lower, percent = value(target, rows), target.measure in ("ms", "GiB extra"), target.measure.startswith("of ")
        shown, wanted = ("-" if x is None else f"{100 * x:.0f} %" if percent else f"{x:.3g}" for x in (found, target.ambitious))
        sign = "<=" if lower else ">="
        met = "not measured"
        if found is not None:
            met = "reached" if (found <= target.ambitious if lower else found >= target.ambitious) else "missed"
        if mark:
            lines.append(f"{mark} {target.what} {mark} {target.measure} {mark} {shown} {mark} {sign} {wanted} {mark} {met} {mark}")
        else:
            lines.append(f"{target.what:<44} {shown:>8} {target.measure:<16} target {sign} {wanted:<6} {met}")
    return "\n".join(lines)


def failures(rows: list[dict]) -> list[str]:
    """Wrong results and groups that did not end, a line each."""
    return [f"FAILED {row['kernel']} {row['shape']} {row.get('dtype', '')}: {row['reason']}" for row in rows
            if row["status"] == "failed" and row["pass"] in ("check", "group")]


# ------------------------------------------------------------------------------------------------------------- tables

def group_text(group: str, rows: list[dict], top: dict[str, float]) -> str:
    """Every row of a group, for the terminal."""
    lines = [f"== {group}"]
    checks = [row for row in rows if row["pass"] == "check"]
    right = [row for row in checks if row["status"] == "ok"]
    if checks:
        largest = max((row["error"] for row in right), default=0)
        lines.append(f"{len(right)} of {len(checks)} checks passed, the largest error {largest:.2f} of what is allowed")
    lines += failures(rows)
    for (kernel, shape, name), held in contests(rows).items():
        lines.append(f"{kernel}, {shape}, {name}")
        fastest = best(held)
        for row in held:
            if row["status"] != "ok":
                lines.append(f"    {row['impl']:<30} {row['status']}: {row['reason']}")
                continue
            share = f"{100 * row['rate'] / top[row['unit']]:4.0f} %" if row["unit"] in top else ""
            times = f"{fastest['ms'] / row['ms']:5.2f}x" if fastest else ""
            spread = f"[{row['ms_p20']:.3f} - {row['ms_p80']:.3f}]"
            lines.append(f"    {row['impl']:<30} {row['ms']:9.3f} ms {spread:<21} {row['rate']:8.3g} {row['unit']:<8}{share} {times} "
                         f"{row['extra_bytes'] / 2**20:8.1f} MiB extra")
    return "\n".join(lines)


def text(report: dict) -> str:
    """Everything once more."""
    rows = report["rows"]
    groups = dict.fromkeys(row["group"] for row in rows)
    parts = [group_text(group, [row for row in rows if row["group"] == group], ceilings(rows)) for group in groups]
    return "\n".join([*parts, verdict(rows)] if "sm" in report else parts)


def summary_table(report: dict) -> str:
    """A line a contest: ours beside the best of the others."""
    top = ceilings(report["rows"])
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}; load of the machine before: {report['load']}.", "",
             "| kernel | shape | pass | ours | share of ceiling | best other | ratio | extra memory, ours | other |", "|---" * 9 + "|"]
    for (kernel, shape, name), held in contests(report["rows"]).items():
        mine, other = ours(held), best(held)
        if held[0]["group"] == "ceilings" or not mine or not other:
            continue
        name = {"both": "forward + backward"}.get(name, name)
        ms, their_ms = (f"{row['ms']:.3g} ms" if row["ms"] < 1000 else f"{row['ms']:,.0f} ms" for row in (mine, other))
        lines.append(f"| {kernel} | {shape} | {name} | {ms} | {100 * mine['rate'] / top[mine['unit']]:.0f} % "
                     f"| {other['impl']}: {their_ms} | {other['ms'] / mine['ms']:.2f} "
                     f"| {mine['extra_bytes'] / 2**20:,.1f} MiB | {other['extra_bytes'] / 2**20:,.1f} MiB |")
    return "\n".join(lines)


def verdict_table(reports: list[dict]) -> str:
    """The targets on every GPU that was measured."""
    if not reports:
        return "No GPU has run the Triton kernels yet: `make gpu` measures them and writes `kernels/results/`."
    parts = []
    for report in reports:
        parts += [f"{report['device']}, torch {report['torch']}, Triton {report['triton']}:", "",
                  "| kernel | measure | found | target | |", "|---|---|---|---|---|", verdict(report["rows"], "|"), ""]
    return "\n".join(parts).rstrip()


def build_table(baseline: dict) -> str:
    """kernels/aot_baseline.json: what the newest Triton makes of our kernels, all variants of one together."""
    version = max(baseline, key=lambda name: [int(part) for part in name.split(".")])
    lines = [f"Triton {version}:", "", "| kernel | builds | sm_80 | sm_90 | sm_100 |", "|---|---|---|---|---|"]
    families: dict[str, list[dict]] = {}
    for name, by_sm in baseline[version].items():
        families.setdefault(name.split(",")[0], []).append(by_sm)
    for family, members in families.items():
        cells = []
        for sm in ("80", "90", "100"):
            found = [member[sm] for member in members if sm in member]
            spills = sum(f["spills"] for f in found)
            cells.append(f"{max(f['registers'] for f in found)} registers, {max(f['shared'] for f in found) / 1024:.0f} KiB"
                         + f", {spills} spills" * bool(spills) if found else "")
        lines.append(f"| {family} | {sum(len(member) for member in members)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


# -------------------------------------------------------------------------------------------------------------- files

def save(report: dict, rows: list[dict], out: Path) -> None:
    """The report as JSON, a row a line."""
    out.parent.mkdir(parents=True, exist_ok=True)
    head = json.dumps(report, indent=1).removesuffix("\n}")
    out.write_text(f'{head},\n "rows": [\n' + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]\n}\n")


def figures(rows: list[dict], out: Path) -> None:
    """A figure for each group, beside the JSON file."""
    for group in dict.fromkeys(row["group"] for row in rows if row["group"] != "ceilings"):
        figure([row for row in rows if row["group"] == group], ceilings(rows), out.with_name(f"{out.stem}_{group}.png"))


def figure(rows: list[dict], top: dict[str, float], file: Path) -> None:
    """A line a contest, a dot an implementation, the ceiling dashed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    held = {key: [row for row in group if row["status"] == "ok"] for key, group in contests(rows).items()}
    units = list(dict.fromkeys(row["unit"] for group in held.values() for row in group))
    if not units:
        return
    impls = list(dict.fromkeys(row["impl"] for group in held.values() for row in group))
    chart, panels = plt.subplots(len(units), 1, squeeze=False, figsize=(9, 1.5 * len(units) + 0.28 * len(held)))
    for unit, (panel,) in zip(units, panels, strict=True):
        shown = {", ".join(key): group for key, group in held.items() if group and group[0]["unit"] == unit}
        for i, impl in enumerate(impls):
            dots = [(row["rate"], place) for place, group in enumerate(shown.values()) for row in group if row["impl"] == impl]
            if dots:
                panel.plot(*zip(*dots, strict=True), "o" if impl.startswith("ours") else "x", color=f"C{i % 10}", label=impl)
        if unit in top:
            panel.axvline(top[unit], ls="--", color="grey", lw=1)
        panel.set(xlabel=unit, xlim=(0, None), yticks=range(len(shown)), yticklabels=list(shown))
        panel.invert_yaxis()
        panel.tick_params(labelsize=7)
        panel.legend(fontsize=7)
    chart.tight_layout()
    chart.savefig(file, dpi=110)
    plt.close(chart)
