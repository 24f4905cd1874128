"""A GGUF file of the Llama family (Llama 1-3, Mistral, Yi, TinyLlama, SmolLM) as a Hugging Face directory.

    python -m data.gguf SmolLM2-135M-Instruct.Q4_1.gguf out=models/smollm2-135m

GGUF is llama.cpp's format: configuration, tokenizer, chat template and weights in one file. The weights are
dequantised by the gguf package and stay as exact as the file has them. What the format leaves open is taken as
transformers takes it: a sentencepiece text gets a space in front, the text behind a special token none. A key,
a tensor or a tokenizer that is not understood is refused in one line, never dropped.

Every count in the file is held against the bytes that are left before anything of that size is made (ggml's
docs/gguf.md). It lies in data/, not in checkpoints.py, because most of it is about the tokenizer.
"""
import json
import math
import mmap
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import NamedTuple, NoReturn

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from tqdm import tqdm

import runtime
from checkpoints import renamed, save_model
from data.tokenizer import check_vocabulary, load_tokenizer
from families import KEYS, LARGEST, read_config
from model import ModelConfig, Transformer, rotary_frequencies
from runtime import fail


@dataclass(frozen=True)
class Config:
    file: str                        # the .gguf file; the word `file=` may be left out
    out: str                         # folder for the Hugging Face directory, such as models/smollm2-135m


# ------------------------------------------------------------------------------------ the file's header

NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
AGAIN, DIRECTORY = "download it again", "take the model's Hugging Face directory"  # remedies


class Entry(NamedTuple):
    """A tensor of the file, its shape in PyTorch's order, and the bytes that hold it."""

    kind: str
    shape: tuple[int, ...]
    start: int
    size: int


class Header:
    """A file's `keys` and `tensors`; `at` is how far it has been read."""

    def __init__(self, file: Path, data: mmap.mmap):
        self.file, self.data, self.at = file, data, 4
        if data[:4] != b"GGUF":
            self.refuse("does not begin with GGUF, expected a .gguf file")
        version, tensors, keys = self._numbers("I")[0], *self._numbers("Q", 2)
        if version not in (2, 3):
            self.refuse(f"is version {version} of GGUF, expected 2 or 3 in little-endian order: convert it anew")
        self.keys: dict = {}
        for _ in range(keys):
            name = self._text()
            if name in self.keys:
                self.refuse(f"names {name} twice: {AGAIN}")
            self.keys[name] = self._value(name, self._numbers("I")[0])
        self.tensors = self._place([self._tensor() for _ in range(tensors)])

    def refuse(self, message: str) -> NoReturn:
        """One line, whatever the names in the file are made of."""
        fail("".join(c if c.isprintable() else " " for c in f"{self.file}: {message}"))

    def _take(self, size: int) -> int:
        """Where the next `size` bytes begin."""
        if size > len(self.data) - self.at:
            self.refuse(f"asks for {size:,} bytes from byte {self.at:,} on, but ends at {len(self.data):,}: {AGAIN}")
        self.at += size
        return self.at - size

    def _numbers(self, form: str, count: int = 1) -> tuple:
        return struct.unpack_from(f"<{count}{form}", self.data, self._take(count * struct.calcsize(form)))

    def _text(self) -> str:
        size = self._numbers("Q")[0]
        begin = self._take(size)
        try:
            return self.data[begin : begin + size].decode()
        except UnicodeDecodeError as error:
            self.refuse(f"the text at byte {begin:,} is not UTF-8 ({error.reason}): {AGAIN}")

    def _value(self, name: str, kind: int):
        if kind == STRING:
            return self._text()
        if kind in NUMBERS:
            return self._single(NUMBERS[kind], self._numbers(NUMBERS[kind]))[0]
        inner, count = self._numbers("I")[0], self._numbers("Q")[0] if kind == ARRAY else 0
        if count > LARGEST["vocab_size"]:
            self.refuse(f"{name} is a list of {count:,}, expected at most {LARGEST['vocab_size']:,}: {AGAIN}")
        if kind == ARRAY and inner in NUMBERS:
            return self._single(NUMBERS[inner], self._numbers(NUMBERS[inner], count))
        if kind == ARRAY and inner == STRING:
            return [self._text() for _ in range(count)]
        self.refuse(f"{name} is of kind {inner if kind == ARRAY else kind}, which GGUF does not have: {AGAIN}")

    @staticmethod
    def _single(form: str, values: tuple) -> list:
        """Floats of 32 bits as the shortest decimal that means the same: 1e-05, not 9.999999747378752e-06."""
        return [float(str(np.float32(value))) for value in values] if form == "f" else list(values)

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name, (dimensions,) = self._text(), self._numbers("I")
        if not 1 <= dimensions <= 4:
            self.refuse(f"tensor {name} has {dimensions} dimensions, expected 1 to 4: {AGAIN}")
        shape = self._numbers("Q", dimensions)[::-1]
        return name, shape, *self._numbers("I"), *self._numbers("Q")

    def _place(self, found: list[tuple[str, tuple[int, ...], int, int]]) -> dict[str, Entry]:
        """The tensors by name, each within the file, and together no larger than it."""
        gguf = package()
        alignment = self.keys.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= 2**16:
            self.refuse(f"general.alignment is {alignment!r}, expected a small power of two: {AGAIN}")
        begin = -(-self.at // alignment) * alignment
        tensors: dict[str, Entry] = {}
        for name, shape, number, offset in found:
            if name in tensors:
                self.refuse(f"holds tensor {name} twice: {AGAIN}")
            try:
                kind = gguf.GGMLQuantizationType(number)
            except ValueError:
                self.refuse(f"tensor {name} is of kind {number}, which this version of the gguf package does not "
                            "know: pip install --upgrade gguf")
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            size = math.prod(shape) // block * block_bytes
            if 0 in shape or shape[-1] % block or offset + size > len(self.data) - begin:
                self.refuse(f"tensor {name} of shape {list(shape)} as {kind.name} does not fit into the file, "
                            f"which ends {len(self.data) - begin - offset:,} bytes behind its beginning: {AGAIN}")
            tensors[name] = Entry(kind.name, shape, begin + offset, size)
        if sum(entry.size for entry in tensors.values()) > len(self.data) - begin:
            self.refuse(f"its tensors overlap: {AGAIN}")
        return tensors

    def get(self, name: str, kind: type, default=None):
        """The value of a key, `default` without it; of another type than `kind` it is refused."""
        value = self.keys.get(name, default)
        if value is not None and type(value) is not kind:
            self.refuse(f"{name} is a {type(value).__name__}, expected a {kind.__name__}: {AGAIN}")
        return value

    def whole(self, name: str, largest: int, default: int | None = None) -> int:
        value = self.get(name, int, default)
        if value is None or not 0 < value <= largest:
            self.refuse(f"{name} is {value}, expected a whole number from 1 to {largest:,}: {AGAIN}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self.get(name, int if type(self.keys.get(name)) is int else float, default)
        if value is None or not 0 < value < math.inf:
            self.refuse(f"{name} is {value}, expected a number above 0: {AGAIN}")
        return value


def package() -> ModuleType:
    """The gguf package, which knows every kind of quantisation: asked for where it is needed."""
    try:
        import gguf
    except ImportError:
        fail("a GGUF file needs the gguf package to be read: pip install gguf")
    return gguf


# --------------------------------------------------------------------------------------- config.json

# Keys of llama.cpp that say nothing about what is computed, or that are held against the tensors or the vocabulary.
KNOWN = ("block_count", "context_length", "embedding_length", "feed_forward_length", "attention.head_count",
         "attention.head_count_kv", "attention.key_length", "attention.value_length", "rope.dimension_count",
         "rope.freq_base", "attention.layer_norm_rms_epsilon", "vocab_size", "rope.scaling.type", "rope.scaling.factor",
         "rope.scaling.original_context_length", "rope.scaling.finetuned", "rope.scale_linear", "tensor_data_layout")
SCALES = ("rope.scaling.attn_factor", "logit_scale", "embedding_scale", "residual_scale")  # 1 changes nothing
SIZES = {"width": "embedding_length", "layers": "block_count", "heads": "attention.head_count",
         "mlp_width": "feed_forward_length", "max_positions": "context_length"}  # by our fields


def config_json(header: Header) -> dict:
    """The keys of transformers' LlamaConfig."""
    keys = header.keys
    if (architecture := header.get("general.architecture", str, "")) != "llama":
        header.refuse(f"general.architecture is {architecture!r}, expected 'llama': {DIRECTORY} (hf download)")
    if header.get("split.count", int, 1) > 1:
        header.refuse(f"is one of {keys['split.count']} parts: join them first (llama-gguf-split --merge)")
    for name in (name for name in keys if name.startswith("llama.")):
        neutral = (0, 1.0) if name.removeprefix("llama.") in SCALES else (0,)
        if name.removeprefix("llama.") not in KNOWN and keys[name] not in neutral:
            header.refuse(f"{name} is {str(keys[name])[:40]}, which is not supported: the model would compute "
                          "something else")
    sizes = {KEYS[field]: header.whole(f"llama.{name}", LARGEST[field]) for field, name in SIZES.items()}
    heads = sizes["num_attention_heads"]
    kv_heads = header.whole("llama.attention.head_count_kv", heads, heads)
    head_dim = header.whole("llama.attention.key_length", LARGEST["head_dim"], sizes["hidden_size"] // heads)
    for name in ("attention.value_length", "rope.dimension_count"):
        if (found := header.get(f"llama.{name}", int, head_dim)) != head_dim:
            header.refuse(f"llama.{name} is {found}, but heads have {head_dim} dimensions, all of which rotate: "
                          "not supported")
    rows = header.tensors["token_embd.weight"].shape[0] if "token_embd.weight" in header.tensors else None
    if rows is None or header.get("llama.vocab_size", int, rows) != rows or rows > LARGEST["vocab_size"]:
        header.refuse(f"llama.vocab_size is {keys.get('llama.vocab_size')}, but token_embd.weight has {rows} rows: "
                      f"{AGAIN}")
    biased = {name: any(tensor.endswith(f"{part}.bias") for tensor in header.tensors)
              for name, part in (("attention_bias", "attn_q"), ("mlp_bias", "ffn_up"))}
    theta = header.number("llama.rope.freq_base", 10000.0)
    return sizes | biased | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "vocab_size": rows, "hidden_act": "silu",
        "rms_norm_eps": header.number("llama.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "rope_theta": theta, "rope_scaling": rope_scaling(header, head_dim, theta),
        **{f"{key}_token_id": i for key, i in special_ids(header).items() if key in ("bos", "eos", "pad")}}


def rope_scaling(header: Header, head_dim: int, theta: float) -> dict | None:
    """Llama 3's scaling is kept as a tensor of divisors, the others as keys."""
    kind = header.get("llama.rope.scaling.type", str, "none")
    old = header.get("llama.rope.scale_linear", float, 1.0)
    kind = "linear" if kind == "none" and old != 1.0 else kind
    trained = "original_max_position_embeddings"
    if "rope_freqs.weight" in header.tensors:
        divisors = read_tensor(header, "rope_freqs.weight", (head_dim // 2,))
        found = {"rope_type": "llama3", "factor": float(divisors.max()), "low_freq_factor": 1.0,
                 "high_freq_factor": 4.0, trained: 8192}  # as in all of Llama 3.1 to 3.3, whose factors alone differ
        plain, scaled = (rotary_frequencies(ModelConfig(head_dim=head_dim, rope_theta=theta, rope_scaling=scaling))
                         for scaling in (None, found))
        if kind not in ("none", "llama3") or not torch.allclose(plain / scaled, divisors, rtol=1e-4):
            header.refuse("rope_freqs.weight is not the scaling of Llama 3.1 to 3.3, which alone is kept as a tensor: "
                          f"{DIRECTORY}")
        return found
    if kind == "none":
        return None
    if kind not in ("linear", "yarn"):
        header.refuse(f"llama.rope.scaling.type is {kind!r}, expected none, linear or yarn: not supported")
    found = {"rope_type": kind, "factor": header.number("llama.rope.scaling.factor", old if kind == "linear" else None)}
    if kind == "yarn":
        found[trained] = header.whole("llama.rope.scaling.original_context_length", LARGEST["max_positions"])
    return found


# ------------------------------------------------------------------------------------- the tokenizer

LONGEST = 4096  # letters of a token
NORMAL, UNKNOWN, CONTROL, USER, UNUSED, BYTE = range(1, 7)  # tokenizer.ggml.token_type
# How byte-level vocabularies cut text into words before merging, by tokenizer.ggml.pre; None: GPT-2's pattern.
LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")
TEKKEN = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
          r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
          r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
PATTERNS = {"llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3, "smaug-bpe": LLAMA3, "tekken": TEKKEN,
            "gpt-2": None, "default": None, "smollm": None}


def special_ids(header: Header) -> dict[str, int]:
    """BOS, EOS and so on; each an id of the vocabulary."""
    tokens, names = list_of(header, "tokens", str), {"unk": "unknown", "pad": "padding"}
    found = {key: header.get(f"tokenizer.ggml.{names.get(key, key)}_token_id", int)
             for key in ("bos", "eos", "unk", "pad", "eot", "eom")}
    found = {key: i for key, i in found.items() if i is not None}
    for key, i in found.items():
        if not 0 <= i < len(tokens):
            header.refuse(f"tokenizer.ggml.{names.get(key, key)}_token_id is {i}, but the vocabulary has {len(tokens)} "
                          f"tokens: {AGAIN}")
    return found


def list_of(header: Header, name: str, kind: type, length: int | None = None) -> list:
    """A list among the keys, of `kind` throughout and of the vocabulary's length."""
    values = header.get(f"tokenizer.ggml.{name}", list)
    if not values or type(values[0]) is not kind or length not in (None, len(values)):
        held = "nothing" if not values else f"{len(values):,} of {type(values[0]).__name__}"
        header.refuse(f"tokenizer.ggml.{name} holds {held}, expected "
                      f"{'one' if length is None else f'{length:,}'} of {kind.__name__} or more: {AGAIN}")
    return values


def build_tokenizer(header: Header) -> Tokenizer:
    """tokenizer.json: byte-level BPE ("gpt2") or sentencepiece's BPE ("llama")."""
    model = header.get("tokenizer.ggml.model", str, "")
    if model not in ("gpt2", "llama"):
        header.refuse(f"tokenizer.ggml.model is {model!r}, expected 'gpt2' (byte-level BPE) or 'llama' "
                      f"(sentencepiece): {DIRECTORY}")
    tokens = list_of(header, "tokens", str)
    ids = {token: i for i, token in enumerate(tokens)}
    if max(map(len, tokens)) > LONGEST:
        header.refuse(f"the vocabulary holds a token of {max(map(len, tokens)):,} letters, expected {LONGEST}: {AGAIN}")
    if len(ids) < len(tokens):
        twice = next(token for i, token in enumerate(tokens) if ids[token] != i)
        header.refuse(f"the vocabulary holds {twice!r} twice: {AGAIN}")
    types = (list_of(header, "token_type", int, len(tokens)) if "tokenizer.ggml.token_type" in header.keys
             else [NORMAL] * len(tokens))
    try:
        tokenizer = byte_level(header, ids) if model == "gpt2" else sentencepiece(header, ids, types)
        named = special_ids(header).values()
        special = [token for i, token in enumerate(tokens) if types[i] in (CONTROL, UNKNOWN) or i in named]
        users = [token for i, token in enumerate(tokens) if types[i] == USER]
        tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special if token])
        tokenizer.add_tokens([AddedToken(token, normalized=False) for token in users if token])
    except Exception as error:  # the library raises nothing narrower
        header.refuse(f"its vocabulary and merges are no tokenizer ({error}): {AGAIN}")
    if tokenizer.get_vocab_size() != len(tokens):
        header.refuse(f"its vocabulary and its added tokens do not go together: {AGAIN}")
    return tokenizer


def byte_level(header: Header, ids: dict[str, int]) -> Tokenizer:
    pre = header.get("tokenizer.ggml.pre", str, "default")
    if pre not in PATTERNS:
        header.refuse(f"tokenizer.ggml.pre is {pre!r}, expected one of {', '.join(PATTERNS)}: {DIRECTORY}")
    if pre == "default":
        print(f"{header.file}: does not say how its tokenizer cuts text into words (tokenizer.ggml.pre): as GPT-2's")
    merges, pattern = [tuple(merge.split(" ")) for merge in list_of(header, "merges", str)], PATTERNS[pre]
    # Llama 3's and Mistral's later vocabularies take a word that they hold whole as it is, whatever the merges make.
    tokenizer = Tokenizer(models.BPE(ids, merges, ignore_merges=pattern is not None))
    steps = [pre_tokenizers.Digits(individual_digits=True)] if pre == "smollm" else []  # each digit is a word
    steps += [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    steps += [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)]
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Sequence(steps), decoders.ByteLevel()
    return tokenizer


def sentencepiece(header: Header, ids: dict[str, int], types: list[int]) -> Tokenizer:
    if "tokenizer.ggml.merges" in header.keys:
        merges = [tuple(merge.split(" ")) for merge in list_of(header, "merges", str)]
    else:
        merges = scored_merges(list_of(header, "scores", float, len(ids)), ids, types)
    names = list(ids)
    unknown = special_ids(header).get("unk", next((i for i, kind in enumerate(types) if kind == UNKNOWN), None))
    tokenizer = Tokenizer(models.BPE(ids, merges, fuse_unk=True, byte_fallback=True,
                                     unk_token=None if unknown is None else names[unknown]))
    space = header.get("tokenizer.ggml.add_space_prefix", bool, True)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first" if space else "never", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
                                           *([decoders.Strip(" ", 1, 0)] if space else [])])
    return tokenizer


def scored_merges(scores: list[float], ids: dict[str, int], types: list[int]) -> list[tuple[str, str]]:
    """The pair that makes the token of the highest score merges first, of equal ones the pair with the longer left."""
    unmade = {token for token, i in ids.items() if types[i] in (UNKNOWN, CONTROL, BYTE, UNUSED)}  # never made of text
    merges = []
    for token, i in ids.items():
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))] if token not in unmade else []
        merges += [(scores[i], len(left), left, right) for left, right in pairs
                   if left in ids and right in ids and not unmade & {left, right}]
    return [merge[2:] for merge in sorted(merges, key=lambda merge: merge[:2], reverse=True)]


def write_tokenizer(header: Header, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json and generation_config.json."""
    tokenizer, ids = build_tokenizer(header), special_ids(header)
    tokens = header.keys["tokenizer.ggml.tokens"]
    if "eos" not in ids:
        header.refuse(f"names no tokenizer.ggml.eos_token_id, expected the token that ends a reply: {DIRECTORY}")
    # llama.cpp begins texts with BOS where the file does not say, if the vocabulary is sentencepiece's or Llama 3's.
    begins = (header.keys["tokenizer.ggml.model"] == "llama"
              or PATTERNS.get(header.keys.get("tokenizer.ggml.pre")) == LLAMA3)
    adds = {key: header.get(f"tokenizer.ggml.add_{key}_token", bool, key == "bos" and begins) and key in ids
            for key in ("bos", "eos")}
    if any(adds.values()):
        bos, eos = ([tokens[ids[key]]] * adds[key] for key in ("bos", "eos"))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[*bos, "$A", *eos], pair=[*bos, "$A", *eos, *(f"{token}:1" for token in bos), "$B:1", *eos],
            special_tokens=[(tokens[ids[key]], ids[key]) for key in adds if adds[key]])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                **{f"{key}_token": tokens[ids[key]] for key in ("bos", "eos", "unk", "pad") if key in ids},
                **{f"add_{key}_token": value for key, value in adds.items()}}
    prefix = "tokenizer.chat_template"
    named = {name.removeprefix(f"{prefix}.") if name != prefix else "default": header.get(name, str)
             for name in header.keys if name == prefix or name.startswith(f"{prefix}.")}
    if named:
        settings["chat_template"] = (named["default"] if list(named) == ["default"] else
                                     [{"name": name, "template": text} for name, text in named.items()])
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1))
    ends = list(dict.fromkeys(ids[key] for key in ("eos", "eot", "eom") if key in ids))
    (folder / "generation_config.json").write_text(json.dumps(
        {"eos_token_id": ends} | {f"{key}_token_id": ids[key] for key in ("bos", "pad") if key in ids}, indent=1))


# --------------------------------------------------------------------------------------- the weights

# What llama.cpp calls our modules.
NAMES = {"embed_tokens": "token_embd", "layers": "blk", "norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def read_tensor(header: Header, name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor in fp32."""
    entry, gguf = header.tensors[name], package()
    if entry.shape != shape:
        header.refuse(f"tensor {name} has shape {list(entry.shape)}, its keys say {list(shape)}: {AGAIN}")
    kind = gguf.GGMLQuantizationType[entry.kind]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    stored = np.frombuffer(header.data, np.uint8, entry.size, entry.start)
    try:
        values = gguf.dequantize(stored.reshape(*shape[:-1], shape[-1] // block * block_bytes), kind)
    except NotImplementedError:
        header.refuse(f"tensor {name} is stored as {entry.kind}, which the gguf package does not dequantise: "
                      "take another file of the model, such as Q8_0")
    tensor = torch.tensor(values, dtype=torch.float32)
    if not tensor.isfinite().all():
        header.refuse(f"tensor {name} holds values that are not finite: {AGAIN}")
    return tensor


def undo_permutation(weight: Tensor, heads: int) -> Tensor:
    """Queries or keys with the two halves of each head's rotary pairs apart, as Hugging Face has them; GGUF has them
    next to each other. [H E, ...]"""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).reshape(weight.shape)


def read_weights(header: Header, model: Transformer, dtype: torch.dtype | None = None) -> torch.dtype:
    """Fill the model, tensor by tensor; returns the weights' type, the smallest that loses nothing."""
    expected = {renamed(name, NAMES): name for name, _ in model.named_parameters()}
    left = header.tensors.keys() - expected.keys() - {"rope_freqs.weight"}
    for why, names in (("lacks", expected.keys() - header.tensors.keys()), ("holds", left)):
        if names:
            header.refuse(f"{why} tensor {min(names)}, unlike a Llama of {model.config.layers} layers: {AGAIN}, or "
                          f"{DIRECTORY}")
    kinds = {header.tensors[name].kind for name in expected}
    dtype = dtype or next((small for kind, small in (("BF16", torch.bfloat16), ("F16", torch.float16))
                           if kind in kinds <= {kind, "F32"}), torch.float32)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    for source, name in tqdm(expected.items(), desc="tensors", leave=False, disable=None):
        tensor = read_tensor(header, source, shapes[name])
        for part, heads in (("q_proj", model.config.heads), ("k_proj", model.config.kv_heads)):
            tensor = undo_permutation(tensor, heads) if part in name else tensor
        if not torch.equal(tensor.to(dtype).float(), tensor):
            return read_weights(header, model, torch.float32)  # norms are kept in fp32, and these need it
        where, _, kind = name.rpartition(".")
        setattr(model.get_submodule(where), kind, nn.Parameter(tensor.to(dtype), requires_grad=False))
    return dtype


def convert(config: Config) -> None:
    file, out = Path(config.file), Path(config.out)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        fail(f"{out}: is there already: choose another out=, or delete it")
    package()
    try:
        with file.open("rb") as stream:
            data = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        fail(f"{file}: cannot be read ({getattr(error, 'strerror', None) or error}): check the path")
    header = Header(file, data)
    described = config_json(header)
    with TemporaryDirectory() as folder:  # the parts that are small, read back as any checkpoint's are
        (Path(folder) / "config.json").write_text(json.dumps(described))
        write_tokenizer(header, Path(folder))
        tokenizer, read = load_tokenizer(folder), read_config(folder)
        with torch.device("meta"):
            model = Transformer(read)
        if tokenizer.vocabulary.size > read.vocab_size:
            header.refuse(f"the vocabulary has {tokenizer.vocabulary.size} tokens, the embedding {read.vocab_size} "
                          f"rows: {AGAIN}")
        dtype = read_weights(header, model)
        check_vocabulary(model, tokenizer)
        runtime.open_folder(str(out.parent))
        save_model(model, out, tokenizer, dtype=dtype)
    count = sum(parameter.numel() for parameter in model.parameters())
    kinds = " ".join(sorted({entry.kind for entry in header.tensors.values()}))
    licence = f", licence {header.keys['general.license']}" if "general.license" in header.keys else ""
    print(f"{out}: {count / 1e6:.1f} M parameters from {kinds} as {str(dtype).removeprefix('torch.')}, "
          f"template {tokenizer.template or 'none'}{licence}")


if __name__ == "__main__":
    words = sys.argv[1:]
    if words and not words[0].startswith("-") and "=" not in words[0]:
        words[0] = f"file={words[0]}"
    convert(runtime.load_config(Config, __doc__, words))
