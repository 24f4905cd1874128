"""Files from strangers: 500 seeded mutations of each kind are read, or refused in one line, within 2 s and 1 GB each.

    MUTATIONS=5000 python -m pytest tests/test_hunt.py     more of them, to benchmarks/results/hunt.json

Values change their type or become huge, tiny, NaN, nested 100,000 deep; keys go, come twice, or come from elsewhere;
bytes are cut off, flipped, or in another encoding. Each kind is read in a process of its own, whose memory is limited.
"""
import contextlib
import copy
import io
import json
import os
import random
import resource
import shutil
import struct
import traceback
from collections import Counter
from pathlib import Path

import pytest
import torch
from conftest import BASE, FIXTURES, ROOT, exits, write_jsonl
from test_peft_files import written

import adapters
import sft
from checkpoints import check_weights, load_model, read_config
from data.tokenizer import TemplateError, adopt_template, check_vocabulary, load_tokenizer
from model import Transformer
from peft_files import matches
from runtime import config_toml, load_config
from runtime.sandbox import try_out

MUTATIONS = int(os.environ.get("MUTATIONS", "500"))
SECONDS, BYTES = 2, 2**30
MODELS = FIXTURES / "models"
STRANGE = [None, True, False, 0, -1, 1, 3, 2**31, 2**63, 4_000_000_000, 10**400, 0.5, -0.5, 1e-320, 1e308, float("nan"),
           float("inf"), "", "a", "</s>", "x" * 5000, "a\0b", "a\ud800b", "é世", "line\nline\x1b[2J", "{{ 1 / 0 }}",
           "(" * 999,
           [], [1], ["a"], [[[]]], [None, {}], [4_000_000_000], {}, {"a": 1}, {"content": "a"}, {"content": 5},
           {"5": {"content": "b"}}, {"4000000000": {"content": "a"}}, {"type": "yarn", "factor": 1e300},
           {"rope_type": "llama3"}, {"default": 5}, [{"name": "default", "template": "{{ messages[0] }}"}]]
# Keys that are read, for files that do not have them
MORE = {
    "config.json": "rope_scaling rope_parameters layer_types sliding_window head_dim num_key_value_heads n_inner "
                   "rope_theta architectures torch_dtype dtype score_std score_mean tie_word_embeddings auto_map "
                   "quantization_config num_kv_heads multi_query new_decoder_architecture parallel_attn "
                   "partial_rotary_factor",
    "tokenizer_config.json": "added_tokens_decoder chat_template bos_token eos_token pad_token extra_special_tokens "
                             "add_bos_token add_prefix_space legacy tokenizer_class model_specific_special_tokens",
    "generation_config.json": "eos_token_id bos_token_id", "tokenizer.json": "truncation padding added_tokens",
    "adapter_config.json": " ".join(adapters.DEFAULTS) + " layer_replication bias",
    "config.toml": "columns lr seed", "header": "__metadata__"}


# --------------------------------------------------------------------------------------- the mutations

def places(value) -> list:
    """Every container of a JSON value with each of its keys."""
    found = [(value, key) for key in (value if isinstance(value, dict) else range(len(value)))]
    return found + [place for container, key in found if isinstance(container[key], (dict, list)) and container[key]
                    for place in places(container[key])]


def mutate_value(value: dict, rng: random.Random, more: list[str]) -> dict:
    """One to three of its values changed, at any depth; often at the top, where most of what is read stands."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        found = places(value)
        if not found:
            return value
        container, key = rng.choice(found if rng.random() < 0.5 else [place for place in found if place[0] is value])
        how = rng.randrange(6)
        if how == 0:
            del container[key]
        elif how == 1:
            value[rng.choice(more)] = copy.deepcopy(rng.choice(STRANGE))
        elif how == 2:
            container[key] = copy.deepcopy(container[rng.choice([k for c, k in found if c is container])])
        elif how == 3 and type(container[key]) in (int, float) and abs(container[key]) < 2**60:
            near = container[key]
            container[key] = rng.choice([-near, near + 1, near * 10**9, near + 0.5, str(near)])
        else:
            container[key] = copy.deepcopy(rng.choice(STRANGE))
    return value


def mutate_text(text: str, rng: random.Random) -> str:
    """What no parser gives: a key twice, nesting and numbers without end."""
    how, at = rng.randrange(4), rng.randrange(len(text) + 1)
    if how == 0:
        return text.replace("{", '{"model_type": "llama", "model_type": 1, ', 1)
    if how == 1:
        return text[:at] + rng.choice("[{(") * 100_000 + text[at:]
    colons = [i for i, letter in enumerate(text) if letter in ":="]
    if not colons:
        return text + ","
    at = rng.choice(colons) + 1
    return text[:at] + rng.choice([" " + "9" * 5000 + ",", " NaN,", " 1e99999,", "[" * 9999, ' "\\ud800",']) + text[at:]


def mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    how, at = rng.randrange(5), rng.randrange(len(data) + 1)
    if how == 0:
        return data[:at]
    if how == 1:
        return data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
    if how == 2:
        return data[:at] + rng.choice([b"\0", b"\xff", b"\xe9", b"}", b'"', b","]) + data[at:]
    return data.decode("latin-1").encode("utf-16" if how == 3 else "utf-8-sig")


def mutations(kind: str, value: dict, write, count: int):
    """`count` files as bytes, of which half are whole files with other values."""
    for i in range(count):
        rng = random.Random(f"{kind} {i}")
        text = write(mutate_value(value, rng, MORE[kind].split()))
        if rng.random() < 0.25:
            text = mutate_text(text, rng)
        data = text.encode("utf-8", "surrogatepass")
        yield mutate_bytes(data, rng) if rng.random() < 0.25 else data


# ------------------------------------------------------------------------------------- what reads them

MODEL = {}  # loaded once, by the number of the folder that is mutated


def read_model_config(folder: Path) -> None:
    with torch.device("meta"):
        check_weights(folder, Transformer(read_config(folder)))
    load_model(folder)


def read_tokenizer(folder: Path) -> None:
    """As a training script does, to the end: what is read is written too."""
    tokenizer = load_tokenizer(folder)
    model = copy.deepcopy(MODEL[folder.parent.name])
    check_vocabulary(model, tokenizer)
    with contextlib.suppress(TemplateError, ValueError):  # of a record, which its reader names
        tokenizer.render([{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yes."}])
    adopt_template(model, tokenizer, "zephyr")
    tokenizer.render([{"role": "user", "content": "Hi é"}, {"role": "assistant", "content": "Yes."}])
    tokenizer.decode(tokenizer.encode("Hi é </s>"))
    tokenizer.save(folder.with_name("saved"))


def read_generation(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    tokenizer.stop_ids()
    tokenizer.save(folder.with_name("saved"))


def read_adapter(folder: Path) -> None:
    adapters.load_adapter(copy.deepcopy(MODEL["base"]), folder)


def read_toml(folder: Path) -> None:
    load_config(sft.Config, "", ["--config", str(folder / "config.toml")])


def toml(value: dict) -> str:
    return "".join(f"{json.dumps(key)} = {json.dumps(x)}\n" for key, x in value.items())


def header_of(file: Path) -> tuple[dict, bytes]:
    data = file.read_bytes()
    (size,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + size]), data[8 + size :]


KINDS = {  # of each: the models it is tried with, the file, what reads it
    "config.json": ([*(MODELS / name for name in ("llama2", "qwen2", "falcon7b", "falcon40b", "gpt_bigcode", "gpt_neox",
                                                  "gemma", "mistral")), FIXTURES / "configs" / "llama_yarn"],
                    "config.json", read_model_config),
    "tokenizer_config.json": ([MODELS / "qwen2", MODELS / "llama2"], "tokenizer_config.json", read_tokenizer),
    "generation_config.json": ([MODELS / "qwen2"], "generation_config.json", read_generation),
    "tokenizer.json": ([MODELS / "qwen2", MODELS / "yi"], "tokenizer.json", read_tokenizer),
    "adapter_config.json": (["one_layer", "regex", "rows"], "adapter_config.json", read_adapter),
    "config.toml": ([BASE], "config.toml", read_toml),
    "header": ([MODELS / "llama2"], "model.safetensors", read_model_config),
}


def prepared(kind: str, source, folder: Path) -> Path:
    """A folder that is whole, but for the file that is mutated."""
    folder.parent.mkdir()
    if kind == "adapter_config.json":
        return written(source, folder)
    shutil.copytree(source, folder)
    if kind == "config.toml":
        (folder / "config.toml").write_text(config_toml(sft.Config()))
    return folder


def hunt(kind: str, folder: Path, count: int) -> dict:
    """Read the mutations; how many were refused, and the first that were not refused as they should be."""
    resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + BYTES, resource.RLIM_INFINITY))
    sources, name, read = KINDS[kind]
    MODEL["base"] = load_model(MODELS / "llama2", dtype=torch.float32)
    outcomes, faults, slowest = Counter(), [], 0.0
    for n, source in enumerate(sources):
        place = prepared(kind, source, folder / str(n) / "model")
        (place.parent / "saved").mkdir()
        if kind.startswith("tokenizer"):
            MODEL[place.parent.name] = load_model(place)
        file, body = place / name, b""
        if kind == "header":
            value, body = header_of(file)
        else:
            value = read_toml_value(file) if kind == "config.toml" else json.loads(file.read_text())
        write = toml if kind == "config.toml" else json.dumps
        share = count // len(sources) + (n < count % len(sources))
        for i, data in enumerate(mutations(kind, value, write, share)):
            file.write_bytes(struct.pack("<Q", len(data)) + data + body if kind == "header" else data)
            outcome, spent, _ = tried(read, place)
            outcomes[outcome.split("\n")[0] if outcome in ("read", "refused") else "fault"] += 1
            slowest = max(slowest, spent)
            if outcome not in ("read", "refused") or spent > SECONDS:
                faults.append(f"{source} {i}: {spent:.1f} s, {outcome}: {data[:300]!r}")
    return {"kind": kind, "mutations": count, "read": outcomes["read"], "refused": outcomes["refused"],
            "slowest_s": round(slowest, 2), "faults": faults}


def read_toml_value(file: Path) -> dict:
    import tomllib

    return tomllib.loads(file.read_text())


def cpu_seconds() -> float:
    """Of this process and the children it has waited for."""
    return sum(os.times()[:4])


def tried(read, place: Path) -> tuple[str, float, str]:
    """What became of a file, the seconds of CPU it took, and what was said of it."""
    said, began = io.StringIO(), cpu_seconds()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            read(place)
        outcome = "read"
    except SystemExit as left:
        one_line = left.code == 2 and len(said.getvalue().strip().splitlines()) == 1
        outcome = "refused" if one_line else f"left with {left.code} and said {said.getvalue()!r}"
    except BaseException:
        outcome = traceback.format_exc()
    return outcome, cpu_seconds() - began, said.getvalue()


def virtual_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


@pytest.fixture(scope="module")
def found():
    results = []
    yield results
    if "MUTATIONS" in os.environ and len(results) == len(KINDS):
        report = {"command": f"MUTATIONS={MUTATIONS} python -m pytest tests/test_hunt.py", "kinds": results}
        (ROOT / "benchmarks" / "results" / "hunt.json").write_text(json.dumps(report, indent=1) + "\n")


def in_fork(work, file: Path):
    """What the work returns, done in a fork, so that its limits are its own; it comes back in a file."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            file.write_text(json.dumps(work()))
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    return json.loads(file.read_text())


linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="memory is read from, and limited on, Linux")


@linux
@pytest.mark.parametrize("kind", KINDS)
def test_a_file_from_a_stranger_is_read_or_refused_in_one_line(kind, tmp_path, found):
    result = in_fork(lambda: hunt(kind, tmp_path, MUTATIONS), tmp_path / "found.json")
    faults = result.pop("faults")
    assert not faults, f"{len(faults)} faults\n" + "\n".join(faults[:8])
    assert result["refused"] > MUTATIONS / 4 and result["read"] > 0
    found.append(result)


# ------------------------------------------------------------------------------ programs in the files

def steps(kind: str, *changes: dict) -> dict:
    """A normalizer or pre_tokenizer of several steps, as tokenizer.json has it."""
    inner = "normalizers" if kind == "normalizer" else "pretokenizers"
    changes += ({"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True},) * (inner == "pretokenizers")
    return {kind: {"type": "Sequence", inner: changes}}


def split(expression: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": expression}, "behavior": "Isolated", "invert": False}


def replace(expression: str, content: str) -> dict:
    return {"type": "Replace", "pattern": {"Regex": expression}, "content": content}


BYTES_AGAIN = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
LOOP = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
HANGS = [  # which file, its key, what stands there
    ("adapter_config.json", "target_modules", "(.+)+!"), ("adapter_config.json", "exclude_modules", "(([a-z._]|.)*)*0"),
    ("adapter_config.json", "modules_to_save", ["(.|.*)+!"]), ("adapter_config.json", "rank_pattern", {"(.+)+!": 4}),
    ("adapter_config.json", "alpha_pattern", {"(\\w|\\.|.+)+!": 4}),
    ("adapter_config.json", "layers_pattern", ["(.+)+!"]),
    *(("tokenizer_config.json", "chat_template", template) for template in (
        LOOP, LOOP + "{{ messages[0].content }}", "{{ 'a' * 10**10 }}", "{{ messages[0].content * 10**9 }}",
        "{{ 10 ** 99999999999 }}", "{{ '%9999999999s' % 1 }}", "{{ '{:>9999999999}'.format(1) }}",
        "{{ 'a'.ljust(10 ** 10) }}", "{{ 'a' | center(10 ** 10) }}", "{{ [1] | batch(10 ** 10, 0) | list }}",
        "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else 1 }}{% endmacro %}{{ m(99) }}",
        "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}{{ ns.s }}",
        "{% if messages | length > 8 %}" + LOOP + "{% endif %}",
        "{% for m in messages %}{% if m.content | length > 999 %}" + LOOP + "{% endif %}{% endfor %}")),
    ("tokenizer.json", "pre_tokenizer", steps("pre_tokenizer", split("(a+)+$"))),
    ("tokenizer.json", "pre_tokenizer", steps("pre_tokenizer", split("(\\s|\\s+)+x"))),
    ("tokenizer.json", "pre_tokenizer", steps("pre_tokenizer", split("(\\d*)*x|(é*)*x"))),
    ("tokenizer.json", "pre_tokenizer", steps("pre_tokenizer", split("z*z*z*z*z*z*!y"))),
    ("tokenizer.json", "normalizer", steps("normalizer", replace("(\\w+)+#", ""))),
    ("tokenizer.json", "normalizer", steps("normalizer", *[replace(".", "aa")] * 60)),
    ("tokenizer.json", "decoder", {"decoder": {"type": "Sequence", "decoders": [replace("(a+)+$", ""), BYTES_AGAIN]}}),
]


@linux
@pytest.mark.parametrize("name, key, value", HANGS, ids=[f"{name} {key} {i}" for i, (name, key, _) in enumerate(HANGS)])
def test_what_would_never_end_is_refused_and_its_key_named(name, key, value, tmp_path):
    """Regular expressions that backtrack without end, templates that loop or multiply: within the same limits."""
    def work():
        resource.setrlimit(resource.RLIMIT_AS, (virtual_bytes() + BYTES, resource.RLIM_INFINITY))
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        MODEL["base"] = load_model(MODELS / "llama2", dtype=torch.float32)
        place = prepared(name, "one_layer" if name == "adapter_config.json" else MODELS / "qwen2", tmp_path / "0" / "m")
        (place.parent / "saved").mkdir()
        MODEL["0"] = MODEL["base"]
        changed = value if name == "tokenizer.json" else {key: value}
        if key == "layers_pattern":
            changed |= {"layers_to_transform": [0]}
        (place / name).write_text(json.dumps(json.loads((place / name).read_text()) | changed))
        return tried(KINDS[name][2], place)

    outcome, spent, said = in_fork(work, tmp_path / "found.json")
    assert outcome == "refused" and f"/{name}: " in said and key in said, (outcome, said)
    assert spent <= SECONDS


def test_an_expression_that_hangs_on_a_text_alone_names_the_record(tmp_path, capsys):
    """The library gives up after ten million steps back; on one letter repeated, as it was tried, it takes few."""
    place = prepared("tokenizer.json", MODELS / "qwen2", tmp_path / "0" / "m")
    table = json.loads((place / "tokenizer.json").read_text()) | steps("pre_tokenizer", split("(ab|ba|a|b)+c"))
    (place / "tokenizer.json").write_text(json.dumps(table))
    texts = ["abc", "ab" * 40 + "dc"]
    write_jsonl(tmp_path / "sft.jsonl", [{"messages": [{"role": "user", "content": "Hi"},
                                                       {"role": "assistant", "content": text}]} for text in texts])
    config = sft.Config(data=str(tmp_path / "sft.jsonl"), model=str(place), out=str(tmp_path / "run"), cache="",
                        device="cpu")
    exits(capsys, lambda: sft.main(config), "sft.jsonl record 2: ", "tokenizer.json cannot encode", "drop or mend")


@linux
def test_a_template_in_a_file_of_its_own_is_named_by_that_file(tmp_path, capsys):
    """The checkpoint's chat_template.jinja, and one that template= names."""
    place = prepared("tokenizer.json", MODELS / "qwen2", tmp_path / "0" / "m")
    tokenizer = load_tokenizer(place)
    for file, read in ((tmp_path / "mine.jinja", lambda: tokenizer.adopt(str(tmp_path / "mine.jinja"))),
                       (place / "chat_template.jinja", lambda: load_tokenizer(place))):
        file.write_text(LOOP)
        exits(capsys, read, f"{file}: chat_template takes more than 1 s or 1 GB", "mend or remove it", "set template=")


def test_an_honest_adapter_with_a_key_for_every_layer_of_a_large_model_passes():
    names = [f"model.layers.{layer}.mlp.{kind}_proj" for layer in range(400) for kind in ("gate", "up", "down")]
    config = adapters.DEFAULTS | {"target_modules": r".*\.(gate|up|down)_proj", "modules_to_save": ["lm_head"],
                                  "rank_pattern": dict.fromkeys(names, 4), "alpha_pattern": dict.fromkeys(names, 8),
                                  "exclude_modules": ["score"], "layers_pattern": "layers"}
    assert try_out(matches(config, names)) == ("", "")
