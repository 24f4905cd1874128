"""The last screen of `make demo`, which adds what to type next: the table, and three dialogues side by side.

    python -m benchmarks.demo --config configs/tiny/judge.toml seeds='[0]' out=runs/tiny/0/judge

Takes the settings of judge.py and runs it; what that prints goes to judge.txt in the same folder. While there is no
PPO model yet, the table is all.
"""
import json
from contextlib import redirect_stdout

import judge
import runtime
from judging.report import text


def main(config: judge.Config) -> None:
    out = runtime.open_folder(config.out)
    with (out / "judge.txt").open("w") as file, redirect_stdout(file):
        judge.main(config)
    report = json.loads((out / "report.json").read_text())
    said = [text({"title": "The recipe in the tiny world", "about": {}, "sections": report["sections"][:1]})]
    if "SFT + PPO" in report["gold"]:
        accuracy = json.loads((out.parent / "reward" / "report.json").read_text())["reward_model"]["accuracy"]
        said += [f"The reward model that PPO follows agrees with {100 * accuracy:.0f} % of held-out preferences.",
                 f"All tables and figures: {out}/report.html. Three dialogues, the gold score before each reply:",
                 (out / "samples.txt").read_text()]
    print("\n".join(said))


if __name__ == "__main__":
    main(runtime.load_config(judge.Config, __doc__))
