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

Files are those of PEFT: adapter_config.json and adapter_model.safetensors.
"""
from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import noop_context_fn

from checkpoints import expect_replies, file_name, join_qkv, load_model, save_model, split_qkv, weight_files
from kernels import nf4
from model import Linear, Transformer
from runtime import Settings, compute_dtype, distributed, fail, file_hash, writing

TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")  # every linear layer of a block


# ---------------------------------------------------------------------------------- quantised bases

class _Frozen(torch.autograd.Function):
    """x W^T for a W that is decoded anew in the backward pass: nothing but its codes is kept."""

    @staticmethod
    def forward(ctx, x, layer):
        ctx.layer = layer
        return nf4.linear(x, layer.state()) if isinstance(layer, NF4Linear) else x @ layer.decoded(x.dtype).t()

    @staticmethod
    def backward(ctx, g):
        return g @ ctx.layer.decoded(g.dtype), None


class NF4Linear(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        y = _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


class Int8Linear(nn.Module):
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

    def forward(self, x: Tensor) -> Tensor:
        y = _Frozen.apply(x, self)
        return y if self.bias is None else y + self.bias.to(x.dtype)


QUANTIZED = {"nf4": NF4Linear, "int8": Int8Linear}


def quantize_base(model: Transformer, kind: str, double: bool = True) -> Transformer:
    """Every linear layer of the blocks as "nf4" or "int8", in place; embeddings, norms and heads stay as they are.

    Nothing of the base trains from then on.
    """
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
    """Give the linear layers of the blocks called one of `targets` (None: all) an adapter, in place, and switch it on.

    From then on adapters train, and a score head; the base does not. Raises ValueError for a target that no layer has.
    """
    targets = TARGETS if targets is None else targets
    if rank < 1:
        raise ValueError(f"rank is {rank}, expected at least 1")
    scale = alpha / math.sqrt(rank) if rslora else alpha / rank
    generator = torch.Generator().manual_seed(seed)
    model.adapters[name] = {"rank": rank, "alpha": alpha, "dropout": dropout, "rslora": rslora, "dora": use_dora,
                            "targets": sorted(targets)}
    for parameter_name, parameter in model.named_parameters():
        parameter.requires_grad_(".adapters." in parameter_name or parameter_name.startswith("score_head"))
    found = set()
    for parent in list(model.layers.modules()):
        for child_name, child in list(parent.named_children()):
            if isinstance(parent, LoraLinear) or child_name not in targets:
                continue
            found.add(child_name)
            layer = child if isinstance(child, LoraLinear) else LoraLinear(child)
            weight = layer.weight()
            adapter = Adapter(weight.shape[1], weight.shape[0], rank, scale, dropout, generator, weight.device)
            if use_dora:
                adapter.magnitude = nn.Parameter(weight.float().norm(dim=1))
            layer.adapters[name] = adapter
            setattr(parent, child_name, layer)
    model.lora_layers = list(named_lora_layers(model).values())
    for layer in model.lora_layers:
        layer.active = name
    model.recompute = partial(_recompute, model)
    missing = ", ".join(sorted(set(targets) - found))
    if targets is not TARGETS and missing:
        raise ValueError(f"targets: no linear layer is called {missing}, expected some of {', '.join(TARGETS)}")
    return model


@contextmanager
def adapter(model: Transformer, name: str | None) -> Iterator[Transformer]:
    """The model with adapter `name` on, or with none: the base, bit for bit."""
    before = [layer.active for layer in model.lora_layers]
    for layer in model.lora_layers:
        layer.active = name
    try:
        yield model
    finally:
        for layer, active in zip(model.lora_layers, before, strict=True):
            layer.active = active


def _recompute(model: Transformer):
    """Gradient checkpointing's two contexts: a block's second run has the adapter on that was on in its first."""
    return nullcontext(), adapter(model, model.lora_layers[0].active)


class Role(nn.Module):
    """One of several models on one base: the base with adapter `name` on (None: none), perhaps with a score head.

    PPO's policy, reference, reward and value model share a base this way. A role's parameters are those of its
    adapter and head.
    """

    def __init__(
        self, base: Transformer, name: str | None, head: Tensor | None = None, score_mean: float = 0.0,
        score_std: float = 1.0,
    ):
        super().__init__()
        self.bases = (base,)  # a tuple keeps it from being a submodule: its weights are not this role's
        self.name = name
        self.adapters = nn.ModuleList(layer.adapters[name] for layer in base.lora_layers if name in layer.adapters)
        self.config = replace(base.config, scored=head is not None, score_mean=score_mean, score_std=score_std)
        self.score_head = None if head is None else Linear(head.shape[1], 1)
        if head is not None:
            self.score_head.weight = nn.Parameter(head.detach().float().clone())

    @property
    def base(self) -> Transformer:
        return self.bases[0]

    def __getattr__(self, key: str):
        try:
            return super().__getattr__(key)
        except AttributeError:
            return getattr(self.bases[0], key)

    def hidden(self, *inputs) -> Tensor:
        with adapter(self.base, self.name):
            return self.base.hidden(*inputs)

    scores = Transformer.scores


@torch.no_grad()
def merge_lora(model: Transformer, originals: Transformer | None = None, name: str = "default") -> Transformer:
    """The base with adapter `name` worked into its weights, as a plain model, in place.

    A quantised base has lost bits, so it is merged into the 16-bit `originals` (which are changed and returned),
    never back into four bits. Raises ValueError without them.
    """
    target = model if originals is None else originals
    for path, layer in named_lora_layers(model).items():
        if originals is None and not isinstance(layer.base, Linear):
            raise ValueError("the base is quantised: give the model it was made from as originals")
        plain = layer.base if originals is None else originals.get_submodule(path)
        if name in layer.adapters:
            found = layer.adapters[name]
            merged = plain.weight.to(torch.promote_types(plain.weight.dtype, torch.float32)) + found.delta()
            if found.magnitude is not None:
                merged = merged * (found.magnitude / merged.norm(dim=1))[:, None]
            plain.weight.copy_(merged.to(plain.weight))
        if originals is None:
            parent, _, child = path.rpartition(".")
            setattr(model.get_submodule(parent), child, plain)
    target.adapters, target.lora_layers, target.recompute = {}, [], noop_context_fn
    return target.requires_grad_(True)


# --------------------------------------------------------------------------------------------- files

def _peft_name(path: str, model: Transformer) -> str:
    """What PEFT calls a layer: transformers' name of it, behind its own prefix."""
    return "base_model.model." + file_name(f"{path}.weight", model.config).removesuffix(".weight")


def save_adapter(model: Transformer, path: str | Path, name: str = "default") -> None:
    """Write adapter `name` as PEFT does, a score head with it; written beside and renamed.

    Where a family keeps queries, keys and values in one matrix, our three adapters become one of three times the rank:
    A stacked, B in blocks.
    """
    settings = model.adapters[name]
    by_name: dict[str, list[LoraLinear]] = {}
    for layer_path, layer in named_lora_layers(model).items():
        if name in layer.adapters:
            by_name.setdefault(_peft_name(layer_path, model), []).append(layer)
    tensors, wider = {}, set()
    for key, layers in by_name.items():
        parts = [layer.adapters[name] for layer in layers]
        if len(parts) == 3:
            rank = settings["rank"]
            blocks = [F.pad(part.B.detach(), (i * rank, (2 - i) * rank)) for i, part in enumerate(parts)]
            a, b = torch.cat([part.A.detach() for part in parts]), join_qkv(blocks, model.config)
            wider.add(key.rpartition(".")[2])
        else:
            a, b = parts[0].A.detach(), parts[0].B.detach()
        tensors |= {f"{key}.lora_A.weight": a.contiguous(), f"{key}.lora_B.weight": b.contiguous()}
        if parts[0].magnitude is not None:
            tensors[f"{key}.lora_magnitude_vector"] = parts[0].magnitude.detach()
    if model.new_rows:  # of a template's tokens
        for part in ("embed_tokens", "lm_head"):
            if getattr(model, part) is not None:
                tensors[_peft_name(part, model) + ".weight"] = getattr(model, part).weight.detach()
    if model.score_head is not None:
        tensors["base_model.model.score.weight"] = model.score_head.weight.detach()
    config = _peft_config(model, settings, sorted({key.rpartition(".")[2] for key in by_name}), wider)
    # Beside the tensors, since PEFT warns of keys it does not know; one entry, since safetensors orders several at
    # random and the same adapter shall be the same bytes.
    ours = {"base_model_hash": model.source_hash, "score_mean": model.config.score_mean,
            "score_std": model.config.score_std}
    if distributed.rank():
        return
    final = Path(path)
    beside = final.with_name(f".{final.name}.new")
    with writing(final, beside):
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        save_file(tensors, beside / "adapter_model.safetensors", metadata={"ours": json.dumps(ours)})
        (beside / "adapter_config.json").write_text(json.dumps(config, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        beside.rename(final)


def _peft_config(model: Transformer, settings: dict, targets: list[str], wider: set[str]) -> dict:
    """adapter_config.json; the targets in `wider` have three times the rank."""
    scored, growth = model.score_head is not None, math.sqrt(3) if settings["rslora"] else 3
    return {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if scored else "CAUSAL_LM", "r": settings["rank"],
        "lora_alpha": settings["alpha"], "lora_dropout": settings["dropout"], "use_rslora": settings["rslora"],
        "use_dora": settings["dora"], "target_modules": targets, "bias": "none", "fan_in_fan_out": False,
        "modules_to_save": ["score"] if scored else None, "init_lora_weights": True, "inference_mode": True,
        "rank_pattern": dict.fromkeys(wider, 3 * settings["rank"]),
        "alpha_pattern": dict.fromkeys(wider, settings["alpha"] * growth), "base_model_name_or_path": model.source,
    }


def load_adapter(model: Transformer, path: str | Path, name: str = "default") -> Transformer:
    """Put an adapter that we or PEFT have written on the base it was made for, in place, and switch it on.

    A reward model's adapter brings its head: give a model that has one (`add_score_head`), or ask for a Role.
    """
    saved, head = _load_adapter(model, path, name)
    if "score" in (saved.get("modules_to_save") or []) or model.score_head is not None:
        if head is None or model.score_head is None:
            fail(f"{path}: {'holds no score head' if head is None else 'holds a score head for a model without one'}: "
                 "a reward model's adapter file holds its head")
        model.score_head.weight.data.copy_(head)
        mean, std = saved.get("score_mean", 0.0), saved.get("score_std", 1.0)
        model.config = replace(model.config, score_mean=mean, score_std=std)
    return model


def load_role(base: Transformer, path: str | Path, name: str) -> Role:
    """A reward model's adapter, as one role among several on `base`."""
    saved, head = _load_adapter(base, path, name)
    if head is None:
        fail(f"{path}: holds no score head: a reward model's adapter file holds its head")
    mean, std = saved.get("score_mean", 0.0), saved.get("score_std", 1.0)
    return Role(base, name, head.to(base.embed_tokens.weight.device), mean, std)


def _load_adapter(model: Transformer, path: str | Path, name: str) -> tuple[dict, Tensor | None]:
    """What adapter_config.json says, and the weight of the score head if there is one."""
    path = Path(path)
    saved, tensors = _read_adapter(path)
    if saved.get("base_model_hash") and model.source_hash and saved["base_model_hash"] != model.source_hash:
        fail(f"{path}: was trained on another base ({saved['base_model_name_or_path']}): load that one")
    by_key: dict[str, list[str]] = {}  # the layers that an adapter in the file is for: three where a family fuses them
    for layer_path, _ in model.named_modules():
        child = layer_path.rpartition(".")[2]
        if layer_path.startswith("layers.") and child in TARGETS:
            by_key.setdefault(_peft_name(layer_path, model), []).append(layer_path)
    keys = {key.removesuffix(".lora_A.weight") for key in tensors if key.endswith(".lora_A.weight")}
    if keys - set(by_key):
        fail(f"{path}: adapts {min(keys - set(by_key))}, which this model does not have: is it for another family?")
    targets = tuple(sorted({layer_path.rpartition(".")[2] for key in keys for layer_path in by_key[key]}))
    add_lora(model, saved["r"], saved["lora_alpha"], 0.0, targets, name=name, rslora=saved.get("use_rslora", False),
             use_dora=saved.get("use_dora", False))
    model.adapters[name]["dropout"] = saved["lora_dropout"]  # written again as read; what is loaded drops nothing
    with torch.no_grad():
        for key in sorted(keys):
            _fill(model, path, name, key, by_key[key], saved, tensors)
        for part in ("embed_tokens", "lm_head"):
            rows = tensors.get(_peft_name(part, model) + ".weight")
            if rows is not None:
                model.resize(max(len(rows), model.config.vocab_size))
                getattr(model, part).weight[: len(rows)] = rows.to(getattr(model, part).weight)
    return saved, tensors.get("base_model.model.score.weight")


def _read_adapter(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """adapter_config.json with what we keep beside the tensors, and the tensors."""
    if not (path / "adapter_config.json").is_file():
        fail(f"{path}: holds no adapter_config.json, expected an adapter in PEFT's format")
    try:
        saved = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        with safe_open(path / "adapter_model.safetensors", framework="pt") as file:
            return saved | json.loads((file.metadata() or {}).get("ours", "{}")), tensors
    except (OSError, ValueError, SafetensorError) as error:
        fail(f"{path}: cannot be read ({error}): copy it again")


def _fill(
    model: Transformer, path: Path, name: str, key: str, layer_paths: list[str], saved: dict,
    tensors: dict[str, Tensor],
) -> None:
    """The tensors of one adapter of the file into ours: one layer's, or three where a family fuses q, k and v."""
    a, b = tensors[f"{key}.lora_A.weight"], tensors[f"{key}.lora_B.weight"]
    pieces = split_qkv(b, model.config) if len(layer_paths) == 3 else [b]
    rank = a.shape[0]
    alpha = (saved.get("alpha_pattern") or {}).get(key.rpartition(".")[2], saved["lora_alpha"])
    for layer_path, piece in zip(layer_paths, pieces, strict=True):
        found = model.get_submodule(layer_path).adapters[name]
        if piece.shape[0] != found.B.shape[0] or a.shape[1] != found.A.shape[1]:
            fail(f"{path}: {key} has shape {list(b.shape)} x {list(a.shape)}, which does not fit this model: "
                 "load its own base")
        found.A, found.B = nn.Parameter(a.to(found.A)), nn.Parameter(piece.contiguous().to(found.B))
        found.scale = alpha / (math.sqrt(rank) if saved.get("use_rslora") else rank)
        if f"{key}.lora_magnitude_vector" in tensors:
            found.magnitude = nn.Parameter(tensors[f"{key}.lora_magnitude_vector"].to(found.A))


# ----------------------------------------------------------------------------------------- for scripts

def load_base(
    path: str, settings: Settings, device: torch.device, *, scored: bool | None = None, trained: bool = True,
) -> Transformer:
    """The model a script starts from, in fp32 if every weight trains, in the dtype of compute if none does.

    With adapters it is as stored, or quantised as it is read. `scored` says whether a reward model is expected (None:
    either will do). A model that will be sharded is loaded into the CPU's memory first.
    """
    dtype = compute_dtype(settings.dtype, device)
    if settings.lora_rank:
        model = load_model(path, device=device, linear=QUANTIZED.get(settings.quantize)).requires_grad_(False)
        model.source, model.source_hash = path, file_hash(*weight_files(Path(path)))
    else:
        model = load_model(path, dtype=torch.float32 if trained else dtype,
                           device="cpu" if distributed.world_size() > 1 else device).requires_grad_(trained)
    model.compute_dtype, model.checkpointing = dtype, settings.checkpointing
    if scored and not model.config.scored:
        fail(f"{path}: has no score head, expected the result of reward.py")
    return model if scored is not False else expect_replies(model, path)


def shard(model: Transformer, settings: Settings, device: torch.device) -> Transformer:
    """Full fine-tuning on several ranks: each keeps a part of the weights. Adapters are small: every rank has all."""
    world_size = distributed.world_size()
    if settings.shard and world_size > 1 and world_size % settings.shard:
        fail(f"shard is {settings.shard}, which does not divide the {world_size} processes: choose one that does, "
             "or 0 for all")
    return model if settings.lora_rank else distributed.fully_shard(model, settings.shard, device)


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
    """run/model, a checkpoint that stands alone; with adapters also run/adapter. Returns a whole model to use.

    The adapter is merged into the 16-bit originals, in place unless they were quantised. The largest change this makes
    to the logits (or scores) of the tokens `probe` is printed: rounding, and what quantisation had cost.
    """
    dtype, result = getattr(torch, model.config.dtype), model
    if settings.lora_rank:
        save_adapter(model, run / "adapter", name)
        if distributed.rank() and settings.quantize != "none":
            distributed.barrier()
            return model  # the originals are large: rank 0 alone reads them
        result = _merge(model, settings, probe, name)
    save_model(result, run / "model", tokenizer, dtype=dtype)
    distributed.barrier()
    if not distributed.is_sharded(model):
        return model
    shown = load_model(run / "model", device=model.frequencies.device)
    shown.compute_dtype = model.compute_dtype
    return shown


def _merge(model: Transformer, settings: Settings, probe: list[int], name: str) -> Transformer:
    """merge_lora, into the originals if the base was quantised; prints what it changes."""
    ids = torch.tensor([probe], device=model.embed_tokens.weight.device)
    scored, originals = model.config.scored, None
    before = (model.score(ids) if scored else model(ids)).cpu()
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
