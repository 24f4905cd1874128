"""Kill training runs at chosen moments, for the tests: what a killed run leaves must end as a run nobody disturbed.

A run is killed with SIGKILL, started again, killed again ... and compared when it ends: every file of its folder byte
by byte, apart from the metrics a clock decides. The kinds of moments take turns:

    anywhere        any time from its start           accumulating    within a step, after some of its micro-batches
    saving          while a checkpoint is written     epoch's edge    when the last step of an epoch is in the log
    file operation  before the k-th open for writing, rename or removal in its folder      rollout    while PPO samples

Nothing in the scripts helps: their folder is watched from outside, and an audit hook of the interpreter counts file
operations. A process forked from one that has imported PyTorch runs `script.py key=value ...` as a command would:
`python tests/kills.py` is that server of forks.
"""
import functools
import json
import os
import random
import resource
import runpy
import select
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import median

ROOT = Path(__file__).parent.parent
MOMENTS = ("anywhere", "saving", "accumulating", "epoch's edge", "file operation", "rollout")
COMMON = ["device=cpu", "threads=1", "dtype=float32", "save_every=2", "warmup_ratio=0", "batch=8"]
# Micro-batches of a dialogue or two, epochs of five steps. Dropout and an adapting coefficient are state too.
SETTINGS = {
    "sft": ["template=zephyr", "data={data}/sft.jsonl", "model={data}/base", "epochs=2", "micro_tokens=128",
            "samples=1", "eval_data={data}/pairs.jsonl", "eval_every=4", "lora_rank=4", "lora_dropout=0.1"],
    "dpo": ["data={data}/pairs.jsonl", "model={data}/sft", "epochs=2", "micro_tokens=128", "samples=0"],
    "reward": ["data={data}/pairs.jsonl", "model={data}/sft", "epochs=2", "micro_tokens=128",
               "eval_data={data}/pairs.jsonl"],
    "ppo": ["data={data}/pairs.jsonl", "model={data}/sft", "reward_model={data}/reward", "steps=10", "max_tokens=16",
            "micro_tokens=256", "min_eos=0", "kl_target=1", "kl_horizon=100", "snapshot_every=5"],
}
# Other ways to run them: the name begins with the script's.
SETTINGS |= {
    "sft asynchronous": [*SETTINGS["sft"], "lora_rank=0", "lora_dropout=0", "async_save=true"],
    "sft on two ranks": [*SETTINGS["sft"], "lora_rank=0", "lora_dropout=0", "shard=0"],
    "kto": ["data={data}/pairs.jsonl", "model={data}/sft", "epochs=2", "micro_tokens=128", "samples=0"],
    "distill": ["template=zephyr", "data={data}/sft.jsonl", "model={data}/sft", "epochs=2", "micro_tokens=128",
                "samples=0"],
    "dpo NF4": [*SETTINGS["dpo"], "lora_rank=4", "quantize=nf4", "lora_dropout=0.1"],
    "ppo LoRA": [*SETTINGS["ppo"], "lora_rank=4"],
}
STEPS_PER_EPOCH = 5


# --------------------------------------------------------------------- processes that start in no time

def serve() -> None:
    """Fork a process for every task on standard input, a line {"script", "words", "log", "folder", "die_at",
    "environment", "file_bytes"}, and print its id; for a line {"wait": id}, print how that process ended."""
    sys.path.insert(0, str(ROOT))
    # What takes the time; several ranks need the last.
    import distill, dpo, kto, ppo, reward, sft, torch._dynamo  # noqa: E401, F401, I001

    for line in sys.stdin:
        task = json.loads(line)
        if "wait" in task:
            print(os.waitstatus_to_exitcode(os.waitpid(task["wait"], 0)[1]), flush=True)
            continue
        child = os.fork()
        if child == 0:
            become(task)
        print(child, flush=True)


def become(task: dict) -> None:
    """Turn this process into the script."""
    code = 1
    try:
        os.setpgid(0, 0)
        os.environ.update(task["environment"])
        if task["file_bytes"]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (task["file_bytes"], resource.RLIM_INFINITY))
        log = os.open(task["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        null = os.open(os.devnull, os.O_RDONLY)
        for ours, theirs in ((null, 0), (log, 1), (log, 2)):
            os.dup2(ours, theirs)
        sys.argv = [task["script"], *task["words"]]
        if task["folder"]:
            count_operations(task["folder"], task["die_at"])
        runpy.run_path(str(ROOT / task["script"]), run_name="__main__")
        code = 0
    except SystemExit as left:
        code = left.code or 0
    except BaseException:  # as the interpreter does
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def count_operations(folder: str, die_at: int) -> None:
    """Die before operation number `die_at` (from 1) that changes a file of the folder.

    With die_at=0 count them instead, and write their number to FOLDER.operations.
    """
    seen, counter = 0, os.open(f"{folder}.operations", os.O_WRONLY | os.O_CREAT) if not die_at else -1

    def hook(event: str, args: tuple) -> None:
        nonlocal seen
        if event == "open":
            changes = isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
        else:
            changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        relative = event in ("os.remove", "os.rmdir") and args[1] >= 0  # rmtree's
        if not (changes and (relative or str(args[0]).startswith(folder))):
            return
        seen += 1
        if seen == die_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if not die_at:
            os.pwrite(counter, str(seen).encode(), 0)

    sys.addaudithook(hook)


class Server:
    """A process that forks others."""

    def __init__(self):
        self.process = subprocess.Popen([sys.executable, __file__], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)

    def ask(self, task: dict) -> int:
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, name: str, words: list[str], log: Path, folder: str = "", die_at: int = 0,
              environment: dict | None = None, file_bytes: int = 0) -> "Run":
        """Start a script with these words; `file_bytes` is the size its files may have, 0: any."""
        return Run(self, self.ask({"script": f"{name.split()[0]}.py", "words": words, "log": str(log), "folder": folder,
                                   "die_at": die_at, "environment": environment or {}, "file_bytes": file_bytes}))

    def start_ranks(self, name: str, words: list[str], log: Path, folder: str = "", die_at: int = 0,
                    others: tuple[str, ...] = ()) -> "list[Run]":
        """Two ranks without torchrun, which would end one when the other has failed; `others` are words for rank 1."""
        from torch.distributed import TCPStore

        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        found = []
        for rank in range(2):
            environment = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost",
                           "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
            found.append(self.start(name, [*words, *(others if rank else ())], log.with_name(f"{log.name}{rank}"),
                                    "" if rank else folder, 0 if rank else die_at, environment))
            found[-1].store = store  # lives as long as they do
        return found


@functools.cache
def shared_server() -> Server:
    """One for all tests of a process. It ends with the process: its standard input does."""
    return Server()


class Run:
    """A running script."""

    def __init__(self, server: Server, pid: int):
        self.server, self.pid, self.descriptor = server, pid, os.pidfd_open(pid)

    def ended(self, seconds: float = 0.0) -> bool:
        """Whether it has ended; waits at most this long for it."""
        return bool(select.select([self.descriptor], [], [], seconds)[0])

    def kill(self, kind: int = signal.SIGKILL) -> None:
        signal.pidfd_send_signal(self.descriptor, kind)

    def code(self) -> int:
        """Its exit code, or minus the signal that ended it."""
        found = self.server.ask({"wait": self.pid})
        os.close(self.descriptor)
        return found


class Ranks:
    """Two ranks as one run, of which a kill hits one, and what a dead rank leaves waiting after half a minute too."""

    def __init__(self, runs: list[Run], rng: random.Random):
        self.runs, self.rng = runs, rng

    def ended(self, seconds: float = 0.0) -> bool:
        deadline = time.monotonic() + seconds
        return all(run.ended(max(0.0, deadline - time.monotonic())) for run in self.runs)

    def kill(self) -> None:
        self.rng.choice(self.runs).kill()
        if not self.ended(30):
            for run in self.runs:
                run.kill()

    def code(self) -> int:
        codes = [run.code() for run in self.runs]
        return -signal.SIGKILL if -signal.SIGKILL in codes else max(codes, key=abs)


# ------------------------------------------------------------------------------------------ the moments

def written(run: Path) -> list[dict]:
    """The whole lines of its log."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]
    except OSError:
        return []


def lines_of(run: Path) -> int:
    try:
        return (run / "metrics.jsonl").read_bytes().count(b"\n")
    except OSError:
        return 0


def log_file(run: Path) -> int:
    """The inode of its log, 0 without one: another run of the script has another log."""
    try:
        return (run / "metrics.jsonl").stat().st_ino
    except OSError:
        return 0


def saving(run: Path) -> bool:
    """Whether its folder holds something half written."""
    return (run / "state" / ".new").exists() or any(run.glob(".*.new"))


def wait_for(process: Run, condition: Callable[[], bool]) -> bool:
    """Whether it came true before the process ended."""
    while not condition():
        if process.ended(0.0005):
            return False
    return True


def kill_at(moment: str, process: Run, run: Path, usual: dict[str, float], log_before: int,
            rng: random.Random) -> bool:
    """Kill the process at such a moment; False if it ended first."""
    if moment == "anywhere":
        process.ended(rng.uniform(0, usual["run"]))
    elif moment == "saving":
        for _ in range(rng.randint(1, 3)):  # the first it meets, or a later one
            wait_for(process, lambda: not saving(run))
            wait_for(process, lambda: saving(run))
    elif moment == "file operation":  # it kills itself
        if not process.ended(10 * usual["run"]):
            raise RuntimeError(f"the run in {run} did not end")
    elif wait_for(process, lambda: log_file(run) not in (0, log_before)):  # from here on the log's lines are its own
        goal = lines_of(run) + rng.randint(1, 3)
        if moment == "epoch's edge":
            goal = (lines_of(run) // STEPS_PER_EPOCH + 1) * STEPS_PER_EPOCH
        if wait_for(process, lambda: lines_of(run) >= goal):
            part = {"accumulating": usual["step"], "rollout": usual["rollout"], "epoch's edge": 0.002}[moment]
            process.ended(rng.uniform(0.1, 0.9) * part)
    process.kill()
    return process.code() == -signal.SIGKILL


# ------------------------------------------------------------------------------------------ the comparison

def same_folders(one: Path, other: Path) -> str:
    """The first difference between two finished runs, "" if there is none."""
    def files(folder: Path) -> set[str]:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        return found - {"config.toml"}  # it names the folder

    if files(one) != files(other):
        return f"files: {sorted(files(one) ^ files(other))}"
    for name in sorted(files(one) - {"metrics.jsonl"}):
        if (one / name).read_bytes() != (other / name).read_bytes() and not same_tensors(one / name, other / name):
            return f"{name} differs"
    logs = [[{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in written(run)]
            for run in (one, other)]
    wrong = [a.get("step") for a, b in zip(*logs, strict=False) if a != b]
    if wrong:
        return f"step {wrong[0]} of the log differs"
    return "" if len(logs[0]) == len(logs[1]) else "the logs differ in length"


def same_tensors(one: Path, other: Path) -> bool:
    """Two ranks' files of a checkpoint, whose headers have no fixed order: whether they hold the same, bit for bit."""
    if not one.name.startswith("shard-"):
        return False
    from safetensors.torch import load_file

    ours, theirs = load_file(one), load_file(other)
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def start(server: Server, name: str, words: list[str], run: Path, rng: random.Random, die_at: int = -1) -> Run | Ranks:
    """The run of that name in the folder; die_at as count_operations has it, -1: nothing is counted."""
    arguments = name, [*words, f"out={run}"], run.with_suffix(".log"), str(run) if die_at >= 0 else "", max(0, die_at)
    return Ranks(server.start_ranks(*arguments), rng) if "two ranks" in name else server.start(*arguments)


def undisturbed(server: Server, script: str, words: list[str], run: Path) -> dict[str, float]:
    """Run it to the end: the seconds of the run, a step and a rollout, and the number of its file operations."""
    began = time.perf_counter()
    process = start(server, script, words, run, random.Random(0), 0)
    process.ended(600)
    seconds = time.perf_counter() - began
    if process.code() != 0:
        raise RuntimeError(f"{script} did not run: {[log.read_text() for log in run.parent.glob(f'{run.stem}.log*')]}")
    lines = written(run)
    kind = next(kind for kind in ("pairs", "replies", "tokens") if f"{kind}_per_s" in lines[0])
    return {"run": seconds, "step": median(line[kind] / line[f"{kind}_per_s"] for line in lines),
            "rollout": median(line["tokens"] / line.get("sampling_tokens_per_s", 1e9) for line in lines),
            "operations": int(Path(f"{run}.operations").read_text())}


def trial(server: Server, script: str, words: list[str], kills: int, seed: int, folder: Path,
          moments: tuple[str, ...] = MOMENTS) -> dict:
    """Kill a run `kills` times; whenever it ends before that, start another one.

    Returns the kills by moment, the number of runs that ended, and how they differ from the undisturbed one.
    """
    rng = random.Random(f"{script} {seed}")
    whole, run = (folder / f"{script}_{state}".replace(" ", "_") for state in ("whole", "broken"))
    usual = undisturbed(server, script, words, whole)
    kinds = [moment for moment in moments if moment != "rollout" or script.startswith("ppo")]
    hit, differences, runs, half = Counter(), [], 0, 0
    while runs == 0 or sum(hit.values()) < kills or run.exists():
        moment = kinds[sum(hit.values()) % len(kinds)] if sum(hit.values()) < kills else ""
        before = log_file(run)
        at = rng.randint(1, int(usual["operations"])) if moment == "file operation" else -1
        process = start(server, script, words, run, rng, at)
        if moment and kill_at(moment, process, run, usual, before, rng):
            hit[moment] += 1
            half += moment == "saving" and saving(run)
            continue
        if not moment:
            process.ended(600)
        code = 0 if moment else process.code()
        said = "".join(log.read_text().strip()[-300:] for log in run.parent.glob(f"{run.name}.log*")) if code else ""
        found = f"it left with code {code}: {said}" if code else same_folders(whole, run)
        differences += [f"after {dict(hit)}: {found}"] if found else []
        runs += 1
        shutil.rmtree(run, ignore_errors=True)
    return {"script": script, "kills": sum(hit.values()), "moments": dict(hit), "half_written": half, "runs": runs,
            "seconds": round(usual["run"], 2), "differences": differences}


# ------------------------------------------------------------------------------------- what they train on

def prepare(folder: Path) -> None:
    """A small random model with the tiny world's tokenizer, one with a template, a reward model; demonstrations and
    pairs. The last step of an epoch is smaller than the others."""
    from conftest import write_jsonl

    from checkpoints import save_model
    from data.tiny.world import demonstrate, dialogue
    from data.tokenizer import load_tokenizer
    from model import ModelConfig, Transformer, add_score_head, init_weights

    tokenizer, rng = load_tokenizer(ROOT / "data" / "tiny" / "base"), random.Random(0)
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, width=32, layers=2, heads=4, kv_heads=2,
                                    head_dim=8, mlp_width=64))
    init_weights(model, 0)
    save_model(model, folder / "base", tokenizer)
    tokenizer.adopt("zephyr")
    save_model(model, folder / "sft", tokenizer)
    save_model(add_score_head(model, 0), folder / "reward", tokenizer)
    demos = [demonstrate(dialogue(rng), rng, "careful")[:2] for _ in range(8 * STEPS_PER_EPOCH - 3)]
    write_jsonl(folder / "sft.jsonl", [{"messages": messages} for messages in demos])
    write_jsonl(folder / "pairs.jsonl", [
        {"prompt": ask["content"], "chosen": reply["content"], "rejected": f"No. {reply['content'][:20]}",
         "margin": 1 + i % 4} for i, (ask, reply) in enumerate(demos)])


def words_for(script: str, data: Path) -> list[str]:
    """The command line of a script, without out=."""
    return [*COMMON, *(word.replace("{data}", str(data)) for word in SETTINGS[script])]


if __name__ == "__main__":
    serve()
