"""Hugging Face model directories in and out: load_model and save_model. config.json is families.py's.

Our parameters carry the names of Hugging Face's Llama. Other families' tensors are renamed on the way in and out, and
their fused query-key-value matrices are split and joined. Weights are read from safetensors only.
"""
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from families import config_json, read_config
from model import Linear, ModelConfig, Transformer
from runtime import distributed, fail, writing
from runtime.json_files import read_json

# ------------------------------------------------------------------------------- tensors and their names

# What transformers calls our modules. "self_attn.qkv" is q_proj, k_proj and v_proj in one matrix.
LLAMA_MODULES = {
    "embed_tokens": "model.embed_tokens", "layers": "model.layers", "norm": "model.norm"}
MODULES = {  # of the other families; all call our score_head "score"
    "falcon": {
        "embed_tokens": "transformer.word_embeddings", "layers": "transformer.h", "norm": "transformer.ln_f",
        "self_attn.qkv": "self_attention.query_key_value", "self_attn.o_proj": "self_attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h"},
    "gpt_bigcode": {
        "embed_tokens": "transformer.wte", "embed_positions": "transformer.wpe", "layers": "transformer.h",
        "norm": "transformer.ln_f", "input_layernorm": "ln_1", "post_attention_layernorm": "ln_2",
        "self_attn.qkv": "attn.c_attn", "self_attn.o_proj": "attn.c_proj",
        "mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    "starcoder2": LLAMA_MODULES | {"mlp.up_proj": "mlp.c_fc", "mlp.down_proj": "mlp.c_proj"},
    "gpt_neox": {
        "embed_tokens": "gpt_neox.embed_in", "layers": "gpt_neox.layers", "norm": "gpt_neox.final_layer_norm",
        "self_attn.qkv": "attention.query_key_value", "self_attn.o_proj": "attention.dense",
        "mlp.up_proj": "mlp.dense_h_to_4h", "mlp.down_proj": "mlp.dense_4h_to_h", "lm_head": "embed_out"},
}
FALCON_TWO_NORMS = {"input_layernorm": "ln_attn", "post_attention_layernorm": "ln_mlp"}  # the 40B


def file_name(name: str, config: ModelConfig) -> str:
    """What transformers calls one of our parameters. Where a family fuses them, queries, keys and values share it."""
    modules = {"score_head": "score"} | MODULES.get(config.family, LLAMA_MODULES)
    if config.family == "falcon" and config.parallel and config.norms == 2:
        modules = modules | FALCON_TWO_NORMS
    if "self_attn.qkv" in modules:
        modules = modules | {f"self_attn.{part}_proj": modules["self_attn.qkv"] for part in "qkv"}
    return renamed(name, modules)


def renamed(name: str, modules: dict[str, str]) -> str:
    """A parameter's name where modules have other ones; those not among them keep theirs."""
    module, _, kind = name.rpartition(".")
    if not module.startswith("layers."):
        return f"{modules.get(module, module)}.{kind}"
    _, layer, part = module.split(".", 2)
    return f"{modules['layers']}.{layer}.{modules.get(part, part)}.{kind}"


def parameters_by_tensor(model: Transformer) -> dict[str, list[str]]:
    """For each tensor of the files, our names for it: one, or three where a family fuses queries, keys and values."""
    found: dict[str, list[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(file_name(name, model.config), []).append(name)
    return found


# Falcon, StarCoder and GPT-NeoX fuse queries, keys and values into K groups: H / K queries, their key, their value.

def split_qkv(fused: Tensor, config: ModelConfig, parts: int = 3) -> list[Tensor]:
    """[(H + 2 K) E, ...] -> queries [H E, ...], keys [K E, ...], values [K E, ...]. One part is the tensor itself."""
    if parts < 3:
        return [fused] * parts
    groups = fused.unflatten(0, (config.kv_heads, -1, config.head_dim))
    return [part.flatten(0, 2) for part in (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])]


def join_qkv(parts: list[Tensor], config: ModelConfig) -> Tensor:
    """The inverse of split_qkv."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.unflatten(0, (config.kv_heads, -1, config.head_dim)) for part in parts], 1).flatten(0, 2)


# ------------------------------------------------------------------------------------------- reading

# In old checkpoints' files but not parameters: the forward pass computes them.
BUFFERS = ("rotary_emb.inv_freq", ".attention.bias", ".attn.bias", "masked_bias")


def load_model(
    path: str | Path, dtype: torch.dtype | None = None, device: str | torch.device = "cpu", *,
    linear: Callable[[Linear], nn.Module] | None = None,
) -> Transformer:
    """A Hugging Face directory as a Transformer, its weights in `dtype`, or as stored.

    Tensors are read one by one: peak memory is the model and its largest tensor. `linear` replaces each linear layer
    of the blocks as soon as it is read (lora.py: by NF4 or int8); such a model is frozen.
    """
    model = open_model(path)
    config, model.frequencies = model.config, model.frequencies.to(device)
    for file, key, names in model.unread:
        with safe_open(file, framework="pt", device=str(device)) as tensors:  # closing it frees the pages read so far
            tensor = tensors.get_tensor(key)
        check_finite(file, key, tensor)
        if not names and not torch.equal(tensor.to(model.embed_tokens.weight.dtype), model.embed_tokens.weight):
            fail_untied(file, key)
        for name, part in zip(names, split_qkv(tensor, config, len(names)), strict=True):
            where, _, kind = name.rpartition(".")
            module = model.get_submodule(where)
            setattr(module, kind, nn.Parameter(part.to(dtype or part.dtype, copy=True)))
            if linear is not None and kind == "weight" and where.startswith("layers.") and isinstance(module, Linear):
                parent, _, child = where.rpartition(".")
                setattr(model.get_submodule(parent), child, linear(module))
    model.unread = []
    return model.requires_grad_(linear is None)


def open_model(path: str | Path) -> Transformer:
    """The model of a Hugging Face directory without its weights, on the meta device; `unread` says where they are."""
    path = Path(path)
    config = read_config(path)
    with torch.device("meta"):
        model = Transformer(config)
    if "auto_map" in config.raw and not distributed.rank():
        print(f"{path}: names code of its own (auto_map), which is not run: computed as transformers' {config.family}")
    model.unread = check_weights(path, model)
    return model


class Rows(dict):
    """Rows of a matrix that is still in its file; those that are set take the file's place when it is read."""

    def __init__(self, file: Path, key: str, dtype: torch.dtype):
        self.file, self.key, self.dtype = file, key, dtype

    def __missing__(self, row: int) -> Tensor:
        with safe_open(self.file, framework="pt") as tensors:
            stored = tensors.get_slice(self.key)
            count, width = stored.get_shape()
            return stored[row : row + 1][0].to(self.dtype) if row < count else torch.zeros(width, dtype=self.dtype)


def embeddings(model: Transformer) -> list[Tensor | Rows]:
    """The embedding, and the head if it is another matrix, whose rows can be read and set even if they are unread."""
    names = ["embed_tokens.weight"] + ([] if model.lm_head is None else ["lm_head.weight"])
    matrices = {name: model.get_parameter(name) for name in names}
    for file, key, (name, *_) in (part for part in model.unread if part[2]):
        if name in matrices:
            matrices[name] = model.rows.setdefault(name, Rows(file, key, matrices[name].dtype))
    return list(matrices.values())


@torch.no_grad()
def read_shards(model: Transformer, device: torch.device) -> Transformer:
    """Give a sharded model from open_model its weights: of every tensor a rank reads the rows that it keeps."""
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    parameters = dict(model.named_parameters())
    for file, key, names in model.unread:
        with safe_open(file, framework="pt") as tensors:
            stored = tensors.get_slice(key)
            numbers = torch.arange(stored.get_shape()[0])
            for name, rows in zip(names, split_qkv(numbers, model.config, len(names)), strict=True):
                if name in parameters:  # a reward model has lost its LM head
                    local, found = _read_rows(parameters[name], stored, rows)
                    check_finite(file, key, found)
                    local[: len(found)] = found
                    local[len(found) :] = 0  # added for a template's tokens
            if not names:
                local, found = _read_rows(model.embed_tokens.weight, stored, numbers)
                if not torch.equal(found.to(local), local[: len(found)]):
                    fail_untied(file, key)
    for name in model.rows.keys() & parameters.keys():
        local, first = distributed.local_rows(parameters[name])
        for row, value in model.rows[name].items():
            if first <= row < first + len(local):
                local[row - first] = value
    model.unread, model.rows = [], {}
    return model


def _read_rows(parameter: Tensor, stored, rows: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's part of a parameter, and what the file holds for it: `rows` are the whole parameter's in the file."""
    local, first = distributed.local_rows(parameter)
    rows = rows[first : first + len(local)]
    if not len(rows):
        return local, local[:0]
    found = stored[rows[0] : rows[-1] + 1]
    return local, found[rows - rows[0]] if len(found) > len(rows) else found  # of a fused matrix a part


def check_finite(file: Path, key: str, tensor: Tensor) -> None:
    if not (tensor.sum().isfinite() or tensor.isfinite().all()):  # a sum takes no memory, but may overflow
        fail(f"{file}: {key} holds NaN or infinity: its training diverged, take an earlier checkpoint")


def fail_untied(file: Path, key: str) -> NoReturn:
    fail(f"{file}: {key} is not the embedding, but tie_word_embeddings is true in config.json: set it to false")


def expect_replies(model: Transformer, path: str | Path) -> Transformer:
    """The model itself; a reward model is refused."""
    if model.config.scored:
        fail(f"{path}: is a reward model, expected one that replies: start from the result of sft.py or a base model")
    return model


def check_weights(path: Path, model: Transformer) -> list[tuple[Path, str, list[str]]]:
    """Where a directory keeps the model's parameters: [(file, name of a tensor in it, our names)], from headers alone.

    The second copy of a tied matrix has none of our names and comes last.
    """
    config, found = model.config, []
    missing, shapes = parameters_by_tensor(model), dict(model.named_parameters())
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                held = {key: tensors.get_slice(key) for key in sorted(tensors.keys())}
                held = {key: (part.get_shape(), part.get_dtype()) for key, part in held.items()}
        except (SafetensorError, OSError) as error:
            fail(f"{file}: cannot be read as safetensors ({error}): copy it again")
        for key, (shape, kind) in held.items():
            if key not in missing and key.endswith(BUFFERS):
                continue
            if kind not in ("F64", "F32", "F16", "BF16"):
                fail(f"{file}: {key} is stored as {kind}, as quantised weights are: take the original 16-bit weights")
            if key not in missing:
                if config.tied and key == file_name("lm_head.weight", config):
                    found.append((file, key, []))
                    continue
                fail(f"{file}: holds {key}, which family {config.family} has no place for")
            names = missing.pop(key)
            expected = [sum(shapes[name].shape[0] for name in names), *shapes[names[0]].shape[1:]]
            if list(shape) != expected:
                fail(f"{file}: {key} has shape {list(shape)}, config.json says {expected}")
            found.append((file, key, names))
    if missing:
        fail(f"{path}: {min(missing)} is in none of its weight files ({len(missing)} missing): "
             "is config.json of this model?")
    return sorted(found, key=lambda part: not part[2])


def weight_files(path: Path) -> list[Path]:
    """The safetensors files of a directory: the shards that an index names, or model.safetensors."""
    index = path / "model.safetensors.index.json"
    files = [path / "model.safetensors"]
    if index.is_file():
        table = read_json(index).get("weight_map")
        names = table.values() if isinstance(table, dict) else [None]
        if not all(isinstance(name, str) and 0 < len(name) < 256 and "\0" not in name for name in names):
            fail(f"{index}: is not an index of safetensors (a \"weight_map\" from tensors to files): copy it again")
        files = sorted({path / Path(name).name for name in names})
    for file in files:
        if not file.is_file():
            pickled = any(path.glob("*.bin"))
            why = " (it holds pickled weights, which are never opened: convert them)" if pickled else ""
            fail(f"{file}: no such file{why}, expected the model's weights as safetensors")
    if (single := path / "model.safetensors") not in files and single.exists():  # which transformers takes, vLLM not
        fail(f"{index}: names {len(files)} other files than model.safetensors beside it: delete what is out of date")
    return files


# ------------------------------------------------------------------------------------------- writing

def save_model(
    model: Transformer, path: str | Path, tokenizer=None, *,
    dtype: torch.dtype | None = None, shard_bytes: int = 5 * 10**9,
) -> None:
    """Write a Hugging Face directory: config.json, weights in `dtype` (default: as they are), tokenizer files.

    Written beside and renamed: `path` is never half a checkpoint, even if the process is killed. A model sharded over
    ranks is gathered tensor by tensor, so every rank has to call; rank 0 writes, and holds the tensors of one file.
    """
    files = _plan_files(model, dtype, shard_bytes)
    tensors = (_gather(model, file, dtype) for file in files)
    if distributed.rank():
        for _ in tensors:
            pass
        return
    saved = dtype or next(model.parameters()).dtype
    config = replace(model.config, dtype=str(saved).removeprefix("torch."))
    with new_folder(Path(path)) as beside:
        _write_files(beside, tensors, len(files))
        (beside / "config.json").write_text(json.dumps(config_json(config), indent=1) + "\n")
        if tokenizer is not None:
            tokenizer.save(beside)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """An empty folder to fill, which then takes the place of `path`: if we are killed, the old or new one is whole."""
    beside, old = path.with_name(f".{path.name}.new"), path.with_name(f".{path.name}.old")
    with writing(path, beside):
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        yield beside
        shutil.rmtree(old, ignore_errors=True)
        if path.exists():
            path.rename(old)
        beside.rename(path)
        shutil.rmtree(old, ignore_errors=True)


def _plan_files(model: Transformer, dtype: torch.dtype | None, most: int) -> list[dict[str, list[str]]]:
    """What goes into each file, of at most so many bytes: transformers' names of tensors, and ours for their parts."""
    files: list[dict[str, list[str]]] = [{}]
    room, parameters = most, dict(model.named_parameters())
    for key, names in parameters_by_tensor(model).items():
        size = sum(parameters[name].numel() * (dtype or parameters[name].dtype).itemsize for name in names)
        if size > room and files[-1]:
            files.append({})
            room = most
        files[-1][key] = names
        room -= size
    return files


def _gather(model: Transformer, file: dict[str, list[str]], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """A file's tensors, whole, on the CPU; nothing on ranks above 0."""
    found = {}
    for key, names in file.items():
        parts = [distributed.full_tensor(model.get_parameter(name).detach()) for name in names]
        if distributed.rank() == 0:
            parts = [part.to("cpu", dtype or part.dtype) for part in parts]
            found[key] = join_qkv(parts, model.config).contiguous()
    return found


def _write_files(path: Path, files: Iterator[dict[str, Tensor]], count: int) -> None:
    """The weights of a checkpoint, one file after the other, with an index if there are several."""
    weight_map, total = {}, 0
    for number, tensors in enumerate(files, 1):
        name = "model.safetensors" if count == 1 else f"model-{number:05}-of-{count:05}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
        tensors.clear()  # before the next are gathered
    if count > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
