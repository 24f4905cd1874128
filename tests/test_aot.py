"""tests/aot.py: the shipped kernels compile for GPUs that are not here, and what should fail does."""
import os
import subprocess
import sys

import aot
import pytest
from conftest import ROOT

pytest.importorskip("triton")

TOY = '''
import os
import triton
import triton.language as tl
from aot import Build

@triton.jit
def product(a, b, c, N, K, M: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """c [M, N] = a [M, K] b [N, K]^T, a tile of BM x BN per program."""
    i = tl.program_id(0) * BM + tl.arange(0, BM)[:, None]
    j = tl.program_id(1) * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    sums = tl.zeros((BM, BN), tl.float32)
    for at in range(0, K, BK):
        x, y = tl.load(a + i * K + at + k), tl.load(b + j[:, None] * K + at + k)
        sums = tl.dot(x, y.T, sums)
    tl.store(c + i * N + j, sums.to(tl.bfloat16))

@triton.jit
def chained(a, b, SIZE: tl.constexpr):
    """a = (a b^T) b: the first product's warps all lie along its rows, 16 each."""
    at = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)
    x, y = tl.load(a + at), tl.load(b + at)
    tl.store(a + at, tl.dot(tl.dot(x, y.T).to(tl.bfloat16), y).to(tl.bfloat16))

@triton.jit
def double(a, b, N, BLOCK: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, BLOCK)
    tl.store(b + i, tl.load(a + i) * 2)

class Crash:
    @property
    def arg_names(self):
        os.abort()

def matmul(name, bm, bn, bk, warps=4, stages=2):
    types = dict(a="*bf16", b="*bf16", c="*bf16", N="i32:16", K="i32:16", M=64, BM=bm, BN=bn, BK=bk)
    return Build(name, product, types, warps, stages, matmul=True)

def copy(name, matmul, wide, n="i32:16"):
    return Build(name, double, dict(a="*bf16", b="*bf16", N=n, BLOCK=1024), 4, 1, matmul, wide)
'''


def run(command: list[str], python_path: str = "") -> tuple[int, list[str]]:
    """Exit code and lines of aot."""
    env = os.environ | {"PYTHONPATH": python_path, "TRITON_INTERPRET": "0"}
    ended = subprocess.run([sys.executable, *command], cwd=ROOT, env=env, capture_output=True, text=True)
    return ended.returncode, (ended.stdout + ended.stderr).splitlines()


def run_toy(toy: str, tmp_path, *options: str) -> tuple[int, list[str]]:
    """aot on the toy's builds."""
    (tmp_path / "toy.py").write_text(TOY + toy)
    code = "import toy; import aot; raise SystemExit(aot.main(toy.builds))"
    return run(["-c", code, "--baseline", str(tmp_path / "baseline.json"), "--workers", "1", *options],
               f"{tmp_path}:{ROOT}:{ROOT / 'tests'}")


def test_the_shipped_kernels_compile_for_three_generations():
    code, lines = run(["tests/aot.py"])
    assert code == 0, "\n".join(line for line in lines if "FAILED" in line or "Error" in line)
    ok = [line for line in lines if line.rstrip().endswith((" ok", "ok, no baseline"))]
    for kernel in ("attention", "decode", "rms_norm", "rotary", "swiglu", "logprobs", "nf4"):
        for sm in ("sm_80", "sm_90", "sm_100"):
            assert any(line.startswith(kernel) and sm in line for line in ok), (kernel, sm)


def test_bad_kernels_fail_each_with_its_reason_and_the_rest_is_compiled(tmp_path):
    code, lines = run_toy('''
def builds(sm):
    return [matmul("good", 64, 64, 32), matmul("spilling", 128, 256, 64), matmul("large", 64, 64, 256, 4, 4),
            Build("twice", chained, dict(a="*bf16", b="*bf16", SIZE=64), 8, 1, matmul=True),
            matmul("odd", 64, 64, 48), Build("crash", Crash(), {}, 4, 1), copy("idle", True, False),
            copy("narrow", False, True, "i32"), copy("wide", False, True)] if sm == 90 else []
''', tmp_path)
    said = {line.split()[0]: line for line in lines if " sm_90 " in line}
    assert code == 1
    for name in ("good", "wide"):
        assert said[name].endswith("ok, no baseline"), said[name]
    reasons = {"spilling": "spill instructions, 0 allowed", "large": "KiB of shared memory, sm_90 has 227",
               "twice": "computes 1.5 times the products of its tile", "odd": "power of 2",
               "crash": "the compiler crashed", "idle": "the matrix units are idle",
               "narrow": "no global access is 128 bits"}
    for name, reason in reasons.items():
        assert reason in said[name].partition("FAILED: ")[2], said[name]
    assert any(line.startswith("failed: ") and line.count(" sm_90") == 7 for line in lines)


def test_an_unchanged_build_is_not_compiled_again_and_a_worse_one_fails(tmp_path):
    builds = """
def builds(sm):
    return [matmul('same', 64, 64, 32), matmul('other', 64, {}, 32)] if sm == 80 else []
"""
    assert run_toy(builds.format(64), tmp_path, "--write")[0] == 0
    code, lines = run_toy(builds.format(128), tmp_path)  # twice the sums, in registers on sm_80
    assert code == 1 and lines[0].startswith("same") and lines[0].endswith("ok")
    assert "FAILED" in lines[1] and "registers" in lines[1] and "before" in lines[1]
    assert ", 1 compiled: 1 failed, 0 without a baseline" in lines[2] and lines[3] == "failed: other sm_80"


def test_a_line_added_above_a_kernel_compiles_nothing(tmp_path):
    toy = """
@triton.jit
def triple(a, b, BLOCK: tl.constexpr):
    tl.store(b + tl.arange(0, BLOCK), tl.load(a + tl.arange(0, BLOCK)) * 3)

def builds(sm):
    return [Build("triple", triple, dict(a="*bf16", b="*bf16", BLOCK=1024), 4, 1)] if sm == 80 else []
"""
    assert ", 1 compiled: 0 failed" in run_toy(toy, tmp_path, "--write")[1][1]
    assert ", 0 compiled: 0 failed" in run_toy("# a line\n" + toy, tmp_path)[1][1]


def test_a_baseline_that_is_stopped_holds_what_was_built_until_then(tmp_path):
    """The first compiles, the second crashes the process that compiles it: the next run takes the first as it is."""
    toy = """
def builds(sm):
    return [matmul('first', 64, 64, 32), Build('second', Crash(), {}, 4, 1)] if sm == 80 else []
"""
    code, lines = run_toy(toy, tmp_path, "--write")
    assert code == 1 and "builds that do not compile keep those they had" in lines[-1]
    code, lines = run_toy(toy, tmp_path)
    assert lines[0].startswith("first") and lines[0].endswith(" ok") and ", 1 compiled: 1 failed" in lines[2]


ROW = {"kernel": "x", "sm": 90, "matmul": True, "wide": True, "registers": 168, "spills": 0, "shared": 227 * 1024,
       "warps": 12, "matrix": 8, "products": 1.0, "tma": 0, "wide_loads": 4, "wide_stores": 2, "serialized": False}


@pytest.mark.parametrize("change, baseline, said", [
    ({}, {}, None),
    ({"spills": 2}, {"spills": 2}, None),
    ({"spills": 3}, {"spills": 2}, "3 spill instructions, 2 allowed"),
    ({"registers": 176}, {}, None),
    ({"registers": 177}, {}, "177 registers, 168 before"),
    ({"shared": 227 * 1024 + 1}, {}, "shared memory"),
    ({"sm": 80, "shared": 164 * 1024}, {}, "sm_80 has 163"),
    ({"warps": 4}, {}, "warp specialisation did not happen"),
    ({"matrix": 0}, {}, "HGMMA"),
    ({"products": 1.5}, {}, "computes 1.5 times the products of its tile"),
    ({"products": 1.5}, {"products": 1.5}, None),
    ({"products": None}, {}, None),
    ({"matrix": 0, "matmul": False}, {}, None),
    ({"wide_stores": 0}, {}, "no wide stores left, 2 before"),
    ({"wide_loads": 0, "wide_stores": 0, "wide": False}, {}, None),
    ({"serialized": True}, {}, "one after another"),
    ({"error": "RuntimeError: no"}, {}, "RuntimeError: no"),
])
def test_what_counts_as_a_fault(change, baseline, said):
    found = aot.faults(ROW | change, ROW | baseline)
    assert not found if said is None else said in "; ".join(found)


def test_without_a_baseline_only_the_row_itself_can_be_at_fault():
    assert not aot.faults(ROW | {"registers": 255}, {})
    assert aot.faults(ROW | {"spills": 1}, {})
