"""Write the README's tables from the committed result files: `python -m benchmarks.readme`. A test checks that they match."""
from __future__ import annotations

import json
from pathlib import Path

from benchmarks.kernels.report import build_table, summary_table, verdict_table
from judging.gold import interval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
BUILDS = ROOT / "benchmarks" / "kernels" / "aot_baseline.json"


def tiny_table(report: dict) -> str:
    """The recipe's models: gold score over seeds, and what stands behind it."""
    lines = ["| model | gold score | by seed | wins vs SFT | Elo | first turn | follow-ups | ended turns | words |",
             "|---|---|---|---|---|---|---|---|---|"]
    elo = {row[0]: row[3]["value"] for s in report["sections"] if s["title"] == "gold: ratings" for row in s["rows"]}
    for name, m in report["gold"].items():
        seeds = " ".join(f"{g:.1f}" for g in m["gold_by_seed"].values())
        lines.append(f"| {name} | **{m['gold']:.1f}** ± {m['gold_interval']:.1f} | {seeds} | {m['win_rate']:.1f} % | {elo[name]:.0f} "
                     f"| {m['first_turn']:.1f} | {m['follow_up']:.1f} | {m['ended']:.1f} % | {m['words']:.1f} |")
    return "\n".join(lines)


def category_table(report: dict) -> str:
    """Gold score by task."""
    tasks = list(next(iter(report["gold"].values()))["category"])
    lines = ["| model | " + " | ".join(task.replace("_", " ") for task in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    lines += [f"| {name} | " + " | ".join(f"{m['category'][task]:.0f}" for task in tasks) + " |" for name, m in report["gold"].items()]
    return "\n".join(lines)


def throughput_table(report: dict) -> str:
    """SFT and DPO beside the floor of their matmuls."""
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}.", "",
             "| model | work | compute | rate | floor of its matmuls | share |", "|---|---|---|---|---|---|"]
    lines += [f"| {r['shape']} | {r['work']} | {r['dtype']} | {r['rate']:,.{1 if r['rate'] < 100 else 0}f} {r['unit']} "
              f"| {r['floor_rate']:,.{1 if r['floor_rate'] < 100 else 0}f} | {100 * r['share_of_floor']:.0f} % |" for r in report["rows"]]
    return "\n".join(lines)


def family_table(report: dict) -> str:
    """Our families beside transformers."""
    lines = ["| family | largest logit difference | greedy tokens equal | texts tokenized alike | dialogues rendered alike |",
             "|---|---|---|---|---|"]
    for name, row in report["families"].items():
        greedy, texts, chats = (f"{equal} of {count}" if count else "template not among ours"
                                for equal, count in (row["greedy"], row["encode"], row["chat"]))
        lines.append(f"| {name} | {row['logits']:.1e} | {greedy} | {texts} | {chats} |")
    return "\n".join(lines)


def memory_table(report: dict) -> str:
    """What training takes, by arithmetic, and the arithmetic beside a real run."""
    ways = list(dict.fromkeys(row["way"] for row in report["models"]))
    lines = ["| GB | " + " | ".join(ways) + " |", "|---" * (len(ways) + 1) + "|"]
    for name in dict.fromkeys(row["model"] for row in report["models"]):
        together = {row["way"]: row["together"] for row in report["models"] if row["model"] == name}
        lines.append(f"| {name} | " + " | ".join(f"{together[way] / 1e9:.1f}" for way in ways) + " |")
    off = [row["peak_bytes"] / row["told_bytes"] for row in report["check"]]
    lines += ["", "Peak of a real run, of a model of 0.1 B in fp32, full and with adapters, with checkpointing and without: "
              f"{min(off):.2f} to {max(off):.2f} times what this arithmetic says."]
    return "\n".join(lines)


def rlhf_table(report: dict) -> str:
    """Reward model and PPO over seeds."""
    r = report["reward_model"]
    lines = ["| held-out pairs | all | " + " | ".join(f"margin {m}" for m in r["by_margin"]) + " |"]
    lines.append("|---" * (2 + len(r["by_margin"])) + "|")
    rows = (("reward model", f"**{100 * r['accuracy']:.1f}** ± {100 * r['interval']:.1f}", r["by_margin"]),
            ("log-probability per token of the SFT model", f"{100 * r['baseline']:.1f}", r["baseline_by_margin"]))
    lines += [f"| {name}, % right | {all_} | " + " | ".join(f"{100 * share:.1f}" for share, _ in margins.values()) + " |"
              for name, all_, margins in rows]
    lines += ["", "| PPO, last five steps | score | KL, nats a reply | length | ended |", "|---|---|---|---|---|"]
    for key, name in (("ppo", "KL coefficient 0.2"), ("ppo_without_kl", "KL coefficient 0")):
        p = report[key]
        lines.append(f"| {name}, {p['steps']} steps | {p['score_at_first']:.2f} → {p['score'][0]:.2f} ± {p['score'][1]:.2f} "
                     f"| {p['kl'][0]:.2f} ± {p['kl'][1]:.2f} | {p['length'][0]:.1f} | {100 * p['eos_rate'][0]:.1f} % |")
    return "\n".join(lines)


def sampling_table(report: dict) -> str:
    """Sampling beside its floor, and a PPO step by phase."""
    lines = [f"{report['device']}, {report['threads']} threads, torch {report['torch']}; tokens a second, and share of the floor.", "",
             "| model | compute | " + " | ".join(f"batch {b}" for b in dict.fromkeys(r["batch"] for r in report["rows"])) + " |"]
    lines.append("|---" * lines[-1].count(" | ") + "|---|")
    for shape, dtype in dict.fromkeys((r["shape"], r["dtype"]) for r in report["rows"]):
        rates = [f"{r['tokens_per_s']:,.0f} ({100 * r['share_of_floor']:.0f} %)" for r in report["rows"]
                 if (r["shape"], r["dtype"]) == (shape, dtype)]
        lines.append(f"| {shape} | {dtype} | " + " | ".join(rates) + " |")
    p = report["ppo"]
    lines += ["", f"A PPO step of {p['batch']} prompts and {p['tokens']:,.0f} sampled tokens takes {p['sampling']:.2f} s to sample, "
              f"{p['scoring']:.2f} s to score with four models, {p['updating']:.2f} s to update two."]
    return "\n".join(lines)


def loading_table(report: dict) -> str:
    """Peak of loading over what is loaded."""
    found = ", ".join(f"{way} {row['peak_bytes'] / row['weight_bytes']:.2f}" for way, row in report["ways"].items())
    return f"Loading a checkpoint of 2 GB peaks at this multiple of the model that results: {found} (`{report['command']}`)."


def screen_table(report: dict) -> str:
    """The judges on trial, on one screen."""
    section = next(s for s in report["sections"] if s["title"] == "The judges on trial")

    def shown(cell) -> str:
        if isinstance(cell, dict):
            return f"{cell['value']:.1f} [{cell['low']:.1f}, {cell['high']:.1f}]"
        return "-" if cell is None else cell if isinstance(cell, str) else f"{cell:,.0f}" if cell == int(cell) else f"{cell:.1f}"

    lines = ["| " + " | ".join(section["columns"]) + " |", "|---" * len(section["columns"]) + "|"]
    return "\n".join(lines + ["| " + " | ".join(map(shown, row)) + " |" for row in section["rows"]])


def ablation_table(report: dict) -> str:
    """Mean and 95 % interval over seeds of every measure, by condition."""
    points = report["points"]
    measures = [m for m in points[0] if m not in ("condition", "seed")]
    heads = {"gold": "gold score", "accuracy": "reward model, % right",
             "agreement": "two annotators agree, %", "cannot tell": "the second cannot tell, %"}
    lines = ["|  | " + " | ".join(heads.get(m, m) for m in measures) + " |", "|---" * (len(measures) + 1) + "|"]
    for condition in dict.fromkeys(p["condition"] for p in points):
        found = [interval([p[m] for p in points if p["condition"] == condition]) for m in measures]
        cells = [f"{mean:,.0f}" if half == 0 else f"{mean:,.1f} ± {half:.1f}" for mean, half in found]
        lines.append(f"| {condition} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def rounds_table(report: dict) -> str:
    """Mean and 95 % interval over seeds of what each round measured."""
    rows = {"SFT model": [r[0] for r in report["rounds"].values()]}
    rows |= {f"round {n}": [r[n] for r in report["rounds"].values()] for n in range(1, len(next(iter(report["rounds"].values()))))}
    rows["all prompts at once"] = [r[1] for r in report["at once"].values()]
    measures = {"gold score": lambda r: r["gold"], "words": lambda r: r["words"], "preferences": lambda r: r["preferences"],
                "annotators agree, %": lambda r: 100 * r["agreement"]["raw"], "kappa": lambda r: r["agreement"]["kappa"],
                "reward model right, %": lambda r: 100 * r["reward_accuracy"]}
    lines = ["|  | " + " | ".join(measures) + " |", "|---" * (len(measures) + 1) + "|"]
    for name, found in rows.items():
        cells = []
        for measure, of in measures.items():
            if "agreement" not in found[0] and measure not in ("gold score", "words"):
                cells.append("-")
                continue
            digits = {"kappa": 2, "preferences": 0}.get(measure, 1)
            middle, half = interval([of(r) for r in found])
            cells.append(f"{middle:,.{digits}f} ± {half:.{digits}f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


PEERS_WORK = {"sft": "SFT", "dpo": "DPO, reference cached", "dpo online": "DPO, reference in the step",
              "dpo dialogues": "DPO, four rated turns", "reward": "reward model", "reward dialogues": "reward model, four rated turns",
              "rloo": "RLOO", "qlora": "QLoRA, NF4", "sample mixed": "sampling 192 replies of 8 to 128 tokens"}


def peers_table(report: dict) -> str:
    """Ours beside the peers' fastest mode, and a step written by hand."""
    rows = report["rows"]
    lines = [f"{report['device']}, {report['cores']} cores; ours: {report['ours']}; peers: {report['peers']}.", "",
             "| model | work | ours | peers, fastest mode | ratio, rounds | floor | peak MiB | import s | first step s |",
             "|---|---|---|---|---|---|---|---|---|"]

    def rate(row: dict) -> str:
        return f"{row['rate']:,.{0 if row['rate'] >= 100 else 1}f}"

    for shape, task in dict.fromkeys((row["shape"], row["task"]) for row in rows):
        sides = {row["side"]: row for row in rows if (row["shape"], row["task"]) == (shape, task)}
        ours, theirs = sides["ours"], max((r for side, r in sides.items() if side.startswith("T")), key=lambda r: r["rate"])
        floors = [row for side, row in sides.items() if side.startswith("floor")]
        floor = rate(max(floors, key=lambda row: row["rate"])) if floors else ""
        way = "temperature and top-p" if task.endswith("top_p") else "greedy"
        name = PEERS_WORK.get(task) or f"sampling, batch {task.split()[1]}, {way}"
        ratios = sorted(a / b for a, b in zip(ours["rates"], theirs["rates"], strict=True))
        mode = theirs["side"].removeprefix("TRL, ").removeprefix("Transformers, ")
        costs = [f"{ours[key]:,.{digits}f} : {theirs[key]:,.{digits}f}"
                 for key, digits in (("peak_mib", 0), ("import_s", 1), ("first_step_s", 1))]
        lines.append(f"| {shape} | {name} | {rate(ours)} {ours['unit']} | {rate(theirs)} ({mode}) "
                     f"| **{ours['rate'] / theirs['rate']:.1f}**, {ratios[0]:.1f} to {ratios[-1]:.1f} | {floor} | {' | '.join(costs)} |")
    return "\n".join(lines)


def kills_table(report: dict) -> str:
    """How often each script was killed, when, and whether the finished runs were those of an undisturbed one."""
    moments = list(dict.fromkeys(moment for row in report["scripts"] for moment in row["moments"]))
    lines = ["| script | kills | " + " | ".join(moments) + " | runs that ended | unlike the undisturbed one |"]
    lines.append("|---" * (len(moments) + 4) + "|")
    for row in report["scripts"]:
        cells = [str(row["moments"].get(moment, "")) for moment in moments]
        lines.append(f"| {row['script']}.py | {row['kills']} | {' | '.join(cells)} | {row['runs']} | {len(row['differences'])} |")
    return "\n".join(lines)


# UltraChat-200k is 272 steps of 512 rows of 2,048 tokens when packed (huggingface/alignment-handbook, pull request 31); UltraFeedback
# has 61,135 training pairs, learnt in three epochs (Tunstall et al. 2023); 16 A100 for four hours: the talk.
ULTRACHAT_TOKENS, ULTRAFEEDBACK_PAIRS, DPO_EPOCHS, TALK_HOURS = 272 * 512 * 2048, 61135, 3, 16 * 4


def peers_gpu_table(report: dict) -> str:
    """The 7B rows, and what the Zephyr recipe would cost at these rates."""
    if not report:
        return "No GPU has run these yet: `python -m benchmarks.peers device=cuda` measures them (`peers=` without TRL)."
    lines = [f"{report['device']}; ours: {report['ours']}; peers: {report['peers'] or 'none'}.", "",
             "| model | work | side | rate | TFLOP/s | MFU | peak GiB | ours is faster by |", "|---|---|---|---|---|---|---|---|"]
    ours = {}
    for row in report["rows"]:
        name, task = PEERS_WORK.get(row["task"], row["task"]), (row["shape"], row["task"])
        if "error" in row:
            lines.append(f"| {row['shape']} | {name} | {row['side']} | {row['error']} | | | | |")
            continue
        if row["side"] == "ours":
            ours[task] = row
        tflops, peak = row.get("tflops"), report["peak_tflops"]
        cells = [f"{row['rate']:,.{0 if row['rate'] >= 100 else 1}f} {row['unit']}", f"{tflops:.0f}" if tflops else "",
                 f"{100 * tflops / peak:.0f} %" if tflops and peak and row["task"] != "qlora" else "", f"{row['peak_mib'] / 1024:.1f}",
                 "" if row["side"] == "ours" or task not in ours else f"{ours[task]['rate'] / row['rate']:.2f}"]
        lines.append(f"| {row['shape']} | {name} | {row['side']} | {' | '.join(cells)} |")
    if ("7 B, chat", "sft") in ours and ("7 B, pairs", "dpo") in ours:
        sft, dpo = ours["7 B, chat", "sft"], ours["7 B, pairs", "dpo"]
        chat = ULTRACHAT_TOKENS / sft["rate"] / 3600
        pairs = ULTRAFEEDBACK_PAIRS * (DPO_EPOCHS / dpo["rate"] + dpo["reference_s"]) / 3600
        lines += ["", f"At these rates Zephyr's recipe takes {chat + pairs:.1f} GPU-hours: SFT on UltraChat-200k {chat:.1f}, "
                  f"three epochs of DPO on UltraFeedback {pairs:.1f}. The talk: four hours on 16 A100, {TALK_HOURS}."]
    return "\n".join(lines)


ABLATIONS = ("sft_size", "sft_length", "task_mix", "annotator_noise", "weak_preferences")
TABLES = {"peers": (peers_table, "peers.json"), "peers_gpu": (peers_gpu_table, "peers_gpu.json"), "rounds": (rounds_table, "rounds.json"),
          "kills": (kills_table, "kills.json"),
          **{name: (ablation_table, f"ablations/{name}.json") for name in ABLATIONS},
          "trial": (screen_table, "trial/report.json"), "recorded": (screen_table, "recorded/report.json"),
          "tiny": (tiny_table, "tiny/report.json"), "categories": (category_table, "tiny/report.json"),
          "throughput": (throughput_table, "throughput.json"), "families": (family_table, "families.json"),
          "memory": (memory_table, "memory.json"), "loading": (loading_table, "loading.json"),
          "kernels_builds": (build_table, BUILDS), "kernels_gpu": (verdict_table, RESULTS / "kernels"),
          "kernels_cpu": (summary_table, "kernels/cpu.json"),
          "rlhf": (rlhf_table, "tiny/rlhf.json"), "sampling": (sampling_table, "sampling.json")}


def read(file: Path) -> dict | list[dict]:
    """A result file, empty if a GPU has yet to write it; of a folder all that a GPU wrote."""
    if file.is_dir():
        return [json.loads(part.read_text()) for part in sorted(file.glob("*.json")) if part.name != "cpu.json"]
    return json.loads(file.read_text()) if file.is_file() or not file.stem.endswith("_gpu") else {}


def filled(text: str) -> str:
    """The README with every part between <!-- NAME --> and <!-- /NAME --> made anew."""
    for name, (table, file) in TABLES.items():
        start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
        before, _, rest = text.partition(start)
        _, _, after = rest.partition(end)
        text = f"{before}{start}\n{table(read(RESULTS / file))}\n{end}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print(f"wrote the tables of {readme}")
