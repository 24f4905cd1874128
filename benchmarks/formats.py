"""What data.formats makes of a folder of data sets: each file's format, its records in, used and rejected, by reason.

    python -m benchmarks.formats data=FOLDER        benchmarks/results/formats.json and formats.md, in seconds

used: records of the file that gave at least one record of ours; out: records they gave (a tree of messages gives many). A
reject is a record or, in one that is used, a part of it.
"""
from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import runtime
from data.formats import FORMATS, read

SUFFIXES = (".json", ".jsonl", ".csv", ".txt")


@dataclass(frozen=True)
class Config:
    data: str                                # folder of data files, searched to any depth
    out: str = "benchmarks/results/formats"  # of the files, without .json and .md

    def __post_init__(self):
        if not Path(self.data).is_dir():
            runtime.fail(f"data={self.data}: is no folder, expected one of data files")


def measure(path: Path, name: str) -> dict:
    records, report = read(path)
    for _ in records:
        pass
    return {"file": name, "format": report.native or None, "form": report.format or None, "in": report.read, "used": report.used,
            "out": report.out, "rejects": dict(report.kinds.most_common())}


def main(config: Config) -> None:
    folder = Path(config.data)
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.name.removesuffix(".gz").endswith(SUFFIXES))
    if not files:
        runtime.fail(f"data={config.data}: holds none of {', '.join(SUFFIXES)}, expected data files")
    rows = [measure(path, str(path.relative_to(folder))) for path in files]
    total = {"files": len(rows), "formats": len({row["format"] for row in rows}), "of": len(FORMATS),
             **{key: sum(row[key] for row in rows) for key in ("in", "used", "out")}}
    summary = "{files} files, {formats} of the {of} formats: {in:,} records in, {used:,} used, {out:,} out".format(**total)
    lines = ["# Data files read", "", f"`python -m benchmarks.formats data=FOLDER`: {summary}", "",
             "| file | format | form | in | used | out | rejects |", "|---|---|---|---:|---:|---:|---|"]
    for row in rows:
        rejects = ", ".join(f"{count} {kind}" for kind, count in row["rejects"].items())
        lines.append(f"| {row['file']} | {row['format']} | {row['form']} | {row['in']} | {row['used']} | {row['out']} | {rejects} |")
    print("\n".join(lines[4:]) + f"\n{summary}")
    report = {"command": "python -m benchmarks.formats", **total, "rows": rows}
    runtime.write_text(Path(config.out + ".json"), json.dumps(report, indent=1) + "\n")
    runtime.write_text(Path(config.out + ".md"), "\n".join(lines) + "\n")
    print(f"wrote {config.out}.json and {config.out}.md")


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
