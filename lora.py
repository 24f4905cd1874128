"""LoRA and its relatives: train a small correction, leave the base alone.

    LoRA    y = W x + s B A dropout(x)          A [r, in], B [out, r],  s = alpha / r   Hu et al. 2021, arXiv:2106.09685
    rsLoRA  the same with s = alpha / sqrt(r)                                      Kalajdzievski 2023, arXiv:2312.03732
    DoRA    y = m (W + s B A) x / |W + s B A|   m [out], row norm, no gradient        Liu et al. 2024, arXiv:2402.09353
    QLoRA   LoRA on a base of four bits a weight (kernels/nf4.py)                 Dettmers et al. 2023, arXiv:2305.14314

B starts at zero, so that training starts from the base exactly. Several adapters share one base by name (policy, value,
reward), and with none switched on the model is the base: the reference of DPO and PPO costs nothing.

Memory of a 7B model: 16-bit weights 14.5 GB, in NF4 3.7 GB; an adapter of rank 64 on every linear layer has 160 M
parameters, with gradients and AdamW's moments in fp32 2.6 GB; full fine-tuning takes 116 GB. Any script says so for
any model with --dry-run.

Files are those of PEFT (adapters.py). Beside A and B they may bring own values of the base's parameters (norms, biases,
the embedding): these are in place while that adapter is on, and do not train.
"""
import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import noop_context_fn

from checkpoints import expect_replies, load_model, open_model, read_shards, save_model, weight_files
from kernels import nf4
from model import Linear, Transformer
from runtime import Settings, compute_dtype, distributed, fail, file_hash

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # every linear layer of a block


# ---------------------------------------------------------------------------------- quantised bases

class _Frozen(torch.autograd.Function):
    """x W^T for a W that is decoded anew in the backward pass: nothing but its codes is kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return nf4.linear(x, layer.state()) if isinstance(layer, NF4Linear) else x @ layer.decoded(x.dtype).t()

    @staticmethod
    @once_differentiable
    def backward(ctx, g):
        return g @ ctx.layer.decoded(g.dtype), None


class QuantizedLinear(nn.Module):
    """A frozen Linear whose weight, in fewer bits, is decoded where it is needed."""

    def forward(self, x: Tensor) -> Tensor:
        y = _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class NF4Linear(QuantizedLinear):
    """A Linear whose weight is NF4, its scales quantised again when `double`."""

    def __init__(self, linear: Linear, double: bool = True):
        super().__init__()
        state = nf4.quantize(linear.weight, double=double)
        self.shape, self.block, self.bias = state.shape, state.block, linear.bias
        for name in ("codes", "scales", "scales2", "offset"):
            self.register_buffer(name, getattr(state, name))

    def state(self) -> nf4.NF4:
        return nf4.NF4(self.codes, self.scales, self.scales2, self.offset, self.shape, self.block)

    def decoded(self, dtype: torch.dtype) -> Tensor:
        return nf4.dequantize(self.state(), dtype)


class Int8Linear(QuantizedLinear):
    """A Linear with one byte a weight: codes = round(127 W / largest of the row). Columns listed stay in 16 bits.

    Such columns are those that meet outlier features, |x| >= 6 (Dettmers et al. 2022, arXiv:2208.07339).
    """

    def __init__(self, linear: Linear, outliers: list[int] = ()):
        super().__init__()
        weight = linear.weight.detach().to(torch.float32, copy=True)
        kept = torch.tensor(list(outliers), dtype=torch.long, device=weight.device)
        self.register_buffer("columns", kept)
        self.register_buffer("exact", linear.weight.detach()[:, kept].to(torch.bfloat16))
        weight[:, kept] = 0
        scale = weight.abs().amax(1)
        self.register_buffer("scale", scale)
        self.register_buffer("codes", weight.mul_((127 / scale.clamp(min=1e-30))[:, None]).round_().to(torch.int8))
        self.shape, self.bias = linear.weight.shape, linear.bias

    def decoded(self, dtype: torch.dtype) -> Tensor:
        weight = self.codes.to(torch.float32) * (self.scale / 127)[:, None]
        weight[:, self.columns] = self.exact.float()
        return weight.to(dtype)


QUANTIZED = {"nf4": NF4Linear, "int8": Int8Linear}


def quantize_base(model: Transformer, kind: str, double: bool = True) -> Transformer:
    """Every linear layer of the blocks as "nf4" or "int8", in place; nothing of the base trains from then on."""
    if kind not in QUANTIZED:
        raise ValueError(f"kind is {kind!r}, expected 'nf4' or 'int8'")
    model.requires_grad_(False)
    for module in list(model.layers.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, Linear):
                setattr(module, name, NF4Linear(child, double) if kind == "nf4" else Int8Linear(child))
    return model


# ------------------------------------------------------------------------------------------ adapters

class Adapter(nn.Module):
    """The trained part: A [r, in], B [out, r], for DoRA also the magnitude [out]."""

    def __init__(
        self, inputs: int, outputs: int, rank: int, scale: float, dropout: float, generator: torch.Generator,
        device: torch.device,
    ):
        super().__init__()
        bound = 1 / math.sqrt(inputs)  # uniform, as PyTorch starts a linear layer (Kaiming with a = sqrt 5)
        drawn = torch.rand(rank, inputs, generator=generator) * 2 * bound - bound
        self.A = nn.Parameter(drawn.to(device))
        self.B = nn.Parameter(torch.zeros(outputs, rank, device=device))
        self.magnitude: nn.Parameter | None = None
        self.scale, self.dropout = scale, dropout

    def delta(self) -> Tensor:
        """s B A, [out, in]"""
        return self.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """s B A dropout(x)"""
        if self.dropout and torch.is_grad_enabled():  # sampling and references have none
            x = F.dropout(x, self.dropout)
        return F.linear(F.linear(x, self.A.to(x.dtype)), self.B.to(x.dtype)) * self.scale


def dora(y: Tensor, correction: Tensor, weight: Tensor, adapter: Adapter, bias: Tensor | None) -> Tensor:
    """m (W x + s B A x) / |W + s B A| + bias, from y = W x + bias and the correction s B A x."""
    norm = (weight + adapter.delta().to(weight)).norm(dim=1).detach()
    plain = y if bias is None else y - bias.to(y.dtype)
    out = (adapter.magnitude / norm).to(y.dtype) * (plain + correction)
    return out if bias is None else out + bias.to(y.dtype)


class LoraLinear(nn.Module):
    """A linear layer with adapters by name, of which one or none is on."""

    def __init__(self, base: nn.Module):
        super().__init__()
        self.base, self.adapters, self.active = base, nn.ModuleDict(), None

    def weight(self) -> Tensor:
        return self.base.weight.detach() if isinstance(self.base, Linear) else self.base.decoded(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.active not in self.adapters:
            return y
        adapter = self.adapters[self.active]
        if adapter.magnitude is None:
            return y + adapter(x)
        return dora(y, adapter(x), self.weight(), adapter, self.base.bias)


def named_lora_layers(model: Transformer) -> dict[str, LoraLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def add_lora(
    model: Transformer, rank: int, alpha: float, dropout: float = 0.0, targets: tuple[str, ...] | None = None, *,
    name: str = "default", rslora: bool = False, use_dora: bool = False, seed: int = 0,
) -> Transformer:
    """Give the blocks' linear layers called one of `targets` (None: all) an adapter, in place, and switch it on.

    Adapters and a score head train, the base does not. Raises ValueError for a target that no layer has.
    """
    wanted = TARGETS if targets is None else targets
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    generator = torch.Generator().manual_seed(seed)
    paths = [path for path in linear_paths(model) if path.rpartition(".")[2] in wanted]
    missing = ", ".join(sorted(set(wanted) - {path.rpartition(".")[2] for path in paths}))
    if targets is not None and missing:
        raise ValueError(f"targets: no linear layer is called {missing}, expected some of {', '.join(TARGETS)}")
    switch(model, None)
    for path in paths:
        added = attach(model, path, name, rank, scale, dropout, generator)
        if use_dora:
            added.magnitude = nn.Parameter(model.get_submodule(path).weight().float().norm(dim=1))
    return register(model, name, {"config": {
        "r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "use_rslora": rslora, "use_dora": use_dora}})


def linear_paths(model: Transformer) -> list[str]:
    """Our names of the blocks' linear layers, with adapters or without."""
    return [path for path, _ in model.named_modules()
            if path.startswith("layers.") and path.rpartition(".")[2] in TARGETS]


def attach(
    model: Transformer, path: str, name: str, rank: int, scale: float, dropout: float, generator: torch.Generator,
) -> Adapter:
    parent, _, child = path.rpartition(".")
    layer = model.get_submodule(path)
    layer = layer if isinstance(layer, LoraLinear) else LoraLinear(layer)
    weight = layer.weight()
    layer.adapters[name] = Adapter(weight.shape[1], weight.shape[0], rank, scale, dropout, generator, weight.device)
    setattr(model.get_submodule(parent), child, layer)
    return layer.adapters[name]


def register(model: Transformer, name: str, settings: dict) -> Transformer:
    """Note a new adapter's settings and switch it on; from here on adapters train, and a score head."""
    if name in model.adapters:
        raise ValueError(f"the model has an adapter {name!r} already: give this one another name")
    model.adapters[name] = settings
    model.lora_layers = list(named_lora_layers(model).values())
    model.recompute = partial(_recompute, model)
    switch(model, name)
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapters." in parameter_name or parameter_name.startswith("score_head"))
    return model


def switch(model: Transformer, name: str | None) -> None:
    """Adapter `name` on, or none: with none the model is the base, bit for bit."""
    if name != model.active:
        _exchange(model, model.active)
        _exchange(model, name)
    for layer in model.lora_layers:
        layer.active = name
    model.active = name


def _exchange(model: Transformer, name: str | None) -> None:
    """Swap the base's parameters with those an adapter has of its own; doing it again undoes it.

    Whole Parameters change places, so what autograd has kept of a forward pass stays what it was.
    """
    own = model.adapters.get(name, {}).get("own", {})
    for path, parameter in own.items():
        module, kind = place_of(model, path)
        own[path] = getattr(module, kind)
        setattr(module, kind, parameter)


def place_of(model: Transformer, path: str) -> tuple[nn.Module, str]:
    """The module that holds a parameter of the base, and what it calls it."""
    where, _, kind = path.rpartition(".")
    module = model.get_submodule(where)
    return module.base if isinstance(module, LoraLinear) else module, kind


def untie(model: Transformer) -> None:
    """Give a head of its own to a model whose head is its embedding; as yet it is the same Parameter."""
    with torch.device("meta"):
        model.lm_head = Linear(1, 1)
    model.lm_head.weight = model.embed_tokens.weight
    model.config = replace(model.config, tied=False)


@contextmanager
def adapter(model: Transformer, name: str | None) -> Iterator[Transformer]:
    """The model with adapter `name` on, or with none: the base, bit for bit."""
    before = model.active
    switch(model, name)
    try:
        yield model
    finally:
        switch(model, before)


def _recompute(model: Transformer):
    """Gradient checkpointing's two contexts: a block's second run has the adapter on that was on in its first."""
    return nullcontext(), adapter(model, model.active)


class Role(nn.Module):
    """One of several models (PPO's) on one base: the base with adapter `name` on (None: none), and a score head."""

    def __init__(
        self, base: Transformer, name: str | None, head: Tensor | None = None, score_mean: float = 0.0,
        score_std: float = 1.0,
    ):
        super().__init__()
        self.__dict__["base"] = base  # no submodule: its weights are not this role's
        self.name = name
        self.adapters = nn.ModuleList(layer.adapters[name] for layer in base.lora_layers if name in layer.adapters)
        self.config = replace(base.config, scored=head is not None, score_mean=score_mean, score_std=score_std)
        self.score_head = None if head is None else Linear(head.shape[1], 1)
        if head is not None:
            self.score_head.weight = nn.Parameter(head.detach().float().clone())

    def __getattr__(self, key: str):
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(self.__dict__["base"], key)

    @property
    def head_weight(self) -> Tensor:
        with adapter(self.base, self.name):
            return self.base.head_weight

    def hidden(self, *inputs) -> Tensor:
        with adapter(self.base, self.name):
            return self.base.hidden(*inputs)

    def logits(self, hidden: Tensor) -> Tensor:
        with adapter(self.base, self.name):
            return self.base.logits(hidden)

    def pack(self) -> None:
        with adapter(self.base, self.name):
            self.base.pack()

    scores = Transformer.scores


@torch.no_grad()
def merge_lora(model: Transformer, originals: Transformer | None = None, name: str = "default") -> Transformer:
    """The base with adapter `name` worked into its weights, as a plain model, in place.

    A quantised base has lost bits, so it is merged into the 16-bit `originals` (which are changed and returned),
    never back into four bits. Raises ValueError without them, or for a bias that the base has no place for.
    """
    target = model if originals is None else originals
    adapted, own = named_lora_layers(model), model.adapters[name].get("own", {})
    if originals is None and not all(isinstance(layer.base, Linear) for layer in adapted.values()):
        raise ValueError("the base is quantised: give the model it was made from as originals")
    with adapter(model, None):
        missing = [path for path in own if getattr(*place_of(model, path)) is None]
    if missing:
        raise ValueError(f"{missing[0]} is a bias that the base does not have: the adapter cannot be merged")
    switch(model, None)
    if model.lm_head is not None and target.lm_head is None:
        untie(target)
    if originals is None:
        for path, layer in adapted.items():
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.base)
    for path, parameter in own.items():
        module, kind = place_of(target, path)
        setattr(module, kind, nn.Parameter(parameter.data.to(getattr(module, kind))))
    for path, layer in adapted.items():
        if name not in layer.adapters:
            continue
        found, plain = layer.adapters[name], target.get_submodule(path)
        merged = plain.weight.to(torch.promote_types(plain.weight.dtype, torch.float32)) + found.delta()
        if found.magnitude is not None:
            merged = merged * (found.magnitude / merged.norm(dim=1))[:, None]
        plain.weight.copy_(merged.to(plain.weight))
    if target.lm_head is not None and target.lm_head.weight is target.embed_tokens.weight:
        target.lm_head, target.config = None, replace(target.config, tied=True)  # another adapter had untied them
    target.adapters, target.lora_layers, target.recompute = {}, [], noop_context_fn
    return target.requires_grad_(True)


# ----------------------------------------------------------------------------------------- for scripts

def load_base(
    path: str, settings: Settings, device: torch.device, *, scored: bool | None = None, trained: bool = True,
) -> Transformer:
    """The model a script starts from, in fp32 if every weight trains, in the dtype of compute if none does.

    With adapters it is as stored, or quantised as it is read. `scored` says whether a reward model is expected (None:
    either will do). A model that will be sharded gets its weights in `shard`.
    """
    dtype = compute_dtype(settings.dtype, device)
    if settings.lora_rank:
        model = load_model(path, device=device, linear=QUANTIZED.get(settings.quantize)).requires_grad_(False)
        model.source, model.source_hash = path, file_hash(*weight_files(Path(path)))
    elif distributed.world_size() > 1:
        model = open_model(path).to(torch.float32 if trained else dtype).requires_grad_(trained)
    else:
        model = load_model(path, dtype=torch.float32 if trained else dtype, device=device).requires_grad_(trained)
    model.compute_dtype, model.checkpointing = dtype, settings.checkpointing
    if scored and not model.config.scored:
        fail(f"{path}: has no score head, expected the result of reward.py")
    return model if scored is not False else expect_replies(model, path)


def shard(model: Transformer, settings: Settings, device: torch.device) -> Transformer:
    """Full fine-tuning on several ranks: each reads and keeps a part of the weights. Of adapters every rank has all."""
    world_size = distributed.world_size()
    if settings.shard and world_size > 1 and world_size % settings.shard:
        fail(f"shard is {settings.shard}, which does not divide the {world_size} processes: choose one that does, "
             "or 0 for all")
    if settings.lora_rank or world_size == 1:
        return model
    return read_shards(distributed.fully_shard(model, settings.shard, device), device)


def adapt(model: Transformer, settings: Settings, name: str = "default") -> Transformer:
    """add_lora as the settings say; without a rank every weight trains."""
    if settings.lora_rank:
        add_lora(model, settings.lora_rank, settings.lora_alpha, settings.lora_dropout, name=name, seed=settings.seed,
                 rslora=settings.lora_kind == "rslora", use_dora=settings.lora_kind == "dora")
    return model


@torch.no_grad()
def save_result(
    model: Transformer, run: Path, tokenizer, settings: Settings, probe: list[int], name: str = "default",
) -> Transformer:
    """run/model, a checkpoint that stands alone; with adapters also run/adapter. Returns the model to use.

    The adapter is merged into the 16-bit originals, in place unless they were quantised. The largest change this makes
    to the logits (or scores) of the tokens `probe` is printed: rounding, and what quantisation had cost.
    """
    dtype, result = getattr(torch, model.config.dtype), model
    if settings.lora_rank:
        from adapters import save_adapter  # which imports us

        save_adapter(model, run / "adapter", name, tokenizer)
        if distributed.rank() and settings.quantize != "none":
            distributed.barrier()
            return model  # the originals are large: rank 0 alone reads them
        result = _merge(model, settings, probe, name)
    save_model(result, run / "model", tokenizer, dtype=dtype)
    distributed.barrier()
    return model


def _merge(model: Transformer, settings: Settings, probe: list[int], name: str) -> Transformer:
    """merge_lora, into the originals if the base was quantised; prints what it changes."""
    ids = torch.tensor([probe], device=model.embed_tokens.weight.device)
    scored, originals = model.config.scored, None
    with adapter(model, name):
        before = (model.score(ids) if scored else model(ids)).cpu()
    switch(model, None)  # what other adapters have of their own is not the base's
    if settings.quantize != "none":
        originals = load_model(model.source)
        originals.compute_dtype, originals.config = model.compute_dtype, model.config
        for part in ("embed_tokens", "lm_head", "score_head"):  # never quantised; a template may have added rows
            kept = getattr(model, part)
            setattr(originals, part, None if kept is None else copy.deepcopy(kept).cpu())
    result = merge_lora(model, originals, name)
    ids = ids.to(result.embed_tokens.weight.device)
    gap = ((result.score(ids) if scored else result(ids)).cpu() - before).abs().max()
    print(f"adapter merged into {'the weights' if originals is None else f'the originals of {settings.quantize}'}: "
          f"{'scores' if scored else 'logits'} change by {gap:.2g} at most")
    return result


def __getattr__(name: str):
    """`lora.save_adapter`, `lora.load_adapter` and `lora.load_role`: adapters.py, which imports us, has them."""
    if name in ("save_adapter", "load_adapter", "load_role"):
        import adapters

        return getattr(adapters, name)
    raise AttributeError(f"module 'lora' has no attribute {name!r}")
