"""What every run needs and no algorithm cares about. Scripts call these with plain values; nothing here calls back.

    config.py   settings from TOML and the command line     run.py          folder, log, checkpoint, resume
    device.py   devices, seeds, precision                   optimizer.py    AdamW, learning rate
    cpu.py      what is done for CPUs, and why              distributed.py  several processes as one run
"""
from runtime.config import arguments, check_range, config_toml, fail, load_config
from runtime.cpu import AdamW
from runtime.device import compute_dtype, find_device, setup
from runtime.optimizer import adamw, check_finite, learning_rate
from runtime.run import (
    WRITTEN,
    Log,
    Profile,
    StopRequest,
    file_hash,
    load_state,
    open_folder,
    open_run,
    save_state,
    write_text,
    writing,
)

__all__ = ["WRITTEN", "AdamW", "Log", "Profile", "StopRequest", "adamw", "arguments", "check_finite", "check_range",
           "compute_dtype", "config_toml", "fail", "file_hash", "find_device", "learning_rate", "load_config", "load_state",
           "open_folder", "open_run", "save_state", "setup", "write_text", "writing"]
