"""The last screen of `make demo`: the table, three dialogues side by side, and what to type next.

    python -m benchmarks.demo --config configs/tiny/judge.toml seeds='[0]' out=runs/tiny/0/judge

Takes the settings of judge.py and runs it; what that prints goes to judge.txt in the same folder. While there is no
PPO model yet, the table is all.
"""
import json
import os
import sys
from contextlib import redirect_stdout
from itertools import zip_longest
from pathlib import Path
from textwrap import wrap

import judge
import runtime
from data.records import lines
from judging.report import text

SIDE_BY_SIDE = ("SFT", "SFT + DPO", "SFT + PPO")
WIDTH = 36  # of each column of a dialogue


def columns(cells: list[str]) -> list[str]:
    """Texts beside each other, each wrapped to its column."""
    wrapped = [[part for line in cell.split("\n") for part in wrap(line, WIDTH) or [""]] for cell in cells]
    rows = zip_longest(*wrapped, fillvalue="")
    return ["  " + "  ".join(f"{cell:<{WIDTH}}" for cell in row).rstrip() for row in rows]


def dialogues(data: Path, replies: Path, count: int = 3) -> list[str]:
    """The first questions, each of another task, to which SFT, DPO and PPO reply differently."""
    said: dict[str, dict[str, dict]] = {}
    for reply in lines(replies):
        said.setdefault(reply["id"], {})[reply["model"]] = reply["replies"][0]
    found, shown = [], set()
    for question in lines(data):
        first = [said[question["id"]][name] for name in SIDE_BY_SIDE]
        if len(shown) == count or question["category"] in shown or len({reply["text"] for reply in first}) < len(first):
            continue
        shown.add(question["category"])
        found += ["", *wrap(f"> {question['turns'][0]['user']}", 3 * WIDTH)]
        found += columns([f"{name}, gold {100 * reply['gold']:.0f}:\n{reply['text']}"
                          for name, reply in zip(SIDE_BY_SIDE, first, strict=True)])
    return found


def commands(run: Path) -> list[str]:
    python = os.path.relpath(sys.executable) if Path(sys.executable).is_relative_to(Path.cwd()) else "python"
    models = f'["DPO={run}/dpo/model", "idea=runs/idea/model"]'
    return ["Next: talk to it; train it with another beta, or a loss that you edited; compare the two.", "",
            f"  {python} chat.py model={run}/dpo/model",
            f"  {python} dpo.py --config {run}/dpo/config.toml beta=0.05 out=runs/idea",
            f"  {python} judge.py models='{models}' data={run}/data/dev.jsonl out=runs/idea/judge"]


def main(config: judge.Config) -> None:
    out = runtime.open_folder(config.out)
    with (out / "judge.txt").open("w") as file, redirect_stdout(file):
        judge.main(config)
    report = json.loads((out / "report.json").read_text())
    said = [text({"title": "The recipe in the tiny world", "about": {}, "sections": report["sections"][:1]})]
    if set(SIDE_BY_SIDE) <= set(report["gold"]):
        accuracy = json.loads((out.parent / "reward" / "report.json").read_text())["reward_model"]["accuracy"]
        said += [f"The reward model that PPO follows agrees with {100 * accuracy:.0f} % of held-out preferences.",
                 f"All tables and figures: {out}/report.html"]
        said += [*dialogues(Path(config.data), out / "replies.jsonl"), "", *commands(out.parent)]
    print("\n".join(said))


if __name__ == "__main__":
    main(runtime.load_config(judge.Config, __doc__))
