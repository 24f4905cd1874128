"""Runs one after the other in one process, for tests/test_distributed.py.

Starting Python and PyTorch takes longer than they do.

    torchrun --nproc-per-node 2 tests/distributed_worker.py runs.json

runs.json is [["sft", {config ...}, stop_after_step or 0], ...].
"""
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import lora
import runtime
from checkpoints import save_model
from data.tokenizer import adopt_template, load_tokenizer
from model import add_score_head
from runtime import distributed

WATCHED = {"folder": "", "changed": []}  # a run's, and what another rank than 0 has done to its files


def watch(event: str, args: tuple) -> None:
    """Into a checkpoint that is being written each rank puts its share."""
    writes = event == "open" and isinstance(args[2], int) and args[2] & (os.O_WRONLY | os.O_RDWR)
    if distributed.rank() and (writes or event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")):
        path, checkpoint = str(args[0]), f"{WATCHED['folder']}/state/.new"
        allowed = path.startswith(f"{checkpoint}/shard") if writes else event == "os.mkdir" and path == checkpoint
        if path.startswith(WATCHED["folder"]) and not allowed:
            WATCHED["changed"].append((event, path))


def read_and_write(values: dict) -> None:
    """Shard models, with a chat template, and write them again, in files of 20 kB (or one tensor); with HSDP as reward
    models."""
    device = runtime.setup("cpu", 0)
    for path in values["models"]:
        settings = runtime.Settings(shard=values["shard"])
        model = lora.load_base(path, settings, device)
        adopt_template(model, load_tokenizer(path), "chatml")
        model = add_score_head(model, 0) if settings.shard else model
        out = Path(values["out"]) / f"{Path(path).name}_{values['shard']}"
        save_model(lora.shard(model, settings, device), out, shard_bytes=20_000)


def run(script: str, values: dict, stop_after: int) -> None:
    """A script's main; after `stop_after` steps the last rank, and none but it, is asked to stop."""
    if script == "read_and_write":
        return read_and_write(values)
    module, log_step = importlib.import_module(script), runtime.Log.step

    def step(log, number, metrics):
        log_step(log, number, metrics)
        if number == stop_after and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    runtime.Log.step, WATCHED["folder"] = step, values["out"]
    try:
        module.main(module.Config(**values))
    finally:
        runtime.Log.step = log_step
    assert not WATCHED["changed"], f"{script}: rank {distributed.rank()} has changed {WATCHED['changed']}"


if __name__ == "__main__":
    sys.addaudithook(watch)
    for planned in json.loads(Path(sys.argv[1]).read_text()):
        run(*planned)
