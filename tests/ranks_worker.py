"""Runs one after the other in one process, for tests/test_distributed.py: starting Python and PyTorch takes longer than they do.

    torchrun --nproc-per-node 2 tests/ranks_worker.py runs.json      [["sft", {config ...}, stop_after_step or 0], ...]
"""
import importlib
import json
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import ranks
import runtime


def run(script: str, values: dict, stop_after: int) -> None:
    """A script's main; after `stop_after` steps the last rank, and none but it, is asked to stop."""
    module, log_step = importlib.import_module(script), runtime.Log.step

    def step(log, number, metrics):
        log_step(log, number, metrics)
        if number == stop_after and ranks.rank() == ranks.world() - 1:
            os.kill(os.getpid(), signal.SIGTERM)

    runtime.Log.step = step
    try:
        module.main(module.Config(**values))
    finally:
        runtime.Log.step = log_step


if __name__ == "__main__":
    for planned in json.loads(Path(sys.argv[1]).read_text()):
        run(*planned)
