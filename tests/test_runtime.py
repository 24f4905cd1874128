import dataclasses
import gc
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from conftest import FIXTURES, ROOT, exits, reference, small_model

import runtime
from runtime import device as device_module


@dataclass(frozen=True)
class Config:
    """Knobs."""

    out: str = "runs/x"  # folder
    lr: float = 1e-3     # rate
    steps: int = 4
    fast: bool = False
    kind: Literal["cosine", "linear"] = "cosine"
    seeds: list[int] = (0,)
    shares: list[float] = dataclasses.field(default_factory=lambda: [0.5])
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    overwrite: bool = False


def load(*argv):
    return runtime.load_config(Config, "Doc.", list(argv))


# ------------------------------------------------------------------------------------------ config

def test_defaults_then_file_then_command_line(tmp_path):
    (tmp_path / "c.toml").write_text('lr = 2\nkind = "linear"\nseeds = [1, 2]\n')
    config = load("--config", str(tmp_path / "c.toml"), "kind=cosine", "out=2024-01-01", "fast=true")
    assert config == Config(out="2024-01-01", lr=2.0, kind="cosine", fast=True, seeds=[1, 2])
    assert type(config.lr) is float


def test_a_whole_number_is_a_number_in_a_list_too():
    assert load("shares=[0.5, 1]").shares == [0.5, 1.0] and type(load("shares=[1]").shares[0]) is float


def test_the_saved_config_reads_back_to_the_same(tmp_path):
    config = Config(out='a "quoted" é\\path', lr=3e-7, fast=True, seeds=[3])
    (tmp_path / "config.toml").write_text(runtime.config_toml(config))
    assert load("--config", str(tmp_path / "config.toml")) == config


def test_a_table_is_written_in_the_file_or_word_by_word(tmp_path):
    (tmp_path / "c.toml").write_text('lr = 2\n[columns]\nprompt = "question"\n"a b" = "é"\n')
    file = ["--config", str(tmp_path / "c.toml")]
    assert load().columns == {} and load(*file).columns == {"prompt": "question", "a b": "é"}
    config = load(*file, "columns.prompt=ask", 'columns.system="the system"', "steps=5")
    assert config == Config(lr=2.0, steps=5, columns={"prompt": "ask", "a b": "é", "system": "the system"})
    assert load('columns={prompt = "ask"}').columns == {"prompt": "ask"}
    for again in (dataclasses.replace(config, seeds=[1]), Config(seeds=[1])):
        (tmp_path / "config.toml").write_text(runtime.config_toml(again))
        assert load("--config", str(tmp_path / "config.toml")) == again


@pytest.mark.parametrize("word, said", [
    ("columns.prompt=", ["columns is {'prompt': ''}, expected names such as columns.prompt="]),
    ("columns=[1]", ["columns is [1], expected names"]),
    ("columns={prompt = 1}", ["columns is {'prompt': 1}, expected names"]),
    ("column.prompt=a", ["unknown key 'column.prompt'"]),
    ("lrr=1", ["unknown key 'lrr', did you mean 'lr'?"]),
    ("zzz=1", ["unknown key 'zzz', expected one of out, lr"]),
    ("lr=fast", ["lr is 'fast', expected a number such as 0.1"]),
    ("lr=nan", ["lr is nan, expected a number"]),
    ("steps=1.5", ["steps is 1.5, expected a whole number such as 8"]),
    ("steps=true", ["steps is True, expected a whole number"]),
    ("fast=1", ["fast is 1, expected a switch such as true or false"]),
    ("kind=step", ["kind is 'step', expected 'cosine' or 'linear'"]),
    ("seeds=[1, \"a\"]", ["seeds is [1, 'a'], expected a list such as [0, 1]"]),
    ("seeds=1", ["seeds is 1, expected a list such as [0, 1]"]), ("shares=[0.5, nan]", ["shares is [0.5, nan]"]),
    ("steps=" + 400 * "9", ["steps is 9999", " ..., expected a whole number such as 8"]),
    ("steps=" + 5000 * "9", ["steps is '9999", "expected a whole number"]),
    ("lr=" + 400 * "9", ["lr is 9999", "expected a number such as 0.1"]),
    ("lr=" + 5000 * "[", ["lr is '[[[[", "expected a number"]),
    ("x" * 5000 + "=1", ["unknown key 'xxxx", "expected one of out"]),
    ("steps", ["'steps' is not key=value"]),
    ("--config", ["names no file"]),
])
def test_a_wrong_word_is_one_line_that_shows_a_right_one(word, said, capsys):
    exits(capsys, lambda: load(word), *said)


@pytest.mark.parametrize("text, said", [
    ("lr = .1", "is not TOML"), ("bata = 1", "unknown key 'bata'"), ("\udcff", "is not TOML"),
    (f"steps = {5000 * '9'}", "is not TOML"), (f"steps = {400 * '9'}", "steps is 9999"),
    (f"lr = {'[' * 5000}", "is not TOML"),
    (f"lr = {400 * '9'}", "lr is 9999"), ('out = "a\\u0000b"', "out is 'a\\x00b', expected text"),
    ('"a\\nb" = 1', "unknown key 'a\\nb'"),
])
def test_a_wrong_file_is_one_line_with_its_name(text, said, tmp_path, capsys):
    file = tmp_path / "c.toml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    exits(capsys, lambda: load("--config", str(file)), str(file), said)
    exits(capsys, lambda: load("--config", str(tmp_path / "none.toml")), "cannot be read", "check the path")


def test_help_prints_the_docstring_and_the_config_block(capsys):
    with pytest.raises(SystemExit) as left:
        load("--help")
    assert left.value.code == 0 and "# rate" in capsys.readouterr().out


@pytest.mark.parametrize("script", ["sft.py", "dpo.py", "judge.py"])
def test_every_script_has_help(script):
    done = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "class Config" in done.stdout


def test_a_key_means_the_same_in_every_script():
    import dpo
    import sft

    ours, theirs = ({f.name: str(f.type) for f in dataclasses.fields(m.Config)} for m in (sft, dpo))
    assert {k for k in ours if k in theirs and ours[k] != theirs[k]} == set()


# --------------------------------------------------------------------------------------- schedules

def test_learning_rates_equal_transformers():
    cases = reference("schedules")[0]["cases"]
    assert len(cases) >= 4
    for case in cases:
        kind = next(k for k in ("cosine", "linear", "constant") if case["kind"].startswith(k))
        floor = case["options"].get("min_lr_rate", 0.0)
        for step, expected in enumerate(case["lr_used_at_step"]):
            ours = runtime.learning_rate(step, case["total_steps"], case["base_lr"], case["warmup_steps"], kind, floor)
            assert ours == pytest.approx(expected, rel=1e-9, abs=1e-15), (case["kind"], step)


def test_cosine_by_hand():
    """40 steps, 4 of warm-up, peak 1: 0 at 0, 1/2 at 2, 1 at 4, 1/2 half-way at 22."""
    rates = [runtime.learning_rate(s, 40, 1.0, 4, "cosine") for s in (0, 2, 4, 22, 39)]
    assert rates == pytest.approx([0, 0.5, 1, 0.5, 0.0019027], abs=1e-6)


def test_norms_and_biases_are_not_decayed():
    groups = runtime.adamw(small_model(), 1e-3, 0.1).param_groups
    assert all(p.ndim >= 2 for p in groups[0]["params"]) and groups[0]["weight_decay"] == 0.1
    assert all(p.ndim < 2 for p in groups[1]["params"]) and groups[1]["weight_decay"] == 0.0


def test_adamw_is_that_of_torch_bit_for_bit():
    models = [small_model(dtype=torch.float32, scale=1.0) for _ in range(2)]
    ours = runtime.adamw(models[0], 1e-2, 0.1, beta2=0.99)
    groups = [{key: group[key] for key in ("params", "weight_decay")}
              for group in runtime.adamw(models[1], 1e-2, 0.1).param_groups]
    theirs = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.99), fused=True)
    for step in range(5):
        for model, optimizer in zip(models, (ours, theirs), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = 1e-2 / (step + 1)
            generator = torch.Generator().manual_seed(step)
            model(torch.randint(0, 40, (1, 8), generator=generator)).logsumexp(-1).mean().backward()
            if step == 2:  # a parameter that had no part in a step stays as it is
                model.embed_tokens.weight.grad = None
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))


def test_epsilon_holds_back_gradients_that_are_smaller():
    """The first step is lr g / (|g| + eps): at lr 0.1 and g = 3, 0.1 with eps 1e-8 and 0.075 with eps 1."""
    for eps, moved in ((1e-8, 0.1), (1.0, 0.075)):
        model = torch.nn.Linear(1, 1, bias=False)
        optimizer = runtime.adamw(model, 0.1, 0.0, eps=eps)
        before = model.weight.item()
        (3 * model.weight).sum().backward()
        optimizer.step()
        assert before - model.weight.item() == pytest.approx(moved, abs=1e-6)


def test_a_step_on_a_cpu_needs_neither_pytorchs_compiler_nor_triton():
    """They would cost 2 s and 140 MB at every start."""
    code = ("import sys, sft, dpo, ppo, reward, judge, chat, runtime\n"
            "from model import load_model; runtime.setup('cpu', 0)\n"
            f"model = load_model({str(FIXTURES / 'models' / 'llama2')!r})\n"
            "optimizer = runtime.adamw(model, 1e-3, 0.0)\n"
            "import torch; model(torch.tensor([[1, 2, 3]])).logsumexp(-1).sum().backward(); optimizer.step()\n"
            "sys.exit(', '.join(name for name in ('torch._dynamo', 'triton') if name in sys.modules) or None)")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if torch.version.cuda is None:
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=environment)


def test_fp32_matmul_stays_fp32():
    """Whatever backend setup chooses, products are those of fp32: bf16 inputs would be off by 0.1."""
    runtime.setup("cpu", 0)
    x, y = torch.randn(300, 300), torch.randn(300, 300)
    assert (x @ y - (x.double() @ y.double())).abs().max() < 1e-3


# -------------------------------------------------------------------------------- folder and state

def test_state_restores_weights_optimizer_and_rng(tmp_path):
    def train(model, optimizer, steps):
        for _ in range(steps):
            model(torch.randint(0, 40, (1, 8))).logsumexp(-1).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    torch.manual_seed(1)
    model = small_model(dtype=torch.float32, scale=1.0)
    optimizer = runtime.adamw(model, 1e-2, 0.1)
    train(model, optimizer, 3)
    runtime.save_state(tmp_path, 3, model, optimizer)
    train(model, optimizer, 2)
    again = small_model(dtype=torch.float32, seed=9)
    restored = runtime.adamw(again, 1e-2, 0.1)
    assert runtime.load_state(tmp_path, again, restored) == 3
    train(again, restored, 2)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_only_the_newest_whole_state_is_kept(tmp_path):
    model = small_model(dtype=torch.float32)
    optimizer = runtime.adamw(model, 1e-2, 0.1)
    assert runtime.load_state(tmp_path, model, optimizer) == 0
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    for step in (2, 10):
        runtime.save_state(tmp_path, step, model, optimizer)
    (tmp_path / "state" / ".new").mkdir()  # a kill while saving leaves this behind
    (tmp_path / "state" / ".new" / "state.safetensors").write_bytes(b"half")
    assert [p.name for p in (tmp_path / "state").glob("step_*")] == ["step_10"]
    assert runtime.load_state(tmp_path, model, optimizer) == 10


def test_a_folder_is_continued_with_its_own_config_only(tmp_path, capsys):
    out, data = str(tmp_path / "run"), tmp_path / "data.jsonl"

    def enter(lr, content, overwrite=False):
        gc.collect()  # the lock that a refused entry has left open
        data.write_text(content)
        return runtime.open_run(out, Config(out=out, lr=lr), {"data": str(data)}, overwrite)[1]

    enter(0.1, "a").close()
    enter(0.1, "a").close()
    (tmp_path / "run" / "mine.txt").write_text("keep")
    exits(capsys, lambda: enter(0.2, "a"), "was begun with lr=0.1, not 0.2")
    exits(capsys, lambda: enter(0.1, "b"), "its data has changed since the run began")
    (tmp_path / "run" / "model_step_8").mkdir()
    enter(0.2, "b", overwrite=True).close()
    assert (tmp_path / "run" / "mine.txt").exists() and not (tmp_path / "run" / "model_step_8").exists()
    lock = enter(0.2, "b")
    exits(capsys, lambda: enter(0.2, "b"), "another process is running here")
    lock.close()
    enter(0.2, "b").close()


@pytest.mark.parametrize("data", ["data", "data/train-*.jsonl"])
def test_a_folder_is_continued_with_all_its_shards_only(data, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    for i in range(2):
        (tmp_path / "data" / f"train-{i}.jsonl").write_text(str(i))
    config = Config(out=str(tmp_path / "run"))
    for _ in range(2):
        runtime.open_run(config.out, config, {"data": f"{tmp_path}/{data}"})[1].close()
    (tmp_path / "data" / "train-1.jsonl").write_text("2")
    exits(capsys, lambda: runtime.open_run(config.out, config, {"data": f"{tmp_path}/{data}"}), "its data has changed")


def test_a_folder_and_what_it_reads_may_move(tmp_path, capsys):
    """A run goes on wherever its folder, its data and its model lie: what counts is what is in them."""
    import sft

    (tmp_path / "data.jsonl").write_text("a")
    config = sft.Config(out=str(tmp_path / "run"), data=str(tmp_path / "data.jsonl"), model=str(tmp_path))

    def enter(config):
        gc.collect()
        runtime.open_run(config.out, config, {"data": config.data})[1].close()

    enter(config)
    (tmp_path / "elsewhere").mkdir()
    shutil.copytree(tmp_path / "run", tmp_path / "elsewhere" / "copy")
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "data.jsonl").rename(tmp_path / "elsewhere" / "data.jsonl")
    moved = dataclasses.replace(config, out=str(tmp_path / "moved"), data=str(tmp_path / "elsewhere" / "data.jsonl"))
    enter(moved)
    enter(dataclasses.replace(moved, out=str(tmp_path / "elsewhere" / "copy")))
    exits(capsys, lambda: enter(dataclasses.replace(moved, model="other")), "was begun with model=")
    (tmp_path / "elsewhere" / "data.jsonl").write_text("b")
    exits(capsys, lambda: enter(moved), "its data has changed since the run began")


def test_a_change_is_accepted_by_name_once_and_said(tmp_path, capsys):
    """A reward function that has been mended, say: its steps are worth keeping, and the log says what happened."""
    import ppo

    files = {name: str(tmp_path / name) for name in ("data", "mine.py", "yours.py")}
    config = ppo.Config(out=str(tmp_path / "run"))

    def enter(accepted, **contents):
        gc.collect()
        for name, content in contents.items():
            (tmp_path / name.replace("_", ".")).write_text(content)
        depends_on = {"data": files["data"], "reward mine.py": files["mine.py"], "reward yours.py": files["yours.py"]}
        runtime.open_run(config.out, dataclasses.replace(config, accept_change=accepted), depends_on)[1].close()
        return capsys.readouterr().out

    assert enter("", data="a", mine_py="1", yours_py="1") == enter("reward") == ""
    exits(capsys, lambda: enter("", mine_py="2"), "its reward mine.py has changed", "or accept_change=reward")
    exits(capsys, lambda: enter("data"), "its reward mine.py has changed")
    exits(capsys, lambda: enter("rewards"), "accept_change is 'rewards', expected one of data, reward")
    assert enter("reward") == (f"{config.out}: goes on although its reward mine.py changed since the run began: "
                               "accept_change\n")
    assert enter("") == ""  # from now on this is what it depends on
    exits(capsys, lambda: enter("reward", data="b", mine_py="3"), "its data has changed")


def test_an_older_name_of_a_key_is_one_line_that_names_the_new_one(tmp_path, capsys):
    """In a config, on the command line; ppo's max_tokens is still a reply's length."""
    import ppo
    import sft

    (tmp_path / "old.toml").write_text("warmup = 0.1\n")
    old = ["--config", str(tmp_path / "old.toml")]
    exits(capsys, lambda: runtime.load_config(sft.Config, "", old), "old.toml", "'warmup' is called 'warmup_ratio' now")
    exits(capsys, lambda: runtime.load_config(sft.Config, "", ["max_tokens=9"]), "'micro_tokens' now")
    exits(capsys, lambda: runtime.load_config(ppo.Config, "", ["lam=0.9"]), "'gae_lambda' now")
    assert runtime.load_config(ppo.Config, "", ["max_tokens=9"]).max_tokens == 9


def test_a_folder_begun_under_older_names_is_known_again(tmp_path, capsys):
    import sft

    config = sft.Config(out=str(tmp_path / "run"), data="", model="")
    runtime.open_run(config.out, config, {})[1].close()
    began = tmp_path / "run" / "config.toml"
    old = {"micro_tokens": "max_tokens", "min_lr_ratio": "floor", "max_grad_norm": "clip", "warmup_ratio": "warmup"}
    began.write_text("".join(old.get(line.split(" = ")[0], line.split(" = ")[0]) + " = " + line.split(" = ")[1] + "\n"
                             for line in began.read_text().splitlines()))
    runtime.open_run(config.out, config, {})[1].close()
    began.write_text(began.read_text().replace("columns = {}\n", ""))  # and before there was this key
    runtime.open_run(config.out, config, {})[1].close()
    named = dataclasses.replace(config, columns={"prompt": "ask"})
    exits(capsys, lambda: runtime.open_run(config.out, named, {}), 'was begun with columns={}, not {"prompt": "ask"}')
    gc.collect()  # the lock that a refused entry has left open
    other = dataclasses.replace(config, max_grad_norm=2.0)
    exits(capsys, lambda: runtime.open_run(config.out, other, {}), "was begun with max_grad_norm=1.0, not 2.0")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, capsys):
    (tmp_path / "file").touch()
    exits(capsys, lambda: runtime.open_run(str(tmp_path / "file"), Config(), {}), "cannot be written")


def test_metrics_after_the_last_checkpoint_are_cut_off(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = runtime.Log(tmp_path, 2, 5, ("loss",), "off", Config())
    log.step(3, {"loss": 0.5})
    log.close()
    assert [json.loads(x)["step"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


def test_a_loss_that_is_not_finite_names_step_and_records(capsys):
    runtime.check_finite(1.0, 2.0, 4, [1])
    exits(capsys, lambda: runtime.check_finite(math.nan, 2.0, 4, [9, 7]), "step 5: loss is nan", "records: 8, 10")


def test_an_unknown_device_is_one_line(capsys):
    missing = "cuda:99" if torch.cuda.is_available() else "cuda:7"
    exits(capsys, lambda: runtime.setup(missing, 0), "which this machine does not have")
    exits(capsys, lambda: runtime.setup("quantum", 0), "device is 'quantum'")


def test_the_kernels_are_chosen_and_told(capsys, monkeypatch):
    runtime.setup("cpu", 0)
    assert capsys.readouterr().out.strip().endswith("kernels torch")
    monkeypatch.setattr("runtime.device.INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exits(capsys, lambda: runtime.setup("cpu", 0, kernel="triton"), "kernels is 'triton'", "use kernels=torch")


def test_everything_but_the_kernels_for_gpus_runs_without_triton():
    code = ("import sys; sys.modules['triton'] = None; import dpo, judge, ppo, reward, sft, torch; "
            "from kernels.attention import attention; from kernels.layout import Layout; "
            "q = torch.randn(5, 2, 8); print(attention(q, q, q, Layout.build([5])).shape)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "torch.Size([5, 2, 8])", done.stderr


def test_wandb_offline_writes_in_the_run_folder(tmp_path):
    log = runtime.Log(tmp_path, 0, 1, ("loss",), "offline", Config())
    log.step(1, {"loss": 0.5})
    log.close()
    assert list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))


# ------------------------------------------------------------------------------------- Apple and Windows

@pytest.fixture
def apple(monkeypatch):
    """A machine without CUDA that says it has MPS, which computes what `changed` makes of the CPU's results."""
    step = device_module._small_step

    def pretend(changed):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        cpu = torch.device("cpu")
        monkeypatch.setattr(device_module, "_small_step", lambda d: step(cpu) if d == cpu else changed(step(cpu)))

    return pretend


def test_auto_is_mps_where_its_small_step_is_the_cpus(apple, capsys):
    apple(lambda results: [part * (1 + 1e-6) for part in results])
    assert runtime.find_device("auto") == torch.device("mps") and capsys.readouterr().out == ""
    assert runtime.find_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("part, said", [(0, "the loss of a small step"), (1, "the gradients"), (2, "updated weights")])
@pytest.mark.parametrize("wrong", [lambda x: x + 0.01, lambda x: x * math.nan], ids=["off", "nan"])
def test_auto_is_the_cpu_and_says_why_where_mps_computes_something_else(part, said, wrong, apple, capsys):
    apple(lambda results: [wrong(x) if i == part else x for i, x in enumerate(results)])
    assert runtime.find_device("auto") == torch.device("cpu")
    assert "device=auto takes the CPU: on MPS" in (out := capsys.readouterr().out) and said in out


def test_auto_is_the_cpu_and_says_why_where_mps_lacks_an_operation(apple, capsys):
    def fails(results):
        raise NotImplementedError("aten::x is not implemented for MPS\nmore")

    apple(fails)
    assert runtime.find_device("auto") == torch.device("cpu")
    assert capsys.readouterr().out == ("device=auto takes the CPU: on MPS an operation fails: aten::x is not "
                                       "implemented for MPS\n")


def test_the_small_step_is_adamws_by_hand():
    """Its weights move by lr (g / (|g| + eps) + weight_decay w), and the check passes on the CPU itself."""
    assert device_module.wrong_on(torch.device("cpu")) == ""
    loss, gradients, weights = device_module._small_step(torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) / 4 for shape in ((40, 32), (96, 32), (40, 32))]
    before = torch.cat([weight.flatten() for weight in drawn])
    moved = before - 0.1 * (gradients / (gradients.abs() + 1e-3) + 0.1 * before)
    assert (moved - weights).abs().max() < 1e-5 and loss > 3


def test_windows_is_one_line_that_names_wsl():
    """fcntl is hidden in a process of its own: every module imports, and a command says what to do."""
    code = ("import sys; sys.modules['fcntl'] = None\n"
            "import sft, dpo, reward, ppo, kto, distill, judge, chat, compare, collect.annotate, collect.rounds\n"
            "import runtime; runtime.load_config(sft.Config, '', [])")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.splitlines()) == 1 and "WSL" in done.stderr and "wsl --install" in done.stderr


def test_a_resumed_run_goes_on_in_its_wandb_run(tmp_path):
    ids = []
    for step in (0, 1, 0):
        log = runtime.Log(tmp_path, step, 2, ("loss",), "offline", Config())
        log.step(step + 1, {"loss": 0.5})
        ids.append(log.wandb.id)
        log.close()
    assert ids[0] == ids[1] != ids[2]


@pytest.mark.parametrize("mode, environment, said", [
    ("online", {}, ["wandb is 'online', but there is no key", "wandb login", "wandb=offline"]),
    ("online", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, ["WANDB_MODE=offline", "set wandb=off"]),
    ("offline", {"WANDB_MODE": "disabled"}, ["wandb is 'offline'", "WANDB_MODE=disabled"]),
])
def test_what_wandb_could_not_do_is_said_before_anything_loads(mode, environment, said, tmp_path, capsys, monkeypatch):
    import sft

    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_IDENTITY_TOKEN_FILE", "WANDB_BASE_URL", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    exits(capsys, lambda: sft.Config(wandb=mode), *said)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password key\n")
    assert sft.Config(wandb=mode).wandb == mode


def test_runs_that_share_a_cache_may_write_it_at_once(tmp_path, monkeypatch):
    """The other run's file takes its place just before ours does: both are whole, and nobody is told otherwise."""
    file, sums, replace = tmp_path / "ref.safetensors", torch.arange(3.0), type(tmp_path).replace

    def meanwhile(path, target):
        monkeypatch.setattr(type(tmp_path), "replace", replace)
        runtime.write_cache(file, sums, {"model": "m"}, tmp_path / "other")
        return replace(path, target)

    monkeypatch.setattr(type(tmp_path), "replace", meanwhile)
    runtime.write_cache(file, sums, {"model": "m"}, tmp_path / "run")
    assert torch.equal(runtime.read_cache(file, "sums", {"model": "m"}, "delete it"), sums)
    assert [path.name for path in tmp_path.iterdir()] == ["ref.safetensors"]
