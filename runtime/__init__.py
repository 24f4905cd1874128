"""What every run needs and no algorithm cares about; nothing here imports a file outside this folder.

    config.py       settings from TOML and the command line      run.py         a run's folder, and how far it is
    device.py       device, precision, seeds, Triton or not      checkpoint.py  what resuming needs
    optimizer.py    AdamW's groups, the learning rate            log.py         metrics, live line, wandb, profile
    distributed.py  several processes as one run                 files.py       writing that a kill cannot hurt
    cpu.py          what is done for CPUs, and why               json_files.py  JSON that somebody else has written
    terminal.py     closed pipes, other encodings, Ctrl-C        sandbox.py     strangers' programs, tried within limits
    serving.py      what both servers check
"""
from runtime.checkpoint import load_state, save_state
from runtime.config import (
    DataSettings,
    Settings,
    arguments,
    check_range,
    check_ranges,
    config_toml,
    fail,
    load_config,
    shown,
)
from runtime.cpu import AdamW
from runtime.device import compute_dtype, find_device, setup
from runtime.files import file_hash, lock_file, open_folder, read_cache, replacing, write_cache, write_text, writing
from runtime.log import Log, Sums
from runtime.optimizer import adamw, check_finite, learning_rate, set_learning_rate
from runtime.run import Run, StopRequest, open_run
