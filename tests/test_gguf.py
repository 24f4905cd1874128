"""data/gguf.py against what transformers 5.23 reads out of the same tiny files (fixtures/gguf)."""
import json
import mmap
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import FIXTURES, ROOT, exits, metrics_of, write_jsonl
from safetensors.torch import load_file

import dpo
from checkpoints import load_model
from data import gguf
from data.gguf import Config, Header, convert, undo_permutation
from data.tokenizer import load_tokenizer
from families import read_config
from model import rotary_frequencies

FILES = FIXTURES / "gguf"
NAMES = ("byte_level", "sentencepiece", "k_quants")
EXPECTED = json.loads((FILES / "expected.json").read_text())
LOGITS = load_file(FILES / "expected.safetensors")


@pytest.fixture(scope="module")
def converted(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("converted")
    for name in NAMES:
        convert(Config(str(FILES / f"{name}.gguf"), str(folder / name)))
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_transformers(converted, name):
    model = load_model(converted / name)
    for i, row in enumerate(EXPECTED[name]["rows"]):
        logits = model(torch.tensor([row]))[0]
        torch.testing.assert_close(logits, LOGITS[f"{name}.{i}"], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_texts_become_the_tokens_that_transformers_makes_of_them(converted, name):
    tokenizer = load_tokenizer(converted / name)
    for text, ids, decoded in zip(EXPECTED["texts"], EXPECTED[name]["ids"], EXPECTED[name]["decoded"], strict=True):
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.vocabulary.decode(ids) == decoded
    start = [tokenizer.bos_id] * tokenizer.adds_bos
    assert start + tokenizer.encode("hi") == EXPECTED[name]["with_special"]


@pytest.mark.parametrize("name", NAMES)
def test_the_template_is_the_files_own(converted, name):
    """The dialogue has tokens of its own for every turn, so ids agree although ours are made turn by turn."""
    tokenizer = load_tokenizer(converted / name)
    assert tokenizer.template == "own"
    assert tokenizer.chat.render(EXPECTED["dialogue"], True) == EXPECTED[name]["rendered"]
    ids, loss = tokenizer.render(EXPECTED["dialogue"], add_generation_prompt=True)
    if name != "sentencepiece":  # whose "[INST]" stands beside words
        assert ids == EXPECTED[name]["rendered_ids"]
    replies = [i for i, learnt in zip(ids, loss, strict=True) if learnt]
    assert tokenizer.decode(replies).strip() == "Hello!" and replies[-1] == tokenizer.eos_id
    assert tokenizer.stop_ids() == (2,)


def test_rows_beyond_the_vocabulary_stay(converted):
    assert read_config(converted / "sentencepiece").vocab_size == 384
    assert load_tokenizer(converted / "sentencepiece").vocabulary.size == 360


def test_half_the_rotary_pairs_apart():
    """Two heads of width 4: GGUF has the pairs (0, 2), (1, 3) next to each other, so rows 0 2 1 3."""
    stored = torch.tensor([0, 2, 1, 3, 4, 6, 5, 7]).float()
    assert undo_permutation(stored, 2).tolist() == list(range(8))


# ------------------------------------------------------------------------------------- files made anew

def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(held) -> bytes:
    """A key's kind and value: int as u32, float as f32."""
    for kind, form, of in ((bool, "?", 7), (int, "I", 4), (float, "f", 6)):
        if type(held) is kind:
            return struct.pack(f"<I{form}", of, held)
    if isinstance(held, str):
        return struct.pack("<I", 8) + text(held)
    if isinstance(held[0], str):
        return struct.pack("<IIQ", 9, 8, len(held)) + b"".join(map(text, held))
    form, of = ("f", 6) if type(held[0]) is float else ("i", 5)
    return struct.pack(f"<IIQ{len(held)}{form}", 9, of, len(held), *held)


def read(name: str) -> Header:
    file = FILES / f"{name}.gguf"
    with file.open("rb") as stream:
        return Header(file, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ))


def rewrite(path: Path, name: str = "byte_level", tensors: dict | None = None, halves: bool = False,
            **changes) -> Path:
    """One of the files with other keys (None: without; "llama__x" is llama.x) and other tensors, in fp32 or, of
    matrices, bfloat16 (None: without)."""
    header, package, tensors = read(name), gguf.package(), tensors or {}
    keys = header.keys | {key.replace("__", "."): held for key, held in changes.items()}
    keys = {key: held for key, held in keys.items() if held is not None}
    table, weights, count = b"", b"", 0
    for tensor in dict.fromkeys((*header.tensors, *tensors)):
        if tensor not in tensors:
            entry = header.tensors[tensor]
            kind, shape = package.GGMLQuantizationType[entry.kind], entry.shape
            stored = header.data[entry.start : entry.start + entry.size]
        elif tensors[tensor] is None:
            continue
        else:
            shape = tensors[tensor].shape
            kind = package.GGMLQuantizationType["BF16" if halves and len(shape) == 2 else "F32"]
            stored = package.quantize(tensors[tensor].astype(np.float32), kind).tobytes()
        table += text(tensor) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], kind, len(weights))
        weights += stored + bytes(-len(stored) % 32)
        count += 1
    head = b"GGUF" + struct.pack("<IQQ", 3, count, len(keys))
    head += b"".join(text(key) + value(held) for key, held in keys.items()) + table
    path.write_bytes(head + bytes(-len(head) % 32) + weights)
    return path


def test_a_file_made_anew_is_the_same(tmp_path, converted):
    convert(Config(str(rewrite(tmp_path / "a.gguf")), str(tmp_path / "a")))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (converted / "byte_level" / file).read_bytes()


def test_llama_3_scaling_is_found_in_its_tensor(tmp_path):
    """Head width 8, base 500,000: waves of 2 pi 500,000^(i / 4) tokens, 6.3, 167, 4,443 and 118,141. Shorter than
    8192 / 4 = 2048 they stay, longer than 8192 they turn 8 times slower; 4,443 lies between, at
    (8192 / 4443 - 1) / 3 = 0.2813: 1 / (0.7187 / 8 + 0.2813) = 2.6946."""
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    between = (8192 / (2 * np.pi * 500000**0.5) - 1) / 3
    divisors = torch.tensor([1, 1, 1 / ((1 - between) / 8 + between), 8])
    assert divisors[2].item() == pytest.approx(2.6946, rel=1e-4)
    tensors = {"rope_freqs.weight": divisors.numpy()}
    file = rewrite(tmp_path / "a.gguf", tensors=tensors, llama__rope__freq_base=500000.0)
    convert(Config(str(file), str(tmp_path / "a")))
    config = read_config(tmp_path / "a")
    assert config.rope_scaling == scaling | {"rope_type": "llama3"}
    inverse = 500000.0 ** (-torch.arange(4) / 4)
    torch.testing.assert_close(rotary_frequencies(config), inverse / divisors, rtol=1e-5, atol=0)


def test_other_scalings_are_keys(tmp_path):
    linear = rewrite(tmp_path / "a.gguf", llama__rope__scaling__type="linear", llama__rope__scaling__factor=4.0)
    convert(Config(str(linear), str(tmp_path / "a")))
    assert read_config(tmp_path / "a").rope_scaling == {"rope_type": "linear", "factor": 4.0}
    yarn = rewrite(tmp_path / "b.gguf", llama__rope__scaling__type="yarn", llama__rope__scaling__factor=4.0,
                   llama__rope__scaling__original_context_length=32)
    convert(Config(str(yarn), str(tmp_path / "b")))
    scaling = read_config(tmp_path / "b").rope_scaling
    assert (scaling["rope_type"], scaling["factor"], scaling["original_max_position_embeddings"]) == ("yarn", 4.0, 32)


@pytest.mark.parametrize("norm, dtype", [(1.5, "bfloat16"), (1.0001, "float32")])
def test_halves_stay_halves_where_nothing_is_lost(tmp_path, norm, dtype):
    """1.5 is a bfloat16, 1.0001 is not: a norm that has it makes the whole model fp32."""
    tensors = {name: np.full(entry.shape, 1.5) for name, entry in read("byte_level").tensors.items()}
    file = rewrite(tmp_path / "a.gguf", tensors=tensors | {"output_norm.weight": np.full(32, norm)}, halves=True)
    convert(Config(str(file), str(tmp_path / "a")))
    assert read_config(tmp_path / "a").dtype == dtype
    assert load_model(tmp_path / "a").norm.weight.unique().item() == pytest.approx(norm, abs=1e-6)


def test_llama_3_tokenizers_begin_texts_with_bos_where_the_file_does_not_say(tmp_path):
    file = rewrite(tmp_path / "a.gguf", tokenizer__ggml__pre="llama-bpe", tokenizer__ggml__add_bos_token=None)
    convert(Config(str(file), str(tmp_path / "a")))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.adds_bos and tokenizer.vocabulary.adds_bos and tokenizer.bos_id == 1


def test_several_tokens_may_end_a_reply(tmp_path):
    convert(Config(str(rewrite(tmp_path / "a.gguf", tokenizer__ggml__eot_token_id=0)), str(tmp_path / "a")))
    assert load_tokenizer(tmp_path / "a").stop_ids() == (2, 0)


def test_a_text_without_a_space_in_front(tmp_path):
    convert(Config(str(rewrite(tmp_path / "a.gguf", "sentencepiece", tokenizer__ggml__add_space_prefix=False)),
                   str(tmp_path / "a")))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.vocabulary.decode(tokenizer.encode("hi")) == "hi"
    assert tokenizer.vocabulary.names[tokenizer.encode("hi")[0]][0] == "h"


def test_merges_of_the_file_come_before_those_of_the_scores(tmp_path):
    """"▁t" alone is merged, so "the" stays letters."""
    file = rewrite(tmp_path / "a.gguf", "sentencepiece", tokenizer__ggml__merges=["▁ t"], tokenizer__ggml__scores=None)
    convert(Config(str(file), str(tmp_path / "a")))
    tokenizer = load_tokenizer(tmp_path / "a")
    assert [tokenizer.vocabulary.names[i] for i in tokenizer.encode("the")] == ["▁t", "h", "e"]


def test_a_scale_of_one_changes_nothing_and_another_is_refused(tmp_path, capsys):
    file = rewrite(tmp_path / "a.gguf", llama__logit_scale=1.0, llama__expert_count=0)
    convert(Config(str(file), str(tmp_path / "a")))
    file = rewrite(tmp_path / "b.gguf", llama__logit_scale=0.5)
    exits(capsys, lambda: convert(Config(str(file), str(tmp_path / "b"))), "llama.logit_scale is 0.5")


def test_a_gguf_file_in_place_of_a_model_says_what_to_do(capsys):
    file = FILES / "byte_level.gguf"
    for read_it in (load_tokenizer, load_model):
        exits(capsys, lambda read_it=read_it: read_it(file), f"{file}: is a GGUF file: python -m data.gguf {file}")


def test_the_spelling_of_a_control_token_is_letters(converted):
    """Also where the vocabulary holds pieces of which the merges could make it."""
    for name in NAMES:
        tokenizer = load_tokenizer(converted / name)
        for special in tokenizer.special:
            assert not set(tokenizer.encode(f"a{special}b")) & tokenizer._guarded


# ----------------------------------------------------------------------------------------- bad files

BROKEN = {
    "architecture": (dict(general__architecture="mamba"), "general.architecture is 'mamba'"),
    "split": (dict(split__count=3), "one of 3 parts"),
    "unknown key": (dict(llama__expert_count=8), "llama.expert_count is 8"),
    "huge": (dict(llama__block_count=2**31), "llama.block_count is 2147483648"),
    "layers": (dict(llama__block_count=3), "lacks tensor blk.2.attn_k.weight"),
    "width": (dict(llama__embedding_length=64), "has shape [", "its keys say [341, 64]"),
    "heads": (dict(llama__attention__head_count_kv=5), "llama.attention.head_count_kv is 5"),
    "kind": (dict(llama__block_count="two"), "llama.block_count is a str, expected a int"),
    "partial rotary": (dict(llama__rope__dimension_count=4), "llama.rope.dimension_count is 4"),
    "rows": (dict(llama__vocab_size=9), "llama.vocab_size is 9"),
    "epsilon": (dict(llama__attention__layer_norm_rms_epsilon=float("nan")), "layer_norm_rms_epsilon is nan"),
    "scaling": (dict(llama__rope__scaling__type="longrope"), "'longrope'"),
    "scaling factor": (dict(llama__rope__scaling__type="linear", llama__rope__scaling__factor=-1.0), "factor is -1.0"),
    "tokenizer": (dict(tokenizer__ggml__model="t5"), "tokenizer.ggml.model is 't5'"),
    "pre": (dict(tokenizer__ggml__pre="hindi"), "tokenizer.ggml.pre is 'hindi'"),
    "types": (dict(tokenizer__ggml__token_type=[1, 1]), "tokenizer.ggml.token_type holds 2 of int, expected 341"),
    "no tokens": (dict(tokenizer__ggml__tokens=None), "tokenizer.ggml.tokens holds nothing"),
    "no merges": (dict(tokenizer__ggml__merges=None), "tokenizer.ggml.merges holds nothing"),
    "merges": (dict(tokenizer__ggml__merges=["a b c", "never seen"]), "are no tokenizer"),
    "eos": (dict(tokenizer__ggml__eos_token_id=9999), "eos_token_id is 9999, but the vocabulary has 341"),
    "no eos": (dict(tokenizer__ggml__eos_token_id=None), "names no tokenizer.ggml.eos_token_id"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_not_understood_is_one_line(tmp_path, capsys, case):
    changes, *said = BROKEN[case]
    file = rewrite(tmp_path / "a.gguf", **changes)
    exits(capsys, lambda: convert(Config(str(file), str(tmp_path / "a"))), str(file), *said)
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("tensors, said", [
    ({"blk.0.attn_q.weight": None}, "lacks tensor blk.0.attn_q.weight"),
    ({"blk.0.ffn_gate_inp.weight": np.ones((4, 32))}, "holds tensor blk.0.ffn_gate_inp.weight"),
    ({"blk.1.attn_q.bias": np.ones(32)}, "lacks tensor blk.0.attn_k.bias"),
    ({"output_norm.weight": np.full(32, np.nan)}, "tensor output_norm.weight holds values that are not finite"),
    ({"output_norm.weight": np.ones(31)}, "tensor output_norm.weight has shape [31], its keys say [32]"),
    ({"rope_freqs.weight": np.array([1.0, 2, 3, 4])}, "rope_freqs.weight is not the scaling"),
    ({"token_embd.weight": None}, "token_embd.weight has None rows"),
    ({"token_embd.weight": np.ones((300, 32))}, "the vocabulary has 341 tokens, the embedding 300 rows"),
])
def test_tensors_that_are_not_those_of_the_model_are_one_line(tmp_path, capsys, tensors, said):
    file = rewrite(tmp_path / "a.gguf", tensors=tensors, llama__vocab_size=None)
    exits(capsys, lambda: convert(Config(str(file), str(tmp_path / "a"))), str(file), said)
    assert not (tmp_path / "a").exists()


def test_every_way_to_cut_a_file_short_is_one_line(tmp_path, capsys):
    whole = (FILES / "byte_level.gguf").read_bytes()
    file = tmp_path / "a.gguf"
    for length in [0, 3, 4, 20, *range(24, len(whole), 997), len(whole) - 33]:
        file.write_bytes(whole[:length])
        exits(capsys, lambda: convert(Config(str(file), str(tmp_path / "a"))), str(file))


def test_no_changed_byte_of_the_header_is_a_traceback(tmp_path, capsys):
    """Most changes are refused; some (a letter of a token) make another file that is whole."""
    whole = bytearray((FILES / "byte_level.gguf").read_bytes())
    rng, refused, file = np.random.default_rng(0), 0, tmp_path / "a.gguf"
    for at in rng.integers(0, 14_000, 60):
        changed = bytearray(whole)
        changed[at] ^= 1 << rng.integers(0, 8)
        file.write_bytes(changed)
        try:
            convert(Config(str(file), str(tmp_path / f"out{at}")))
        except SystemExit as left:
            assert left.code == 2
            refused += 1
        assert len(capsys.readouterr().err.splitlines()) <= 1
    assert refused > 5


@pytest.mark.parametrize("count", [2**33, 2**62])
def test_a_count_beyond_the_file_takes_no_memory(tmp_path, capsys, count):
    """A list of so many numbers, or texts, in a file of 50 bytes; and one of bytes that the file has."""
    for inner in (4, 8):
        head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<IIQ", 9, inner, count)
        (tmp_path / "a.gguf").write_bytes(head)
        exits(capsys, lambda: convert(Config(str(tmp_path / "a.gguf"), str(tmp_path / "a"))), "x is a list of")
    count = 2**24 + 1
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + struct.pack("<IIQ", 9, 0, count) + bytes(count)
    (tmp_path / "a.gguf").write_bytes(head)
    exits(capsys, lambda: convert(Config(str(tmp_path / "a.gguf"), str(tmp_path / "a"))), "x is a list of 16,777,217")


def test_overlapping_tensors_are_refused(tmp_path, capsys):
    """Two tensors of 1,024 bytes at one place, in a file that has room for one."""
    table = b"".join(text(name) + struct.pack("<IQIQ", 1, 256, 0, 0) for name in "ab")
    head = b"GGUF" + struct.pack("<IQQ", 3, 2, 0) + table
    (tmp_path / "a.gguf").write_bytes(head + bytes(-len(head) % 32) + bytes(1024))
    exits(capsys, lambda: convert(Config(str(tmp_path / "a.gguf"), str(tmp_path / "a"))), "its tensors overlap")


def test_a_folder_that_holds_something_is_left_alone(tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "notes.txt").write_text("mine")
    exits(capsys, lambda: convert(Config(str(FILES / "byte_level.gguf"), str(tmp_path / "a"))), "is there already")
    assert (tmp_path / "a" / "notes.txt").read_text() == "mine"


def test_without_the_gguf_package_one_line_names_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    exits(capsys, lambda: convert(Config(str(FILES / "byte_level.gguf"), str(tmp_path / "a"))), "pip install gguf")


def test_the_command(tmp_path, capsys):
    """python -m data.gguf FILE out=FOLDER"""
    command = [sys.executable, "-m", "data.gguf", FILES / "byte_level.gguf", f"out={tmp_path / 'deep' / 'a'}"]
    made = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    assert "template own, licence mit" in made.stdout
    assert (tmp_path / "deep" / "a" / "model.safetensors").is_file()


# ------------------------------------------------------------------------------------------ training

def test_one_step_of_dpo(converted, tmp_path):
    """A policy equal to its reference: log 2."""
    pairs = write_jsonl(tmp_path / "pairs.jsonl", [
        {"prompt": "What is the capital of France?", "chosen": "Paris.", "rejected": "The moon."},
        {"prompt": "How are you?", "chosen": "Fine, and you?", "rejected": "No."}])
    dpo.main(dpo.Config(
        model=str(converted / "byte_level"), data=str(pairs), out=str(tmp_path / "run"), batch=2, max_steps=2,
        max_length=128, lora_rank=4, lr=1e-2, warmup_ratio=0.0, cache="", samples=0, threads=1, device="cpu"))
    first, second = metrics_of(tmp_path / "run")
    assert first["loss"] == pytest.approx(0.6931, abs=1e-4) and second["loss"] < first["loss"]
    assert load_tokenizer(tmp_path / "run" / "model").template == "own"
