"""What resuming needs: run/state/step_N, safetensors of everything the next step depends on."""
import os
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from runtime import distributed
from runtime.config import fail
from runtime.cpu import AdamW
from runtime.files import sync_folder, writing


def save_state(run: Path, step: int, model: nn.Module, optimizer: AdamW, later: bool = False) -> Future | None:
    """Everything the next step depends on, after `step` updates. Data order is a function of the step.

    Safetensors in any case: one file, or with several ranks a file of each with its share. Written beside, synced to
    disk and renamed, so that it counts once it is durable. `later`: a copy is written while training goes on; the
    Future returned ends with it, and raises what this function would have if it fails.
    """
    folder = run / "state" / f"step_{step}"
    beside = run / "state" / ".new"
    distributed.reshard(model)
    tensors = _random_state()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            tensors[f"model.{name}"] = parameter.detach()
            for key, value in optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
    with writing(folder, together=True):
        if distributed.rank() == 0:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
    distributed.barrier()
    if not later:
        return _write(folder, beside, tensors)
    copies = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}
    thread = ThreadPoolExecutor(1)
    writes = thread.submit(_write, folder, beside, copies, distributed.another_group())
    thread.shutdown(wait=False)
    return writes


def _write(folder: Path, beside: Path, tensors: dict[str, torch.Tensor], group=None) -> None:
    """Fill the folder beside and, when it is safe on disk, give it its name."""
    with writing(folder, beside, together=True):
        if distributed.world_size() == 1:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, beside / "state.safetensors")
            with (beside / "state.safetensors").open("rb") as stream:
                os.fsync(stream.fileno())
        else:
            distributed.save_sharded(tensors, beside, group)
        if distributed.rank() == 0:
            sync_folder(beside)
            os.replace(beside, folder)
            sync_folder(folder.parent)
    _remove_older(folder)


def load_state(run: Path, model: nn.Module, optimizer: AdamW) -> int:
    """Restore the newest state, saved by however many ranks; the number of updates done, 0 when there is none."""
    folder = run / "state"
    try:
        states = sorted((int(path.name[5:]), path) for path in (run / "state").glob("step_*"))
        if not states:
            return 0
        step, folder = states[-1]
        tensors = {}
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for name, parameter in trained.items():
            tensors[f"model.{name}"] = parameter.detach()
            tensors[f"step.{name}"] = torch.zeros((), device=parameter.device)
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = torch.zeros_like(parameter, requires_grad=False)
        random = distributed.load_sharded(tensors, folder, _random_state())
        for name, parameter in trained.items():
            optimizer.state[parameter] = {key: tensors[f"{key}.{name}"] for key in ("step", "exp_avg", "exp_avg_sq")}
        for name, state in random.items():  # a new rank has none: it keeps its seed
            (torch.cuda if name.startswith("cuda") else torch).set_rng_state(state)
        _remove_older(folder)  # one that a kill had left
    except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
        fail(f"{folder}: cannot be resumed ({' '.join(str(error).split())}): choose another out=, or overwrite=true")
    return step


def _remove_older(folder: Path) -> None:
    for older in folder.parent.glob("step_*") if distributed.rank() == 0 else ():
        if older != folder:
            shutil.rmtree(older)


def _random_state() -> dict[str, torch.Tensor]:
    of = f".{distributed.rank()}" if distributed.rank() else ""
    cuda = {f"cuda_rng{of}": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {}
    return {f"torch_rng{of}": torch.get_rng_state()} | cuda
