"""The optimizer, its learning rate, and the check that what it is given is finite."""
import math

from torch import nn

from runtime import distributed
from runtime.config import Settings, fail
from runtime.cpu import AdamW


def adamw(
    model: nn.Module, lr: float, weight_decay: float, beta2: float = 0.999, lora_plus: float = 1.0, eps: float = 1e-8,
) -> AdamW:
    """An optimizer of the trainable parameters; norms and biases are not decayed.

    A group's rate is "scale" times the step's; LoRA's B matrices learn `lora_plus` times as fast (Hayou et al. 2024,
    arXiv:2402.12354).
    """
    distributed.reshard(model)
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    fast = [p for name, p in trainable if name.endswith(".B")] if lora_plus != 1 else []
    rest = [p for name, p in trainable if not (fast and name.endswith(".B"))]
    groups = [{"params": [p for p in rest if p.ndim >= 2], "weight_decay": weight_decay, "scale": 1.0},
              {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0, "scale": 1.0},
              {"params": fast, "weight_decay": weight_decay, "scale": lora_plus}]
    groups = [group | {"lr": lr * group["scale"]} for group in groups if group["params"]]
    return AdamW(groups, (0.9, beta2), eps)


def set_learning_rate(optimizer: AdamW, step: int, steps: int, config: Settings, first: int = 0) -> float:
    """Give every group the rate of update `step` (from 0) of `steps`, and return it."""
    warmup_steps = round(config.warmup_ratio * steps)
    lr = learning_rate(step, steps, config.lr, warmup_steps, config.schedule, config.min_lr_ratio, first)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["scale"]
    return lr


def learning_rate(
    step: int, steps: int, peak: float, warmup_steps: int, schedule: str, min_ratio: float = 0.0, first: int = 0,
) -> float:
    """Rate of update `step` (from 0): linear from 0 over the warm-up, then by `schedule` down to min_ratio * peak.

    first=1 begins the warm-up one stair above 0.
    """
    if step < warmup_steps:
        return peak * (step + first) / (warmup_steps + first)
    done = (step - warmup_steps) / max(1, steps - warmup_steps)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[schedule]
    return peak * (min_ratio + (1 - min_ratio) * shape)


def check_finite(loss: float, grad_norm: float, step: int, records: list[int]) -> None:
    """A loss or gradient that is not finite ends the run before it reaches the weights. `records` count from 0."""
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        numbers = ", ".join(str(record + 1) for record in sorted(records))
        where = f", or look at this step's records: {numbers}" if records else ""
        fail(f"step {step + 1}: loss is {loss}, gradient norm {grad_norm}: lower lr{where}")
