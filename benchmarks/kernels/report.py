"""What `python -m benchmarks.kernels` measured: rows of tables and a verdict, made from the saved rows alone.

A contest is all rows of one kernel, shape and pass. The best baseline of a contest is its fastest row that is neither
ours nor a floor. Ceilings are what the same run measured: GB/s of a copy, TFLOP/s of a large matmul.
"""
import tomllib
from pathlib import Path

TARGETS = tomllib.loads((Path(__file__).parent / "targets.toml").read_text())["targets"]


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


def value(target: dict, rows: list[dict]) -> float | None:
    """What was measured for a target; None if it was not."""
    held = {key: group for key, group in contests(rows).items() if key[0] in target["kernels"]
            and key[1] == target.get("shape", key[1]) and key[2] in target["passes"]}
    mine, measure = [ours(group) for group in held.values()], target["measure"]
    if not held or not all(mine):
        return None
    ms = sum(row["ms"] for row in mine)
    if measure == "ms":
        return ms
    if measure == "GiB extra":
        return max(row["extra_bytes"] for row in mine) / 2**30
    if measure == "x best baseline":
        others = [best(group) for group in held.values()]
        return sum(row["ms"] for row in others) / ms if all(others) else None
    if measure == "of ceiling":
        top = ceilings(rows)
        return min(row["rate"] / top[row["unit"]] for row in mine) if all(row["unit"] in top for row in mine) else None
    rate = sum(row["amount"] for row in mine) / ms / 1e9
    if measure == "TFLOP/s":
        return rate
    dense = value(target | {"shape": measure.removeprefix("of "), "measure": "TFLOP/s"}, rows)
    return rate / dense if dense else None


# ---------------------------------------------------------------------------------------------------------------- rows

def verdicts(rows: list[dict]) -> list[dict]:
    """The targets, and whether they were reached."""
    found = []
    for target in TARGETS:
        measured, measure, goal = value(target, rows), target["measure"], target["goal"]
        lower = measure in ("ms", "GiB extra")
        form = "{:.0%}" if measure.startswith("of ") else "{:.3g}"
        row = {"kernel": target["what"], "measure": measure, "found": None,
               "target": ("<= " if lower else ">= ") + form.format(goal), "verdict": "not measured"}
        if measured is not None:
            row["found"] = form.format(measured)
            row["verdict"] = "reached" if (measured <= goal if lower else measured >= goal) else "missed"
        found.append(row)
    return found


def gpu_verdicts(reports: list[dict]) -> list[dict]:
    """The targets on every GPU that was measured."""
    return [{"GPU": f"{report['device']}, torch {report['torch']}, Triton {report['triton']}"} | row
            for report in reports for row in verdicts(report["rows"])]


def summary(report: dict) -> list[dict]:
    """One row per contest: ours beside the best of the others."""
    top, found = ceilings(report["rows"]), []
    for (kernel, shape, name), held in contests(report["rows"]).items():
        mine, other = ours(held), best(held)
        if mine and other:
            found.append({"kernel": kernel, "shape": shape, "pass": "forward + backward" if name == "both" else name,
                          "ours": mine, "other": other, "share": mine["rate"] / top[mine["unit"]],
                          "ratio": other["ms"] / mine["ms"], "mib": mine["extra_bytes"] / 2**20,
                          "other_mib": other["extra_bytes"] / 2**20})
    return found


def builds(baseline: dict) -> list[dict]:
    """aot_baseline.json: what the newest Triton makes of our kernels, all variants of one together."""
    version = max(baseline, key=lambda name: [int(part) for part in name.split(".")])
    families: dict[str, list[dict]] = {}
    for name, by_sm in baseline[version].items():
        families.setdefault(name.split(",")[0], []).append(by_sm)
    rows = []
    for family, members in families.items():
        row = {"kernel": family, "builds": sum(map(len, members))}
        for sm in ("80", "90", "100"):
            found = [member[sm] for member in members if sm in member]
            spills = sum(f["spills"] for f in found)
            row[f"sm_{sm}"] = (f"{max(f['registers'] for f in found)} registers, "
                               f"{max(f['shared'] for f in found) / 1024:.0f} KiB"
                               + f", {spills} spills" * bool(spills) if found else None)
        rows.append(row | {"Triton": version})
    return rows


def lines(group: str, rows: list[dict], top: dict[str, float]) -> str:
    """Every row of a group, for the terminal; a ratio is the time of the best baseline over this one."""
    said = [f"== {group}"]
    for row in rows:
        line = "{kernel:<22} {shape:<24} {pass:<8} {impl:<26} ".format_map(row)
        if row["status"] != "ok" or "ms" not in row:
            said.append(line + f"{row['status']}: {row['reason']}")
            continue
        fastest, ceiling = best(contests(rows)[row["kernel"], row["shape"], row["pass"]]), top.get(row["unit"])
        said.append(line + "{ms:9.3f} ms {rate:8.3g} {unit}".format_map(row)
                    + (f" {row['rate'] / ceiling:.0%} of ceiling" if ceiling else "")
                    + (f", ratio {fastest['ms'] / row['ms']:.2f}" if fastest else "")
                    + f", {row['extra_bytes'] / 2**20:.1f} MiB extra")
    return "\n".join(said)
