"""What the tests share: fixtures written by other libraries, and models small enough to check by brute force."""
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# One thread a process: models this small gain nothing from a second, and pytest-xdist starts a process for each core.
os.environ["OMP_NUM_THREADS"] = "1"  # for the scripts that tests start, too
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy's threads make the interpreter six times slower

import pytest
import torch
from safetensors.torch import load_file

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before the first import of Triton

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

FIXTURES = Path(__file__).parent / "fixtures"
FAMILIES = ("llama2", "llama3", "yi", "mistral", "qwen2", "qwen3", "falcon7b", "falcon40b", "gpt_bigcode", "starcoder2",
            "gpt_neox", "gemma")  # a tiny model of each in fixtures/models, with what transformers computes by it
CONFIGS = sorted(path.name for path in (FIXTURES / "configs").iterdir())  # rarer settings of them, likewise
BASE = ROOT / "data" / "tiny" / "base"


@pytest.fixture(autouse=True)
def _same_everywhere():
    torch.set_num_threads(1)  # models this small only wait for a second thread
    torch.manual_seed(0)


def reference(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """A numeric case of tests/fixtures/reference: its json and its arrays."""
    file = FIXTURES / "reference" / name
    arrays = file.with_suffix(".safetensors")
    return json.loads(file.with_suffix(".json").read_text()), load_file(arrays) if arrays.is_file() else {}


def small_model(vocab_size=40, width=16, layers=2, heads=4, kv_heads=2, dtype=torch.float64, seed=0, scale=10.0,
                **fields):
    """A random model whose logits are far from uniform: the usual initial weights, `scale` times as large."""
    from model import ModelConfig, Transformer, init_weights

    config = ModelConfig(vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads,
                         head_dim=width // heads, mlp_width=24, max_positions=256, **fields)
    model = Transformer(config)
    init_weights(model, seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model.to(dtype)


def exits(capsys, call, *fragments: str) -> None:
    """The call leaves with code 2 and one line on stderr that holds every fragment."""
    with pytest.raises(SystemExit) as left:
        call()
    assert left.value.code == 2
    said = capsys.readouterr().err.strip()
    assert len(said.splitlines()) == 1, said
    for fragment in fragments:
        assert fragment in said, f"{fragment!r} is not in: {said}"


@pytest.fixture
def on_triton():
    """The kernels run with Triton, on a GPU or interpreted."""
    import kernels

    kernels.use("triton")
    yield
    kernels.use("auto")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random two-layer model with the tiny world's tokenizer and no template: what a script can start from."""
    from checkpoints import save_model
    from data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(BASE)
    path = tmp_path_factory.mktemp("checkpoint")
    save_model(small_model(vocab_size=tokenizer.vocab_size, width=32, dtype=torch.float32, scale=1.0), path, tokenizer)
    return path


def step_gradients(model, trees: list, micro_tokens: int, train_step) -> tuple[dict, list[torch.Tensor]]:
    """Summed metrics and gradients of one optimizer step over `trees`, in micro-batches of at most `micro_tokens`."""
    from data.pack import pack

    metrics: dict[str, float] = {}
    batches = pack(trees, micro_tokens)
    for batch in batches:
        loss, parts = train_step(model, batch, batches)
        loss.backward()
        for name, value in parts.items():
            metrics[name] = metrics.get(name, 0.0) + value.item()
    return metrics, [p.grad for p in model.parameters()]


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 8 MB, where root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small disk takes root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def metrics_of(run: Path) -> list[dict]:
    """metrics.jsonl without what a clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if not k.endswith("_per_s")} for line in lines]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def kill_after(command: list[str], done) -> None:
    """Start a script and kill it the moment `done()` is true."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        deadline = time.time() + 120
        while not done():
            assert process.poll() is None, "the script ended before it could be killed"
            assert time.time() < deadline
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
