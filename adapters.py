"""PEFT's adapters put on a model, and written again (peft_files.py: what their files say).

A layer's A, B and magnitude become an adapter that trains (lora.py). All else that a file may hold becomes an own value
of one of the base's parameters, in place while the adapter is on:

    modules_to_save, bias            the tensors themselves
    LoRA on the embedding, the head  W + s B A, or DoRA's
    trainable_token_indices          W with those rows
    lora_bias                        b + s times the bias of B
    PiSSA, OLoRA                     W less what A and B began as

These do not train here, and are written again as they were read.
"""
import math
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checkpoints import file_name, join_qkv, parameters_by_tensor, split_qkv
from lora import Adapter, LoraLinear, Role, adapter, attach, linear_paths, place_of, register, switch, untie
from model import Linear, ModelConfig, Transformer
from peft_files import DEFAULTS, AdapterFile, by_pattern, is_saved, is_target, matches, write_adapter
from runtime import distributed, fail
from runtime.sandbox import try_out


def _peft_name(path: str, model: Transformer) -> str:
    """What PEFT calls a layer: transformers' name of it."""
    return file_name(f"{path}.weight", model.config).removesuffix(".weight")


def _head_names(model: Transformer) -> list[str]:
    """What PEFT may call the head: transformers 5 has renamed that of GPT-NeoX."""
    return list(dict.fromkeys([_peft_name("lm_head", model), "lm_head"]))


def _layers(model: Transformer) -> dict[str, list[str]]:
    """Our names of the blocks' linear layers by PEFT's: three where a family fuses queries, keys and values."""
    found: dict[str, list[str]] = {}
    for path in linear_paths(model):
        found.setdefault(_peft_name(path, model), []).append(path)
    return found


def _scale(config: dict, module: str) -> tuple[int, float, float]:
    """Rank, alpha and scale of one layer's adapter."""
    rank = by_pattern(config["rank_pattern"], module, config["r"])
    alpha = by_pattern(config["alpha_pattern"], module, config["lora_alpha"])
    return rank, alpha, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)


# ----------------------------------------------------------------------------------------- writing

def save_adapter(model: Transformer, path: str | Path, name: str = "default", tokenizer=None) -> None:
    """Write adapter `name` as PEFT does, a score head with it; what was loaded is written as it was read.

    `tokenizer` goes beside it: PEFT's Auto classes give the base as many rows as that has tokens.
    """
    settings, layers = model.adapters[name], _layers(model)
    tensors, scales = dict(settings.get("kept", {})), {}
    for module, paths in layers.items():
        parts = [layer.adapters[name] for layer in map(model.get_submodule, paths)
                 if isinstance(layer, LoraLinear) and name in layer.adapters]
        if not parts:
            continue
        if len(parts) < len(paths):
            raise ValueError(f"{module} holds queries, keys and values: it takes an adapter on all three or on none")
        a, b, magnitude = _joined(parts, model.config)
        tensors |= {f"{module}.lora_A.weight": a.detach(), f"{module}.lora_B.weight": b.detach()}
        if magnitude is not None:
            tensors[f"{module}.lora_magnitude_vector"] = magnitude.detach()
        scales[module] = len(a), parts[0].scale
    embedding = _peft_name("embed_tokens", model)
    if model.new_rows and not any(key.startswith(f"{embedding}.") for key in tensors):  # of a template's tokens
        with adapter(model, name):
            tensors[f"{embedding}.weight"] = model.embed_tokens.weight.detach()
            if model.lm_head is not None:
                tensors |= {f"{head}.weight": model.lm_head.weight.detach().clone() for head in _head_names(model)}
    if model.score_head is not None:
        tensors["score.weight"] = model.score_head.weight.detach()
    ours = {"base_model_hash": model.source_hash, "score_mean": model.config.score_mean,
            "score_std": model.config.score_std}
    if not distributed.rank():
        write_adapter(path, _config(model, settings["config"], scales, set(layers)), tensors, ours, tokenizer)


def _joined(parts: list[Adapter], config: ModelConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """A, B and magnitude as the file has them: of a layer, or of queries, keys and values in one matrix.

    Three that share their A, as those that PEFT has trained do, stay so; others become one adapter of three times the
    rank: A stacked, B in blocks. DoRA's norms are those of rows, so they are the same in one matrix as in three.
    """
    a, rank, blocks = parts[0].A, len(parts[0].A), [part.B.detach() for part in parts]
    if not all(torch.equal(part.A, a) for part in parts):
        a = torch.cat([part.A for part in parts])
        blocks = [F.pad(b, (i * rank, (2 - i) * rank)) for i, b in enumerate(blocks)]
    magnitude = None if parts[0].magnitude is None else join_qkv([part.magnitude for part in parts], config)
    return a, join_qkv(blocks, config), magnitude


def _config(model: Transformer, known: dict, scales: dict[str, tuple[int, float]], layers: set[str]) -> dict:
    """adapter_config.json: what is `known` of it, and rank and scale of each layer where patterns say something else.

    A new adapter's targets stand by last name, or by full name where other layers are called the same.
    """
    last = {module.rpartition(".")[2] for module in scales}
    alike = {module for module in layers if module.rpartition(".")[2] in last}
    scored = model.score_head is not None
    config = {
        "peft_type": "LORA", "task_type": "SEQ_CLS" if scored else "CAUSAL_LM", "bias": "none", "fan_in_fan_out": False,
        "target_modules": sorted(last if alike == set(scales) else scales), "init_lora_weights": True,
        "modules_to_save": ["score"] if scored else None} | known
    ranks, alphas = {}, {}
    for module, (rank, scale) in scales.items():
        alpha = scale * (math.sqrt(rank) if config.get("use_rslora") else rank)
        said_rank, said_alpha, _ = _scale(DEFAULTS | config, module)
        if rank != said_rank:
            ranks[module] = rank
        if not math.isclose(alpha, said_alpha):
            alphas[module] = alpha
    return config | {
        "rank_pattern": ranks | (known.get("rank_pattern") or {}) | ranks,
        "alpha_pattern": alphas | (known.get("alpha_pattern") or {}) | alphas,
        "base_model_name_or_path": model.source or known.get("base_model_name_or_path"), "inference_mode": True}


# ----------------------------------------------------------------------------------------- reading

def load_adapter(model: Transformer, path: str | Path, name: str = "default") -> Transformer:
    """Put an adapter that we or PEFT have written on the base it was made for, in place, and switch it on.

    A reward model's adapter brings its head: give a model that has one (`add_score_head`), or ask for a Role.
    """
    file, head = _load(model, path, name)
    if (head is None) != (model.score_head is None):
        fail(f"{path}: {'holds no score head' if head is None else 'holds a score head for a model without one'}: "
             "a reward model's adapter file holds its head")
    if head is not None:
        model.score_head.weight.data.copy_(head)
        model.config = replace(model.config, **file.scores)
    return model


def load_role(base: Transformer, path: str | Path, name: str) -> Role:
    """A reward model's adapter, as one role among several on `base`."""
    file, head = _load(base, path, name)
    if head is None:
        fail(f"{path}: holds no score head: a reward model's adapter file holds its head")
    return Role(base, name, head.to(base.embed_tokens.weight.device), **file.scores)


def _load(model: Transformer, path: str | Path, name: str) -> tuple[AdapterFile, Tensor | None]:
    """The file, every tensor of it used, and the weight of the score head if there is one."""
    file = AdapterFile(path)
    config = file.config
    if file.ours.get("base_model_hash") and model.source_hash and file.ours["base_model_hash"] != model.source_hash:
        fail(f"{path}: was trained on another base ({config.get('base_model_name_or_path')}): load that one")
    vocabulary = [_peft_name(part, model) for part in ("embed_tokens", "embed_positions")] + _head_names(model)
    key, fault = try_out(matches(config, [*_layers(model), *vocabulary]))
    if fault:
        fail(f"{file.folder / 'adapter_config.json'}: {key} {fault} on this model's names of layers: list the names")
    if not any(is_target(config, module) for module in [*_layers(model), *vocabulary]):
        fail(f"{path}: adapts {config['target_modules']}, which this model does not have: is it for another family?")
    switch(model, None)
    with torch.no_grad():
        head = file.take("score.weight", [1, model.config.width], "score" in (config["modules_to_save"] or []))
        layers = {module: paths for module, paths in _layers(model).items() if is_target(config, module)}
        own: dict[str, Tensor] = {}
        for module, paths in layers.items():
            own |= _load_layer(model, file, name, module, paths)
        kept = dict(file.tensors)
        own |= _vocabulary(model, file) | _others(model, file)
        if config["lora_bias"]:
            for module, paths in layers.items():
                own |= _shifted_biases(model, file, own, name, module, paths)
        file.finish()
        own = _parameters(model, file, own)
    register(model, name, {"config": file.raw, "kept": kept, "own": own})
    return file, head


def _load_layer(model: Transformer, file: AdapterFile, name: str, module: str, paths: list[str]) -> dict[str, Tensor]:
    """One adapter of the file onto our layer, or onto three; returns own weights, which PiSSA and OLoRA have."""
    rank, _, scale = _scale(file.config, module)
    shapes = [place_of(model, f"{path}.weight")[0] for path in paths]
    shapes = [layer.weight.shape if isinstance(layer, Linear) else layer.shape for layer in shapes]
    rows = sum(shape[0] for shape in shapes)
    # The file's tensors first: a rank that they do not have takes no memory.
    a = file.take(f"{module}.lora_A.weight", [rank, shapes[0][1]])
    b = split_qkv(file.take(f"{module}.lora_B.weight", [rows, rank]), model.config, len(paths))
    if file.config["use_dora"]:
        magnitudes = split_qkv(file.take(f"{module}.lora_magnitude_vector", [rows]), model.config, len(paths))
    # A dropout of 0: what is loaded drops nothing
    parts = [attach(model, path, name, rank, scale, 0.0, torch.Generator()) for path in paths]
    for i, part in enumerate(parts):
        part.A, part.B = (nn.Parameter(tensor.to(part.A, copy=True)) for tensor in (a, b[i]))
        if file.config["use_dora"]:
            part.magnitude = nn.Parameter(magnitudes[i].to(part.A, copy=True))
    start = str(file.config["init_lora_weights"]).lower()
    if start not in ("pissa", "olora"):
        return {}
    places = [f"{path}.weight" for path in paths]
    weights = [_of_base(model, file, place) for place in places]
    residual = _residual(join_qkv(weights, model.config), rank, scale, start)
    return dict(zip(places, split_qkv(residual, model.config, len(paths)), strict=True))


def _of_base(model: Transformer, file: AdapterFile, place: str) -> nn.Parameter | None:
    """The base's own value of a parameter; None for a bias that it does not have."""
    module, kind = place_of(model, place)
    if kind == "weight" and not hasattr(module, kind):
        fail(f"{file.folder}: brings a {place} of its own, and this base is quantised there: set quantize=none")
    return getattr(module, kind)


def _residual(weight: Tensor, rank: int, scale: float, start: str) -> Tensor:
    """W less what A and B began as: the base as PEFT has it under an adapter that began as a part of it.

    PiSSA takes the largest singular directions (Meng et al. 2024, arXiv:2404.02948), OLoRA s times the first columns
    and rows of W = Q R (Büyükakyüz 2024, arXiv:2406.01775).
    """
    wide = weight.to(torch.promote_types(weight.dtype, torch.float32))
    if start == "pissa":
        u, s, v = torch.linalg.svd(wide, full_matrices=False)
        return wide - (u[:, :rank] * s[:rank]) @ v[:rank]
    q, r = torch.linalg.qr(wide)
    return wide - scale * q[:, :rank] @ r[:rank]


def _shifted_biases(
    model: Transformer, file: AdapterFile, own: dict[str, Tensor], name: str, module: str, paths: list[str],
) -> dict[str, Tensor]:
    """The layer's biases with lora_bias: s times the bias of B is added to the outputs."""
    parts = [model.get_submodule(path).adapters[name] for path in paths]
    bias = file.take(f"{module}.lora_B.bias", [sum(len(part.B) for part in parts)])
    result = {}
    for path, part, shift in zip(paths, parts, split_qkv(bias, model.config, len(paths)), strict=True):
        base = own.get(f"{path}.bias", _of_base(model, file, f"{path}.bias"))
        result[f"{path}.bias"] = part.scale * shift if base is None else base + part.scale * shift.to(base)
    return result


def _others(model: Transformer, file: AdapterFile) -> dict[str, Tensor]:
    """The base's parameters that the file brings, but for embedding and head; learned positions with LoRA on them."""
    with torch.device("meta"):
        plain = Transformer(model.config)
    shapes, own = dict(plain.named_parameters()), {}
    for tensor, paths in parameters_by_tensor(plain).items():
        if paths[0].startswith(("embed_tokens", "lm_head", "score_head")):
            continue
        module, _, kind = tensor.rpartition(".")
        shape = [sum(len(shapes[path]) for path in paths), *shapes[paths[0]].shape[1:]]
        value = file.take([tensor, f"{module}.base_layer.{kind}"], shape, is_saved(file.config, tensor))
        if paths[0] == "embed_positions.weight" and is_target(file.config, module):
            value = _corrected(model.embed_positions.weight if value is None else value, file, module)
        if value is not None:
            own |= zip(paths, split_qkv(value, model.config, len(paths)), strict=True)
    return own


def _corrected(weight: Tensor, file: AdapterFile, module: str, is_head: bool = False) -> Tensor:
    """An embedding or a head with LoRA or DoRA worked in. An embedding's A and B are those of its transpose."""
    rank, _, scale = _scale(file.config, module)
    rows, width = weight.shape
    if is_head:
        a = file.take(f"{module}.lora_A.weight", [rank, width])
        b = file.take(f"{module}.lora_B.weight", [rows, rank])
    else:
        b = file.take(f"{module}.lora_embedding_A", [rank, rows]).t()
        a = file.take(f"{module}.lora_embedding_B", [width, rank]).t()
    wide = torch.promote_types(weight.dtype, torch.float32)
    weight = weight.to(wide) + scale * (b.to(weight.device, wide) @ a.to(weight.device, wide))
    if file.config["use_dora"]:
        norm = weight.norm(dim=1 if is_head else 0, keepdim=True)
        magnitude = file.take(f"{module}.lora_magnitude_vector", [norm.numel()])
        weight = weight * (magnitude.to(weight).view_as(norm) / norm)
    return weight


# ------------------------------------------------------------------------------- embedding and head

def _vocabulary(model: Transformer, file: AdapterFile) -> dict[str, Tensor]:
    """Embedding and head as the adapter has them: others, LoRA on them, or some tokens' rows.

    PEFT parts the two where the base ties them: another embedding, or LoRA on it, leaves the head as it was. What the
    file holds as the base's own is both's, and so are rows of tokens unless the head lists others.
    """
    named = {"embed_tokens": [_peft_name("embed_tokens", model)]}
    if not model.config.scored:
        named["lm_head"] = _head_names(model)
    names = {part: next((module for module in modules if any(key.startswith(f"{module}.") for key in file.tensors)),
                        modules[0]) for part, modules in named.items()}
    tied = model.lm_head is None and len(names) == 2
    base, other = _whole_matrices(model, file, named, tied)
    _grow(model, file, base, other)
    values = {}
    for part, module in names.items():
        weight = model.head_weight if part == "lm_head" else model.embed_tokens.weight
        value = weight if base[part] is None else base[part].to(weight)
        # ensure_weight_tying gives a tied head LoRA without naming it a target
        follows = file.config["ensure_weight_tying"] and f"{module}.lora_A.weight" in file.tensors
        if is_target(file.config, module, part == "lm_head") or follows:
            value = _corrected(value, file, module, part == "lm_head")
        values[part] = (value if other[part] is None else other[part]).to(weight)
    values = _with_token_rows(file, names, values, tied)
    if tied and torch.equal(values["embed_tokens"], values["lm_head"]):
        del values["lm_head"]
    elif tied:
        untie(model)  # with no adapter on, they are still one
    return {f"{part}.weight": value for part, value in values.items()}


def _whole_matrices(
    model: Transformer, file: AdapterFile, named: dict[str, list[str]], tied: bool,
) -> tuple[dict[str, Tensor | None], dict[str, Tensor | None]]:
    """By part: the base's own matrix, where the file brings it, and the one that the adapter has instead."""
    shape, base, other = [None, model.config.width], {}, {}
    for part, modules in named.items():
        saved = any(is_saved(file.config, f"{module}.weight") for module in modules)
        forms = ("base_layer.", "original_module.", "token_adapter.base_layer.", *([] if saved else [""]))
        base[part] = [f"{module}.{form}weight" for module in modules for form in forms]
        # PEFT repeats a saved one once the vocabulary has grown
        copies = [f"{module}.{form}weight" for module in modules for form in ("", "modules_to_save.")]
        other[part] = file.take(copies, shape) if saved else None
    if tied:
        return dict.fromkeys(named, file.take(sum(base.values(), []), shape, required=False)), other
    return {part: file.take(copies, shape, required=False) for part, copies in base.items()}, other


def _grow(
    model: Transformer, file: AdapterFile, base: dict[str, Tensor | None], other: dict[str, Tensor | None],
) -> None:
    """Give the base the rows that it lacks for an adapter whose vocabulary had grown; another size is refused."""
    rows = model.config.vocab_size
    sizes = {len(matrix) for matrix in (*base.values(), *other.values()) if matrix is not None}
    if not sizes or sizes == {rows}:
        return
    known = {part: other[part] if base[part] is None else base[part] for part in base}
    if len(sizes) > 1 or max(sizes) < rows or None in known.values():
        fail(f"{file.file}: its embedding or head has {max(sizes)} rows, the base {rows}: load a base with as many, or "
             "save both in the file (save_embedding_layers=True)")
    model.resize(max(sizes))
    model.new_rows = True
    for part, matrix in known.items():
        if getattr(model, part) is not None:
            getattr(model, part).weight.data[rows:] = matrix[rows:].to(model.embed_tokens.weight)


def _with_token_rows(
    file: AdapterFile, names: dict[str, str], values: dict[str, Tensor], tied: bool,
) -> dict[str, Tensor]:
    """The matrices with the rows that trainable_token_indices lists."""
    listed = file.config["trainable_token_indices"] or {}
    listed = listed if isinstance(listed, dict) else {names["embed_tokens"]: listed}
    tokens = {part: indices for part, module in names.items()
              for layer, indices in listed.items() if module.endswith(layer)}
    if tied and tokens.get("lm_head") == tokens.get("embed_tokens"):
        tokens.pop("lm_head", None)
    shared = tied and "lm_head" not in tokens
    result = dict(values)
    for part, indices in tokens.items():
        if max(indices, default=-1) >= len(values[part]):
            fail(f"{file.folder}: trainable_token_indices holds {max(indices)}, the base has {len(values[part])} rows: "
                 "load the base that it was made for")
        rows = file.take(f"{names[part]}.token_adapter.trainable_tokens_delta", [len(indices), values[part].shape[1]])
        for where in names if shared else [part]:
            index = torch.tensor(indices, dtype=torch.long, device=values[part].device)
            result[where] = result[where].index_copy(0, index, rows.to(result[where]))
    return result


def _parameters(model: Transformer, file: AdapterFile, own: dict[str, Tensor]) -> dict[str, nn.Parameter]:
    """Own values that differ from the base's, as parameters that do not train."""
    found = {}
    for place, value in own.items():
        base = _of_base(model, file, place)
        value = value.to(model.embed_tokens.weight.device if base is None else base)
        if base is None or not torch.equal(value, base):
            found[place] = nn.Parameter(value.clone(), requires_grad=False)
    return found
