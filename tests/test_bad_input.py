"""Whatever the user gets wrong ends with exit code 2 and one line that names the place, the fault and the remedy.

One table over all commands. Cases run in this process; a handful also as commands, against the clock.
"""
import json
import os
import pickle
import re
import runpy
import shutil
import socket
import subprocess
import sys
import time

import kills
import pytest
import torch
from conftest import ROOT, metrics_of, write_jsonl
from safetensors.torch import load_file, save_file

from data.tokenizer import load_tokenizer

SAID = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello Tom."}]
PAIR = {"prompt": "Hi", "chosen": "Hello Tom.", "rejected": "No."}


@pytest.fixture(scope="module")
def bad(tmp_path_factory):
    """A folder of everything that is wrong, beside what is right."""
    folder = tmp_path_factory.mktemp("bad")
    kills.prepare(folder)
    text = {
        "unknown.toml": "lrr = 1\n", "mistyped.toml": 'lr = "fast"\n', "broken.toml": "lr = = 1\n",
        "range.toml": "epochs = 0\n", "contradictory.toml": 'quantize = "nf4"\n', "nested.toml": "[train]\nlr = 1.0\n",
        "twice.toml": "lr = 1.0\nlr = 2.0\n", "empty.jsonl": "", "blank.jsonl": "\n\n\n", "topics.txt": "\n",
    }
    for name, content in text.items():
        (folder / name).write_text(content)
    (folder / "binary.jsonl").write_bytes(bytes(range(255, -1, -1)) * 64)
    (folder / "binary.toml").write_bytes(b"\xff\xfe\x00lr")
    (folder / "notes.jsonl.gz").write_bytes(b"\x1f\x8b half of it")
    rows = {
        "noreply": [{"messages": SAID[:1]}], "equal": [PAIR, PAIR | {"rejected": "Hello Tom."}],
        "nul": [{"messages": [SAID[0], SAID[1] | {"content": "a\0b"}]}],
        "surrogate": [{"messages": [SAID[0], SAID[1] | {"content": "a\ud800b"}]}],
        "number": [{"messages": [SAID[0], SAID[1] | {"content": 7}]}],
        "roles": [{"messages": [SAID[0], SAID[0], SAID[1]]}], "text": [{"text": "Tom saw a dog."}],
        "prompts": [{"prompt": "Hi"}], "margin": [PAIR | {"margin": "much"}], "messages": [{"messages": SAID}],
        "ranking": [{"prompt": "Hi", "answers": ["Hello Tom.", "No."], "ranks": [0, 1]}],
        "strange": [{"question": 1}], "long_prompt": [PAIR | {"prompt": "Tom saw a dog. " * 300}],
        "unranked": [{"prompt": "Hi", "answers": ["Hello Tom.", "No."], "ranks": [1, 1]}],
        "undesirable": [{"messages": SAID, "label": False}],
        "seeds": [{"instruction": "Say hello.", "instances": [{"input": "", "output": "Hello."}],
                   "is_classification": False}],
        "template": [{"text": "no hole"}], "generation": [PAIR | {"category": "generation"}],
    }
    for name, records in rows.items():
        write_jsonl(folder / f"{name}.jsonl", records)
    write_jsonl(folder / "one_in_many.jsonl", [{"messages": SAID}] * 10_000)
    lines = (folder / "one_in_many.jsonl").read_text().splitlines(keepends=True)
    lines[7776] = '{"messages": [\n'
    (folder / "one_in_many.jsonl").write_text("".join(lines))
    (folder / "folder").mkdir()

    def damaged(name, change, source="sft"):
        shutil.copytree(folder / source, folder / name)
        change(folder / name)

    def settings(**changes):
        def change(path):
            (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
        return change

    def fewer_rows(path):
        tensors = load_file(path / "model.safetensors")
        tensors = {name: x[:100].contiguous() if x.shape[0] > 1000 else x for name, x in tensors.items()}
        save_file(tensors, path / "model.safetensors")
        settings(vocab_size=100)(path)

    def pickled(path):
        (path / "model.safetensors").unlink()
        torch.save({"a": torch.zeros(1)}, path / "pytorch_model.bin")

    def without_head(path):
        tensors = load_file(path / "model.safetensors")
        save_file({name: x for name, x in tensors.items() if not name.startswith("score")}, path / "model.safetensors")

    damaged("no_config", lambda path: (path / "config.json").unlink())
    damaged("config_cut", lambda path: os.truncate(path / "config.json", 40))
    damaged("cut", lambda path: os.truncate(path / "model.safetensors", 10_000))
    damaged("cut_early", lambda path: os.truncate(path / "model.safetensors", 5))
    damaged("shapes", settings(hidden_size=64))
    damaged("layers", settings(num_hidden_layers=3))
    damaged("family", settings(model_type="bert"))
    damaged("pickled", pickled)
    damaged("pickle_in_disguise", lambda path: (path / "model.safetensors").write_bytes(pickle.dumps({"a": 1})))
    damaged("no_tokenizer", lambda path: (path / "tokenizer.model").unlink())
    damaged("tokenizer_cut", lambda path: os.truncate(path / "tokenizer.model", 1000))
    damaged("settings_cut", lambda path: os.truncate(path / "tokenizer_config.json", 30))
    damaged("fewer_rows", fewer_rows)
    damaged("fewer_rows_reward", fewer_rows, "reward")
    damaged("without_head", without_head, "reward")
    damaged("weights_gone", lambda path: (path / "model.safetensors").unlink())
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    return folder


TRAIN = {"sft": "model={bad}/base data={bad}/sft.jsonl", "distill": "model={bad}/base data={bad}/sft.jsonl",
         "dpo": "model={bad}/sft data={bad}/pairs.jsonl",
         "kto": "model={bad}/sft data={bad}/pairs.jsonl", "reward": "model={bad}/sft data={bad}/pairs.jsonl",
         "ppo": "model={bad}/sft data={bad}/pairs.jsonl reward_model={bad}/reward max_tokens=4 batch=2 steps=1 "
                "minibatches=1"}
ASK = {"collect.self_instruct": "model={bad}/sft seeds={bad}/seeds.jsonl examples=1 machine_examples=0",
       "collect.ultrachat": "model={bad}/sft", "collect.role_play": "model={bad}/sft",
       "collect.ai_feedback": 'prompts={bad}/prompts.jsonl models=["{bad}/sft"] judge={bad}/sft',
       "collect.red_team": "target={bad}/sft attacker={bad}/sft judge={bad}/sft",
       "judge": 'models=["a={bad}/sft"] data={bad}/prompts.jsonl judges=["{bad}/sft"]'}

CASES = [  # command, what is added to its usual words, what the line has to say
    # configs
    ("sft", "--config {bad}/unknown.toml", ["unknown.toml: unknown key 'lrr', did you mean 'lr'?"]),
    ("dpo", "--config {bad}/unknown.toml", ["unknown.toml: unknown key 'lrr', did you mean 'lr'?"]),
    ("reward", "--config {bad}/mistyped.toml", ["mistyped.toml: lr is 'fast', expected a number such as 0.1"]),
    ("ppo", "--config {bad}/broken.toml", ["broken.toml: is not TOML"]),
    ("sft", "--config {bad}/binary.toml", ["binary.toml: is not TOML"]),
    ("sft", "--config {bad}/folder", ["folder: cannot be read (Is a directory)"]),
    ("judge", "--config {bad}/none.toml", ["none.toml: cannot be read (No such file or directory)"]),
    ("sft", "--config {bad}/nested.toml", ["nested.toml: unknown key 'train'"]),
    ("sft", "--config {bad}/twice.toml", ["twice.toml: is not TOML"]),
    ("dpo", "--config {bad}/range.toml", ["epochs is 0, expected at least 1"]),
    ("sft", "--config {bad}/contradictory.toml", ["quantize is 'nf4', which cannot be trained: set lora_rank"]),
    ("kto", "desirable=2", ["unknown key 'desirable', did you mean 'desirable_weight'?"]),
    ("kto", "data={bad}/messages.jsonl", ["messages.jsonl record 1: has no 'label', expected true or false"]),
    ("dpo", "loss=dop", ["loss is 'dop', expected 'dpo' or"]),
    ("reward", "batch=2.5", ["batch is 2.5, expected a whole number"]),
    ("ppo", "advantages=rloo", ["n is 1, expected at least 2"]),
    ("ppo", "minibatches=3", ["minibatches is 3, expected between 1 and 2"]),
    ("sft", "threads=-1", ["threads is -1"]),
    ("sft", "seed=99999999999999999999999", ["seed is", "expected"]),
    ("sft", "threads=1000000", ["threads is", "expected"]),
    ("ppo", "seed=9223372036854775807", ["seed is", "expected"]),
    ("dpo", "template=zephir", ["template is 'zephir', expected one of"]),
    ("collect.self_instruct", "fewest_words=200", ["fewest_words is 200, expected between 1 and 150"]),
    ("collect.ultrachat", "sector=world", ["sector is 'world', expected 'questions' or"]),
    ("collect.role_play", "tasks=0", ["tasks is 0"]),
    ("collect.ai_feedback", "models=[]", ["models is empty"]),
    ("collect.red_team", "mode=indirect", ["mode is 'indirect', expected"]),
    ("collect.red_team", "temperature=99", ["temperature is 99, expected between 0 and 10"]),
    ("judge", "models=[]", ["models is empty"]),
    ("judge", "budget=1.0", ["a budget in money needs prices"]),
    ("judge", "baseline=b", ["baseline is 'b', expected one of a"]),
    ("data.formats", "", ["data.formats: the following arguments are required: file"]),
    ("data.pack", "{bad}/sft.jsonl --show many", ["data.pack: argument --show: invalid int value: 'many'"]),
    ("data.pack", "{bad}/sft.jsonl --template zephir", ["template is 'zephir', expected one of"]),
    ("data.pack", "{bad}/sft.jsonl --max-length 0", ["max-length is 0, expected at least 1"]),
    ("collect.spec", "{bad}/sft.jsonl --target moon", ["collect.spec: argument --target: invalid choice: 'moon'"]),
    ("collect.spec", "{bad}/sft.jsonl --subset 5", ["--subset, --out and --target go together"]),
    ("collect.decontaminate", "{bad}/sft.jsonl",
     ["collect.decontaminate: the following arguments are required: --against"]),
    ("collect.decontaminate", "{bad}/sft.jsonl --against {bad}/prompts.jsonl --out {bad}/x.jsonl",
     ["--out without --removed"]),
    ("reward --score", "", ["python reward.py: argument --score: expected one argument"]),
    # data
    ("sft", "data={bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("sft", "data={bad}/folder", ["folder: is a folder without data files"]),
    ("sft", "data={bad}/empty.jsonl", ["empty.jsonl: is empty, expected one JSON record a line"]),
    ("dpo", "data={bad}/blank.jsonl", ["blank.jsonl: is empty"]),
    ("reward", "data={bad}/binary.jsonl", ["binary.jsonl line 1: is not UTF-8 text"]),
    ("sft", "data={bad}/one_in_many.jsonl", ["one_in_many.jsonl line 7777: is not JSON", "mend or drop it"]),
    ("sft", "data={bad}/noreply.jsonl", ["noreply.jsonl line 1: 'messages' ends with a user turn"]),
    ("sft", "max_length=4", ["holds no token to learn within max_length=4: raise max_length"]),
    ("dpo", "data={bad}/equal.jsonl", ["equal.jsonl line 2: 'chosen' equals 'rejected'", "drop the pair"]),
    ("reward", "data={bad}/equal.jsonl", ["equal.jsonl line 2: 'chosen' equals 'rejected'"]),
    ("sft", "data={bad}/nul.jsonl", ["nul.jsonl line 1: 'messages.content' holds a NUL"]),
    ("sft", "data={bad}/surrogate.jsonl", ["surrogate.jsonl line 1: 'messages.content' holds half a surrogate pair"]),
    ("sft", "data={bad}/number.jsonl", ["number.jsonl line 1: 'messages.content' is 7, expected text"]),
    ("sft", "data={bad}/roles.jsonl", ["roles.jsonl line 1:", "roles alternate"]),
    ("sft", "data={bad}/strange.jsonl", ["strange.jsonl line 1: has the keys \"question\"", "expected"]),
    ("sft", "data={bad}/undesirable.jsonl", ["undesirable.jsonl: 1 of its 1 dialogues are labelled false"]),
    ("sft", "data={bad}/ranking.jsonl", ["ranking.jsonl: holds rankings, expected messages"]),
    ("sft", "data={bad}/prompts.jsonl", ["prompts.jsonl: holds prompts without replies"]),
    ("sft", "eval_data={bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("distill", "context={bad}/pairs.jsonl", ["pairs.jsonl line 1: 'messages' is null, expected"]),
    ("distill", "context={bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("dpo", "data={bad}/messages.jsonl", ["messages.jsonl: holds no preference pairs, expected"]),
    ("dpo", "data={bad}/ranking.jsonl", ["ranking.jsonl: holds no preference pairs, expected"]),
    ("dpo", "data={bad}/margin.jsonl", ["margin.jsonl line 1: 'margin' is \"much\", expected a number"]),
    ("reward", "data={bad}/messages.jsonl", ["messages.jsonl: holds no preference, expected"]),
    ("reward", "data={bad}/unranked.jsonl", ["unranked.jsonl line 1: 'ranks' are all the same"]),
    ("reward", "demos={bad}/prompts.jsonl", ["prompts.jsonl: holds prompts without replies"]),
    ("reward", "data={bad}/long_prompt.jsonl max_length=64",
     ["long_prompt.jsonl: every prompt is longer than max_length=64"]),
    ("ppo", "data={bad}/long_prompt.jsonl",
     ["long_prompt.jsonl record 1: the prompt has", "drop it or lower max_tokens"]),
    ("ppo", "data={bad}/text.jsonl", ["text.jsonl: holds text records, expected"]),
    ("data.formats", "{bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("data.formats", "{bad}/notes.jsonl.gz", ["notes.jsonl.gz: cannot be read"]),
    ("data.formats", "{bad}/sft.jsonl --format alpacca", ["format 'alpacca' is unknown"]),
    ("data.formats", "{bad}/sft.jsonl --tokenizer {bad}/folder", ["tokenizer.model: no such file"]),
    ("data.pack", "{bad}/one_in_many.jsonl", ["one_in_many.jsonl line 7777: is not JSON"]),
    ("data.pack", "{bad}/binary.jsonl", ["binary.jsonl line 1: is not UTF-8"]),
    ("collect.spec", "{bad}/binary.jsonl", ["binary.jsonl: none of its", "run python -m data.formats"]),
    ("collect.spec", "{bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("collect.spec", "{bad}/sft.jsonl --unit {bad}/nowhere", ["no such directory"]),
    ("collect.decontaminate", "{bad}/sft.jsonl --against {bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("collect.decontaminate", "{bad}/sft.jsonl --against {bad}/prompts.jsonl:question",
     ["no record has text under 'question'"]),
    ("collect.decontaminate", "{bad}/none.jsonl --against {bad}/prompts.jsonl", ["none.jsonl: no such file"]),
    ("collect.decontaminate", "{bad}/binary.jsonl --against {bad}/prompts.jsonl --removed {bad}/new.jsonl",
     ["binary.jsonl: none of its"]),
    ("collect.self_instruct", "seeds={bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("collect.self_instruct", "seeds={bad}/text.jsonl", ["text.jsonl line 1: is no seed"]),
    ("collect.self_instruct", "seeds={bad}/empty.jsonl", ["empty.jsonl", "expected"]),
    ("collect.ultrachat", "sector=materials materials={bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("collect.ultrachat", "topics={bad}/binary.jsonl", ["binary.jsonl: cannot be read"]),
    ("collect.ultrachat", "topics={bad}/topics.txt", ["topics.txt", "expected"]),
    ("collect.role_play", "ideas={bad}/strange.jsonl", ["strange.jsonl line 1: is no idea"]),
    ("collect.role_play", "ideas={bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("collect.ai_feedback", "prompts={bad}/text.jsonl", ["text.jsonl: holds text records"]),
    ("collect.ai_feedback", "prompts={bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("collect.red_team", "templates={bad}/template.jsonl", ["template.jsonl line 1: holds", "expected once"]),
    ("collect.red_team", "behaviours={bad}/binary.jsonl", ["binary.jsonl: cannot be read"]),
    ("judge", "data={bad}/binary.jsonl", ["binary.jsonl", "expected"]),
    ("judge", "data={bad}/empty.jsonl", ["empty.jsonl: is empty"]),
    ("judge", "data={bad}/strange.jsonl", ["strange.jsonl line 1: is no question"]),
    ("judge", "references={bad}/none.jsonl", ["none.jsonl: no such file"]),
    ("judge", 'judges=["recorded:{bad}/strange.jsonl"]', ["strange.jsonl"]),
    ("reward --score", "{bad}/text.jsonl --model {bad}/reward", ["text.jsonl line 1: 'messages' is null"]),
    # checkpoints
    ("sft", "model={bad}/nowhere", ["nowhere: no such folder"]),
    ("sft", "model={bad}/no_config", ["no_config: holds no config.json"]),
    ("sft", "model={bad}/config_cut", ["config.json: is not JSON", "copy it again"]),
    ("dpo", "model={bad}/cut", ["model.safetensors: cannot be read as safetensors", "copy it again"]),
    ("dpo", "model={bad}/cut_early", ["model.safetensors: cannot be read as safetensors"]),
    ("reward", "model={bad}/shapes", ["has shape", "config.json says"]),
    ("reward", "model={bad}/layers", ["is in none of its weight files"]),
    ("sft", "model={bad}/family", ["model_type 'bert' is not supported"]),
    ("sft", "model={bad}/pickled", ["it holds pickled weights, which are never opened: convert them"]),
    ("sft", "model={bad}/pickle_in_disguise", ["model.safetensors: cannot be read as safetensors"]),
    ("sft", "model={bad}/weights_gone", ["model.safetensors: no such file"]),
    ("ppo", "model={bad}/no_tokenizer", ["tokenizer.model: no such file"]),
    ("sft", "model={bad}/tokenizer_cut", ["tokenizer.model: is not a sentencepiece model"]),
    ("sft", "model={bad}/settings_cut", ["tokenizer_config.json: is not JSON"]),
    ("sft", "model={bad}/fewer_rows", ["fewer_rows", "the tokenizer has 1536 tokens, the model 100"]),
    ("sft", "model={bad}/fewer_rows train_on=all data={bad}/text.jsonl",
     ["the tokenizer has 1536 tokens, the model 100"]),
    ("ppo", "model={bad}/fewer_rows", ["the tokenizer has 1536 tokens, the model 100"]),
    ("ppo", "reward_model={bad}/fewer_rows_reward", ["the tokenizer has 1536 tokens, the model 100"]),
    ("sft", "model={bad}/reward", ["reward: is a reward model, expected"]),
    ("dpo", "model={bad}/reward", ["reward: is a reward model, expected"]),
    ("dpo", "ref_model={bad}/reward", ["reward: is a reward model, expected"]),
    ("dpo", "ref_model={bad}/cut", ["model.safetensors: cannot be read as safetensors"]),
    ("ppo", "model={bad}/reward", ["reward: is a reward model, expected"]),
    ("ppo", "reward_model={bad}/sft", ["sft: has no score head, expected the result of reward.py"]),
    ("ppo", "model={bad}/base", ["base: carries no chat template"]),
    ("ppo", "reward_model={bad}/without_head", ["is in none of its weight files"]),
    ("ppo", "reward_model={bad}/adapter lora_rank=2", ["adapter"]),
    ("reward --score", "{bad}/messages.jsonl --model {bad}/sft", ["sft: has no score head"]),
    ("collect.self_instruct", "model={bad}/reward", ["reward: is a reward model, expected"]),
    ("collect.role_play", "model={bad}/nowhere",
     ["nowhere: no such folder, expected a model directory, or an endpoint"]),
    ("collect.ultrachat", "user_model={bad}/cut", ["model.safetensors: cannot be read as safetensors"]),
    ("collect.red_team", "judge={bad}/no_tokenizer", ["tokenizer.model: no such file"]),
    ("collect.ai_feedback", "judge=", ["a model is needed and its name is empty, expected"]),
    ("collect.role_play", "model=http://nobody:1", ["http://nobody:1: needs a key: set"]),
    ("judge", 'models=["a={bad}/nowhere"]', ["nowhere is no folder, expected a model directory"]),
    ("judge", 'models=["a={bad}/reward"]', ["reward is a reward model, expected"]),
    ("judge", 'judges=["r=reward:{bad}/sft"]', ["sft has no score head"]),
    ("judge", 'judges=["{bad}/reward"]', ["reward is a reward model, expected"]),
    # devices
    ("sft", "device=cuda:99", ["device is 'cuda:99', which this machine does not have"]),
    ("dpo", "device=gpu", ["device is 'gpu', which this machine does not have: use device=cpu or device=auto"]),
    ("reward", "device=meta", ["device is 'meta'"]),
    ("ppo", "device=cuda:99", ["device is 'cuda:99'"]),
    ("judge", "device=gpu", ["device is 'gpu'"]),
    ("collect.role_play", "device=gpu", ["device is 'gpu'"]),
    ("collect.self_instruct", "device=cuda:99", ["device is 'cuda:99'"]),
    # places to write
    ("sft", "out={bad}/text.jsonl", ["text.jsonl: cannot be written", "choose another out="]),
    ("dpo", "out={bad}/text.jsonl/run", ["text.jsonl/run: cannot be written (Not a directory)"]),
    ("reward", "out=/proc/none/run", ["/proc/none/run: cannot be written"]),
    ("ppo", "out={bad}/sft", ["sft: is its own model: choose another out="]),
    ("dpo", "ref_cache={bad}/text.jsonl", ["text.jsonl: is no cache of reference log-probabilities"]),
    ("dpo", "ref_cache={bad}/text.jsonl/cache", ["text.jsonl/cache: cannot be written"]),
    ("judge", "out={bad}/text.jsonl", ["text.jsonl: cannot be written"]),
    ("collect.self_instruct", "out={bad}/text.jsonl", ["text.jsonl: cannot be written"]),
    ("collect.ultrachat", "out={bad}/text.jsonl/x", ["text.jsonl/x: cannot be written"]),
    ("collect.role_play", "out={bad}/text.jsonl", ["text.jsonl: cannot be written"]),
    ("collect.ai_feedback", "out={bad}/text.jsonl", ["text.jsonl: cannot be written"]),
    ("collect.red_team", "out={bad}/text.jsonl", ["text.jsonl: cannot be written"]),
    ("data.formats", "{bad}/sft.jsonl --out {bad}/text.jsonl/x", ["text.jsonl/x: cannot be written"]),
    ("data.formats", "{bad}/sft.jsonl --out {bad}/folder", ["folder: cannot be written (", "Is a directory"]),
    ("collect.spec", "{bad}/generation.jsonl --target surge --subset 1 --out {bad}/text.jsonl/x",
     ["text.jsonl/x: cannot be written"]),
    ("collect.spec", "{bad}/sft.jsonl --figure {bad}/text.jsonl/x.png", ["text.jsonl/x.png: cannot be written"]),
    ("collect.decontaminate", "{bad}/sft.jsonl --against {bad}/prompts.jsonl --removed {bad}/text.jsonl/x",
     ["x: cannot be written"]),
    ("reward --score", "{bad}/messages.jsonl --model {bad}/reward --out {bad}/text.jsonl/x",
     ["text.jsonl: cannot be written"]),
]
CHAT = [  # chat.py: ports, hosts, checkpoints
    ("port=99999", ["port is 99999, expected between 0 and 65535"]),
    ("port=http", ["port is 'http', expected a whole number"]),
    ("port={taken}", ["{taken}"]), ("host=256.1.1.1 token=x", ["256.1.1.1"]),
    ("host=0.0.0.0", ["host is '0.0.0.0', which others can reach"]),
    ("model={bad}/nowhere", ["nowhere: no such folder"]),
    ("model={bad}/reward", ["reward: is a reward model, expected"]),
    ("device=gpu", ["device is 'gpu'"]), ("model={bad}/cut", ["cannot be read as safetensors"]),
]
REMEDY = re.compile(
    r"expected|use |written |set |choose|drop|mend|copy|check|lower|raise|add |train|load|delete|free|did you mean|"
    r"name |convert|--help|go together|put it|run |start from|leave|not supported|is it whole|config\.json says|"
    r"is config\.json")


def words_of(command, extra, folders):
    script = command.split()[0]
    usual = TRAIN.get(script) or ASK.get(script) or ""
    if script in TRAIN and " --score" in command:
        usual = "--score"
    elif usual:
        common = "device=cpu" + (" dtype=float32 threads=1" if script in TRAIN else "") + " out={out}"
        extra = f"{usual} {common} {extra}" if "--config" not in extra else extra + f" {usual} {common}"
    else:
        usual = ""
    line = extra if usual != "--score" else f"--score {extra}"
    for name, value in folders.items():
        line = line.replace("{" + name + "}", str(value))
    return line.split()


def call(command, words, monkeypatch):
    """The command, in this process."""
    script = command.split()[0]
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *words])
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(ROOT / (script.replace(".", "/") + ".py")), run_name="__main__")


def check(line, fragments, folders):
    for fragment in fragments:
        for name, value in folders.items():
            fragment = fragment.replace("{" + name + "}", str(value))
        assert fragment in line, f"{fragment!r} is not in: {line}"
    assert REMEDY.search(line), f"no remedy: {line}"


@pytest.mark.parametrize("command, extra, fragments", CASES,
                         ids=[f"{case[0]} {case[1]}".replace("{bad}/", "") for case in CASES])
def test_bad_input_is_one_line(command, extra, fragments, bad, tmp_path, monkeypatch, capsys):
    folders = {"bad": bad, "out": tmp_path / "run"}
    before = {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()}
    began = time.perf_counter()
    with pytest.raises(SystemExit) as left:
        call(command, words_of(command, extra, folders), monkeypatch)
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and len(said.splitlines()) == 1, said
    check(said, fragments, folders)
    assert time.perf_counter() - began < 5 * max(1, os.getloadavg()[0] / os.cpu_count())
    after = {path: path.stat().st_mtime_ns for path in bad.rglob("*") if path.is_file()}
    assert {path: after.get(path) for path in before} == before  # nothing of the user's was touched


@pytest.mark.parametrize("extra, fragments", CHAT, ids=[extra for extra, _ in CHAT])
def test_bad_input_to_chat_is_one_line(extra, fragments, bad, monkeypatch, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        folders = {"bad": bad, "taken": taken.getsockname()[1]}
        line = f"--serve model={bad}/sft device=cpu port=0 {extra}"
        for name, value in folders.items():
            line = line.replace("{" + name + "}", str(value))
        with pytest.raises(SystemExit) as left:
            call("chat", line.split(), monkeypatch)
    said = capsys.readouterr().err.strip()
    assert left.value.code == 2 and len(said.splitlines()) == 1, said
    check(said, fragments, folders)


@pytest.mark.parametrize("number", [1, 44, 95, -1])
def test_as_a_command_too_and_soon(number, bad, tmp_path):
    """Within 5 s of an idle core: what this process and its children may take is measured in CPU time."""
    command, extra, fragments = CASES[number]
    folders = {"bad": bad, "out": tmp_path / "run"}
    script = command.split()[0]
    how = ["-m", script] if "." in script else [f"{script}.py"]
    before = os.times()
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    words = words_of(command, extra, folders)
    done = subprocess.run([sys.executable, *how, *words], cwd=ROOT, capture_output=True, text=True, env=environment)
    after = os.times()
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    check(done.stderr, fragments, folders)
    assert after.children_user + after.children_system - before.children_user - before.children_system < 5


def test_there_are_many_cases():
    print(f"{len(CASES) + len(CHAT)} cases")
    assert len(CASES) >= 60 and len({(command, extra) for command, extra, _ in CASES}) == len(CASES)


# ----------------------------------------------------------------------- what looks wrong and is not

def test_a_reply_of_200_000_tokens_is_cut_and_counted(bad, tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "long.jsonl", [{"messages": [SAID[0], SAID[1] | {"content": "Tom " * 200_000}]}])
    words = words_of("sft", f"data={path} epochs=1 samples=0 max_length=64", {"bad": bad, "out": tmp_path / "run"})
    call("sft", words, monkeypatch)
    assert "cut to 64 tokens: 1 responses" in capsys.readouterr().out and len(metrics_of(tmp_path / "run")) == 1


@pytest.mark.parametrize("spelling", ["<|assistant|>", "</s>", "<s>", "<unk>", "<|user|></s>"])
def test_a_special_tokens_spelling_is_letters(spelling, bad):
    tokenizer = load_tokenizer(bad / "sft")
    reply = {"role": "assistant", "content": "Yes."}
    plain, learnt = tokenizer.render([{"role": "user", "content": "Hi"}, reply])
    ids, loss = tokenizer.render([{"role": "user", "content": f"Hi {spelling}"}, reply])
    special = set(tokenizer.special.values()) | {tokenizer.bos_id, tokenizer.eos_id}
    assert [i for i in ids if i in special] == [i for i in plain if i in special]
    assert sum(loss) == sum(learnt) and spelling in tokenizer.decode(ids)
