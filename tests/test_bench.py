"""benchmarks/kernels without a GPU: how work is counted, what rows become, and that a group survives its kernels."""
import json
import time

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention

from benchmarks.kernels import __main__ as driver
from benchmarks.kernels import report
from benchmarks.kernels.groups import (
    CONTESTS,
    HEADS,
    SCENES,
    Scene,
    attention_contests,
    flex_work,
    four_turns,
    mixed,
    padded_attention,
    rows_of,
    seen_pairs,
)
from benchmarks.kernels.measure import Bench, Work
from kernels.attention import attention
from kernels.layout import Layout

CPU = torch.device("cpu")


def test_work_counts_the_pairs_that_see_each_other():
    """3 tokens: 1 + 2 + 3. A leaf of 2 behind a prefix of 2: 3 + 4. With a window of 2: 1 + 2 + 2, then 2 + 2."""
    assert seen_pairs(Scene("", [3])) == 6
    assert seen_pairs(Scene("", [3, 2], [0, 0], [0, 2])) == 6 + 7
    assert seen_pairs(Scene("", [3, 2], [0, 0], [0, 2], 2)) == 5 + 4


def test_a_dialogue_of_four_turns_as_a_tree_and_as_its_pairs():
    """Prompts of 50, replies of 200: a trunk of 1000 and 4 leaves of 200; as pairs twice 250, 500, 750 and 1000."""
    scene = four_turns("", 50, 200, 2, (4, 2, 8))
    assert scene.lengths == 2 * [1000, 200, 200, 200, 200] and scene.trunks == 5 * [0] + 5 * [5]
    assert scene.prefixes == 2 * [0, 50, 300, 550, 800]
    assert rows_of(scene) == 2 * [250, 250, 500, 500, 750, 750, 1000, 1000]


def test_packed_lengths_fill_the_row():
    lengths = mixed(2048, 128, 16384)
    assert 16384 - 128 < sum(lengths) <= 16384 and max(lengths) <= 2048


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("scene", [Scene("", [5, 9], heads=(4, 2, 16)), Scene("", [20], window=7, heads=(4, 2, 16)),
                                   Scene("", [6, 3, 2, 4], [0, 0, 0, 3], [0, 2, 6, 0], heads=(4, 2, 16))])
def test_flex_attention_is_asked_for_the_same_attention(scene):
    q, k, v = (torch.randn(sum(scene.lengths), n, 16) for n in (4, 2, 2))
    work = flex_work(scene, flex_attention, q, k, v)
    theirs = work.call(*(x.detach() for x in work.inputs))[0].transpose(0, 1)
    ours = attention(q, k, v, Layout.build(scene.lengths, scene.trunks, scene.prefixes), scene.window)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("window", [None, 7])
def test_padded_attention_is_asked_for_the_same_attention(tmp_path, window):
    scene = Scene("", [20, 20], window=window, heads=(4, 2, 16))
    work = padded_attention(Bench("attention", CPU, 60, tmp_path / "rows"), scene)["SDPA"]
    q, k, v = (x.detach().transpose(1, 2).flatten(0, 1) for x in work.inputs)
    theirs = work.call(*work.inputs).transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(attention(q, k, v, Layout.build([20, 20]), window), theirs)


# ------------------------------------------------------------------------------------------------------------ measuring

def written(file) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_contest_times_what_runs_and_says_why_the_rest_did_not(tmp_path):
    bench = Bench("toy", CPU, 60, tmp_path / "rows")

    def missing(x):
        raise NotImplementedError("not in this version\nsecond line")

    x = torch.randn(1000, requires_grad=True)
    works = {"ours": Work(lambda x: x * 2, (x,)), "slow": Work(lambda x: time.sleep(0.01) or x * 2, (x,)),
             "absent": Work(missing, (x,))}
    bench.compare("toy", "1000", works, {"forward": 1e6, "both": 3e6}, "TFLOP/s")
    rows = {(row["impl"], row["pass"]): row for row in written(bench.file)}
    assert rows["absent", "forward"]["reason"] == "NotImplementedError: not in this version" and len(rows) == 6
    for name in ("forward", "both"):
        fast, slow = rows["ours", name], rows["slow", name]
        assert slow["ms"] >= 10 and fast["ms"] < slow["ms"] and fast["ms_p20"] <= fast["ms"] <= fast["ms_p80"]
        assert slow["rate"] == pytest.approx(slow["amount"] / slow["ms"] / 1e9) and fast["runs"] >= 5
    assert 4000 <= rows["ours", "forward"]["extra_bytes"] < 4100  # its result


def test_a_kernel_is_timed_only_if_its_errors_are_those_of_the_dtype(tmp_path):
    """x^3 in bf16: x (x x) may round as PyTorch's x**3 does; a hundredth too much, or half the gradient, is wrong."""
    bench = Bench("toy", CPU, 60, tmp_path / "rows")
    x = torch.randn(1000).bfloat16().requires_grad_()
    assert bench.check("toy", "right", Work(lambda x: x * (x * x), (x,)), lambda x: x**3)
    assert not bench.check("toy", "off", Work(lambda x: x * (x * x) * 1.01, (x,)), lambda x: x**3)
    assert not bench.check("toy", "gradient", Work(lambda x: (x**3 + (x**3).detach()) / 2, (x,)), lambda x: x**3)
    assert not bench.check("toy", "broken", Work(lambda x: 1 / 0, (x,)), lambda x: x**3)
    rows = written(bench.file)
    assert [row["status"] for row in rows] == ["ok", "failed", "failed", "failed"]
    assert len(rows[0]["errors"]) == 2 and 0 < rows[0]["errors"][0] < 0.01 < rows[2]["errors"][1]
    assert rows[3]["reason"] == "ZeroDivisionError: division by zero"
    assert "toy" in report.lines("toy", rows, {}).splitlines()[1] and not report.contests(rows)


def test_processes_that_build_share_the_contests_and_time_nothing(tmp_path):
    ran = []
    for i in range(2):
        bench = Bench("toy", CPU, 60, tmp_path / "rows", (i, 2))
        for number in range(5):
            x = torch.ones(1, requires_grad=True)
            works = {"ours": Work(lambda x, done=(i, number): ran.append(done) or x, (x,)),
                     "other": Work(lambda: 1 / 0)}
            bench.compare("toy", str(number), works, {"forward": 1, "both": 3}, "GB/s")
        assert bench.check("toy", "", Work(lambda: 1 / 0), None)
    assert list(dict.fromkeys(ran)) == [(0, 1), (0, 3), (1, 0), (1, 2), (1, 4)] and not bench.file.exists()


def test_on_a_gpu_everything_is_compiled_first_and_what_matters_most_is_measured_next():
    assert list(driver.WEIGHTS)[:5] == ["builds", "ceilings", "first", "trees", "training"]
    assert set(driver.WEIGHTS) - {"builds", "training"} == set(CONTESTS)
    assert [scene.name for scene in SCENES["first"]] == ["4 x 2048"] and HEADS["first"] == [(8192, 4096, 151936)]


def test_our_own_kernel_that_does_not_run_has_failed(tmp_path):
    bench = Bench("toy", CPU, 60, tmp_path / "rows")
    bench.compare("toy", "1", {"ours": Work(lambda: 1 / 0)}, {"forward": 1}, "GB/s")
    (row,) = written(bench.file)
    assert row["status"] == "failed" and row["reason"] == "ZeroDivisionError: division by zero" and "ms" not in row


def test_a_group_that_dies_or_is_out_of_time_leaves_rows(tmp_path):
    (row,) = driver.run_group("no such group", "cpu", 5, tmp_path / "a")
    assert row["status"] == "failed" and "KeyError" in row["reason"]
    bench = Bench("attention", CPU, -1, tmp_path / "b")
    attention_contests(bench)
    assert {(row["status"], row["reason"]) for row in written(bench.file)} == {("skipped", "no time left")}


# -------------------------------------------------------------------------------------------- tables, from made-up rows

def row(kernel, shape, name, impl, ms, unit="TFLOP/s", amount=1e9, extra=2**20, status="ok", group="toy"):
    return {"group": group, "kernel": kernel, "shape": shape, "pass": name, "impl": impl, "dtype": "bfloat16",
            "unit": unit, "status": status, "reason": "because", "ms": ms, "ms_p20": ms, "ms_p80": ms,
            "amount": amount, "rate": amount / ms / 1e9, "extra_bytes": extra}


DENSE, PACKED, HEAD = ("attention", "4 x 2048"), ("attention", "packed 128-2048"), ("logprobs", "8192 x 4096 x 151936")
MADE_UP = [row("copy", "", "forward", "PyTorch", 1.0, "GB/s", 4e9, group="ceilings"),
           row("matmul", "", "forward", "PyTorch", 1.0, amount=8e9, group="ceilings"),
           row(*DENSE, "forward", "ours", 2.0), row(*DENSE, "forward", "SDPA flash", 1.9),
           row(*DENSE, "forward", "SDPA cuDNN", 1.0, status="skipped"), row(*DENSE, "forward", "floor", 0.1),
           row(*DENSE, "backward", "ours", 4.0), row(*DENSE, "backward", "SDPA flash", 3.0),
           row(*PACKED, "forward", "ours", 4.0), row(*PACKED, "backward", "ours", 4.0),
           row(*HEAD, "both", "ours", 50.0, extra=3 * 2**30),
           row("NF4 dequantise", "a", "forward", "ours", 1.0, "GB/s", 3.8e9),
           row("NF4 dequantise", "b", "forward", "ours", 1.0, "GB/s", 3e9)]


@pytest.mark.parametrize("what, found", [
    ("attention forward, 4 x 2048", 1.9 / 2.0),            # the best of those that ran and are no floor
    ("attention backward, 4 x 2048", 3.0 / 4.0),
    ("packed 128-2048, forward and backward", 6.0 / 8.0),  # 2e9 in 8 ms, dense 2e9 in 6 ms
    ("logprobs, forward and backward, V 151936", 50.0),
    ("the same, memory", 3.0),
    ("NF4 dequantise", 0.75),                              # the worse of two shapes: 3 of 4 TB/s
    ("decode, 64 x 2048", None),
])
def test_what_a_target_finds_in_the_rows(what, found):
    target = next(target for target in report.TARGETS if target["what"] == what)
    assert report.value(target, MADE_UP) == (None if found is None else pytest.approx(found))


def test_the_verdict_tells_reached_missed_and_not_measured_apart():
    rows = {row.pop("kernel"): list(row.values()) for row in report.verdicts(MADE_UP)}
    assert rows["attention forward, 4 x 2048"] == ["x best baseline", "0.95", ">= 0.92", "reached"]
    assert rows["attention backward, 4 x 2048"][-1] == "missed"
    assert rows["logprobs, forward and backward, V 151936"][-1] == "reached"
    assert rows["the same, memory"] == ["GiB extra", "3", "<= 2", "missed"]
    assert rows["NF4 dequantise"] == ["of ceiling", "75%", ">= 92%", "missed"]
    assert rows["decode, 64 x 2048"][-1] == "not measured" and len(rows) == len(report.TARGETS)
    first, *_ = report.gpu_verdicts([{"device": "made up", "torch": "0", "triton": "1", "rows": MADE_UP}])
    assert first["GPU"] == "made up, torch 0, Triton 1" and first["verdict"] == "reached"


def test_contests_without_a_baseline_have_no_row_in_the_summary():
    first, _ = report.summary({"rows": MADE_UP})
    assert (first["kernel"], first["shape"], first["pass"], first["other"]["impl"]) == (*DENSE, "forward", "SDPA flash")
    assert first["ratio"] == 0.95 and first["share"] == 1 / 16 and first["mib"] == first["other_mib"] == 1


def test_the_terminal_shows_every_row():
    head, *lines = report.lines("toy", MADE_UP[2:], report.ceilings(MADE_UP)).splitlines()
    assert head == "== toy" and len(lines) == len(MADE_UP) - 2
    assert lines[0].split() == [*"attention 4 x 2048 forward ours 2.000 ms 0.5 TFLOP/s 6% of ceiling, ratio".split(),
                                "0.95,", "1.0", "MiB", "extra"]
    assert lines[2].split()[-2:] == ["skipped:", "because"]


def test_a_table_of_builds_puts_the_variants_of_a_kernel_together():
    def facts(registers, shared, spills=0):
        return {"registers": registers, "shared": shared, "spills": spills}

    newest = {"toy, E 64": {"80": facts(100, 2048), "90": facts(90, 1024)},
              "toy, E 128": {"80": facts(120, 1024, 2), "90": facts(80, 4096)}}
    (row,) = report.builds({"3.9": {"x": {"90": facts(1, 1)}}, "3.10": newest})
    assert list(row.values()) == ["toy", 4, "120 registers, 2 KiB, 2 spills", "90 registers, 4 KiB", None, "3.10"]
