"""configs/zephyr-7b/sft.slurm with stand-ins for srun and scontrol: two nodes are two groups of processes here."""
import os
import signal
import socket
import subprocess
import sys
import time

import kills
import pytest
from conftest import ROOT, metrics_of

# One rank a node. Slurm's --signal reaches the ranks, not the script: srun's stand-in notes their process group.
SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=0 SLURM_NTASKS=2 setsid "$@" & pids+=($!)
done
echo "${pids[@]}" > "$NOTES/ranks"
code=0
for pid in "${pids[@]}"; do wait $pid || code=$?; done
exit $code
"""
SCONTROL = """#!/bin/bash
if [[ $1 == show ]]; then echo localhost; echo second; else echo "$@" >> "$NOTES/requeued"; fi
"""


@pytest.fixture
def slurm(tmp_path):
    """Start the script as sbatch would; the folder of notes."""
    commands, notes = tmp_path / "bin", tmp_path / "notes"
    commands.mkdir(), notes.mkdir(), kills.prepare(tmp_path)
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (commands / name).write_text(text)
        (commands / name).chmod(0o755)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}", "NOTES": str(notes), "OUT": str(tmp_path / "run"),
        "PYTHON": sys.executable, "SLURM_JOB_ID": "17", "SLURM_JOB_NODELIST": "n[1-2]", "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1"}

    def start(*words: str) -> subprocess.Popen:
        small = [f"model={tmp_path}/base", f"data={tmp_path}/sft.jsonl", "device=cpu", "dtype=float32", "threads=1",
                 "shard=1", "batch=4", "max_steps=60", "samples=0", *words]
        return subprocess.Popen(["bash", "configs/zephyr-7b/sft.slurm", *small], cwd=ROOT, env=environment,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start, notes


def test_a_job_that_runs_out_of_time_saves_is_queued_again_and_goes_on(slurm, tmp_path):
    start, notes = slurm
    job, deadline = start(), time.time() + 200
    while kills.lines_of(tmp_path / "run") < 2 and job.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    for pid in (notes / "ranks").read_text().split():
        os.kill(int(pid), signal.SIGTERM)
    said, _ = job.communicate(timeout=200)
    steps = len(metrics_of(tmp_path / "run"))
    assert job.returncode == 0 and f"stopped after step {steps}" in said and 2 <= steps < 60, said
    assert (notes / "requeued").read_text() == "requeue 17\n"
    again = start()
    said, _ = again.communicate(timeout=200)
    assert again.returncode == 0 and f"60 steps of 4 dialogues, {steps} done" in said, said
    assert (tmp_path / "run" / "model" / "config.json").is_file()
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == list(range(1, 61))
    assert (notes / "requeued").read_text() == "requeue 17\n"


def test_a_job_that_fails_is_not_queued_again(slurm, tmp_path):
    start, notes = slurm
    job = start("data=none.jsonl")
    said, _ = job.communicate(timeout=200)
    assert job.returncode == 2 and "none.jsonl: no such file" in said
    assert not (notes / "requeued").exists()
