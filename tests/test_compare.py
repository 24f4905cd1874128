"""compare.py: intervals by hand and by simulation, and whole comparisons with trainers that take no time."""
import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import BASE, ROOT, exits, write_jsonl

import compare
from data.tiny.build import held_out
from judging import paired
from judging.ratings import T975, t975

# A trainer: copies the base, so that replies are real; says what it was told; obeys a few keys.
TRAINER = """import json, pathlib, shutil, signal, sys, time
words = dict(word.split("=", 1) for word in sys.argv[1:] if "=" in word)
out = pathlib.Path(words["out"])
out.mkdir(parents=True, exist_ok=True)
with (out.parent / "ran.txt").open("a") as ran:
    print(json.dumps(words | {"began": time.time()}), file=ran)
signal.signal(signal.SIGTERM, lambda *_: (print("saved"), sys.exit(0)))
time.sleep(float(words.get("sleep", 0)))
if words.get("beta") == "bad":
    sys.exit("beta is bad, expected a number: mend it")
if "ref_cache" in words:
    pathlib.Path(words["ref_cache"]).write_text("sums")
shutil.copytree(BASE, out / "model")
with (out.parent / "ended.txt").open("a") as ended:
    print(time.time(), file=ended)
"""


def simulated(rng, seeds, dialogues, seed_sd, dialogue_sd, rest_sd=1.0):
    return (rng.normal(0, seed_sd, (seeds, 1)) + rng.normal(0, dialogue_sd, (1, dialogues))
            + rng.normal(0, rest_sd, (seeds, dialogues)))


# ------------------------------------------------------------------------------------ the interval

def test_an_interval_by_hand():
    """d = [[1, 3], [3, 9]]: mean 4; seeds' means 2 and 6, dialogues' 2 and 6.

    v_seeds = variance of 2, 6 over 2 seeds = 8 / 2 = 4. Rest: 1 - 2 - 2 + 4 = 1, -1, -1, 1, so MS_rest = 4 / 1 = 4.
    v_dialogues = (8 - 4 / 2) / 2 = 3. t(1) = 12.706 twice: half = 12.706 sqrt(4 + 3) = 33.617.
    Over dialogues alone: 12.706 sqrt(8 / 2) = 25.412.
    """
    found = paired.estimate(np.array([[1.0, 3.0], [3.0, 9.0]]))
    assert (found.mean, found.v_seeds, found.v_dialogues) == (4, 4, 3)
    assert found.half == pytest.approx(33.617, abs=1e-3) and found.dialogues_half == pytest.approx(25.412, abs=1e-3)
    # each seed alone: 2 ± 12.706 sqrt(2 / 2), 6 ± 12.706 sqrt(18 / 2)
    assert [cell["high"] for cell in found.by_seed] == pytest.approx([2 + 12.706, 6 + 38.118])
    assert not found.excludes_zero


def test_what_the_interval_does_not_depend_on():
    rng = np.random.default_rng(1)
    for _ in range(20):
        d = simulated(rng, rng.integers(2, 6), rng.integers(2, 40), *rng.uniform(0, 2, 2)) + rng.normal(0, 3)
        found, seeds, dialogues = paired.estimate(d), rng.permutation(len(d)), rng.permutation(d.shape[1])
        for other, scale in ((d[seeds][:, dialogues], 1), (-d, 1), (10 * d, 10)):
            again = paired.estimate(other)
            assert abs(again.mean) == pytest.approx(scale * abs(found.mean))
            assert again.half == pytest.approx(scale * found.half)
        assert paired.estimate(d + 5).half == pytest.approx(found.half)


@pytest.mark.parametrize("seeds", [3, 5])
def test_the_interval_covers_what_it_says_whatever_varies(seeds):
    """1,500 simulated comparisons of equal things: 95 % less three standard errors (1.7) at least, and not always.

    The shares of variance go from none for seeds to nearly all of it; the interval over dialogues alone fails where
    seeds matter, and Satterthwaite's where seeds outweigh dialogues.
    """
    rng = np.random.default_rng(0)
    for seed_sd, dialogue_sd in ((0, 0), (0.1, 0), (0.3, 0), (0, 0.5), (0.1, 1), (0.3, 1)):
        found = [paired.estimate(simulated(rng, seeds, 60, seed_sd, dialogue_sd)) for _ in range(1500)]
        covers = np.mean([not f.excludes_zero for f in found])
        alone = np.mean([abs(f.mean) <= f.dialogues_half for f in found])
        assert 0.933 <= covers <= 0.99, (seed_sd, dialogue_sd, covers)
        if seed_sd == 0.3:
            assert alone < 0.9


def satterthwaite(d) -> float:
    """The half-width with one t for the sum of the mean squares, at the degrees of freedom of Satterthwaite 1946."""
    seeds, dialogues = d.shape
    rows, columns = d.mean(axis=1), d.mean(axis=0)
    squares = np.array([dialogues * rows.var(ddof=1), seeds * columns.var(ddof=1),
                        ((d - rows[:, None] - columns + d.mean()) ** 2).sum() / (seeds - 1) / (dialogues - 1)])
    freedom = np.array([seeds - 1, dialogues - 1, (seeds - 1) * (dialogues - 1)])
    total = squares @ [1, 1, -1]
    if squares[1] < squares[2]:
        return T975[seeds - 2] * math.sqrt(squares[0] / d.size)
    return t975(max(1, int(total**2 / (squares**2 / freedom).sum()))) * math.sqrt(total / d.size)


def two_level_bootstrap_covers_zero(d, rng, rounds=200) -> bool:
    seeds, dialogues = (rng.integers(0, n, (rounds, n)) for n in d.shape)
    means = [d[s][:, i].mean() for s, i in zip(seeds, dialogues, strict=True)]
    low, high = np.percentile(means, [2.5, 97.5])
    return low <= 0 <= high


def test_other_intervals_promise_too_much_where_seeds_are_few_and_matter():
    """Three seeds that weigh as much as all else: ours 95 % at least, one t for the sum less, others far less."""
    rng = np.random.default_rng(5)
    drawn = [simulated(rng, 3, 60, 0.5, 1.0) for _ in range(3000)]
    ours = np.mean([not paired.estimate(d).excludes_zero for d in drawn])
    one_t = np.mean([abs(d.mean()) <= satterthwaite(d) for d in drawn])
    bootstrap = np.mean([two_level_bootstrap_covers_zero(d, rng) for d in drawn[:300]])
    alone = np.mean([abs((e := paired.estimate(d)).mean) <= e.dialogues_half for d in drawn])
    assert ours > 0.942 and one_t < 0.942 and bootstrap < 0.9 and alone < 0.7


def test_the_seeds_needed_have_the_power_they_promise():
    """With the true variances known, about 80 % of comparisons with that many seeds find the difference."""
    rng = np.random.default_rng(2)
    for difference, seed_sd in ((0.6, 0.3), (0.45, 0.3), (0.5, 0.5)):
        many = paired.estimate(simulated(rng, 400, 100, seed_sd, 0.3) + difference)
        truth = many._replace(mean=difference, v_seeds=(seed_sd**2 + 1 / 100) / 400, v_dialogues=0.3**2 / 100)
        seeds = paired.seeds_needed(truth)
        power, fewer = (np.mean([
            paired.estimate(simulated(rng, n, 100, seed_sd, 0.3) + difference).excludes_zero for _ in range(600)])
            for n in (seeds, max(2, seeds // 2)))
        assert 0.74 <= power <= 0.93 and fewer < 0.75, (difference, seed_sd, seeds)


def test_quantiles_go_on_where_the_table_ends():
    """Published: t(31) = 2.0395, t(40) = 2.0211, t(120) = 1.9799, t(1000) = 1.9623."""
    assert [t975(n) for n in (1, 30)] == [T975[0], T975[29]]
    assert [t975(n) for n in (31, 40, 120, 1000)] == pytest.approx([2.0395, 2.0211, 1.9799, 1.9623], abs=1e-4)


# ------------------------------------------------------------------------------------ the verdict

def estimate_of(mean, v_seeds, v_dialogues=0.0, seeds=3):
    half = math.sqrt(t975(seeds - 1) ** 2 * v_seeds + t975(199) ** 2 * v_dialogues)
    return paired.Estimate(mean, half, half, v_seeds, v_dialogues, seeds, 200, [])


def test_the_verdict_is_better_worse_or_not_to_be_told_apart():
    assert paired.verdict(estimate_of(5.0, 1.0)).startswith("B is better than A: +5.0 points [+0.7, +9.3], 95 % over 3")
    assert paired.verdict(estimate_of(-5.0, 1.0)).startswith("B is worse than A: -5.0 points [-9.3, -0.7]")
    apart = paired.verdict(estimate_of(2.0, 1.0))
    assert apart.startswith("B cannot be told apart from A with what was run: +2.0 points [-2.3, +6.3]")
    # 3 / n variance: at n = 9 sqrt(1/3) (2.306 + 0.842) = 1.817 < 2, at n = 8 sqrt(3/8) (2.365 + 0.842) = 1.964 < 2,
    # at n = 7 sqrt(3/7) (2.447 + 0.842) = 2.153 > 2
    assert paired.seeds_needed(estimate_of(2.0, 1.0)) == 8 and "about 8 seeds" in apart


def test_more_seeds_do_not_help_where_dialogues_are_too_few():
    """v_dialogues 1 alone asks for (1.97 + 0.84) x 1 = 2.81 points."""
    assert paired.seeds_needed(estimate_of(2.7, 0.01, 1.0)) is None
    assert "No number of seeds" in paired.verdict(estimate_of(1.0, 0.01, 1.0))
    assert paired.seeds_needed(estimate_of(2.9, 0.01, 1.0)) is not None


def test_one_seed_has_no_interval_over_seeds():
    one = paired.estimate(np.array([[1.0, 3.0, 2.0]]))
    assert math.isnan(one.half) and not one.excludes_zero and one.mean == 2
    said = paired.verdict(one)
    assert "No verdict: one seed was run" in said and "[-0.5, +4.5]" in said  # 2 ± 4.303 x 1 / sqrt(3)
    assert paired.seeds_needed(one) is None


def test_seeds_that_change_nothing_are_one_run():
    same = paired.estimate(np.array([[1.0, 3.0, 2.0]] * 3))
    assert math.isnan(same.half) and "all seeds gave the same" in paired.verdict(same)


def test_a_change_that_changes_nothing_is_said_to():
    assert "nothing that is judged has changed" in paired.verdict(paired.estimate(np.zeros((3, 4))))


def test_scores_that_cannot_be_paired_are_refused():
    a = {0: {"x": 1.0, "y": 2.0}, 1: {"x": 1.0, "y": 3.0}}
    b = paired.matrix({1: {"y": 5.0, "x": 1.0}, 0: {"y": 3.0, "x": 3.0}})
    assert (b - paired.matrix(a)).tolist() == [[2, 1], [0, 2]]
    for wrong, said in (({0: a[0], 1: {"x": math.nan, "y": 1.0}}, "B, seed 1: the score of dialogue x is nan"),
                        ({0: a[0], 1: {"x": 1.0}}, "1 dialogues have a score, at least 2")):
        with pytest.raises(ValueError, match=said):
            paired.matrix(wrong, "B")


# ------------------------------------------------------------------------------- whole comparisons

@pytest.fixture
def world(tmp_path, monkeypatch):
    """Two scripts, a config and ten dialogues, in a folder of their own."""
    monkeypatch.chdir(tmp_path)
    cached = "    ref_cache: str = ''\n"
    for name, reference in (("train.py", cached), ("mine.py", cached), ("plain.py", "")):
        source = TRAINER.replace("BASE", repr(str(BASE)))
        Path(name).write_text(f"class Config:\n    beta: float = 0.1\n{reference}\n\n{source}# {name}\n")
    Path("config.toml").write_text('data = "pairs.jsonl"\nmodel = "start"\n')
    write_jsonl(tmp_path / "dev.jsonl", held_out(1)["dev"])
    return tmp_path


def settings(**changes):
    return compare.Config(**{"data": "dev.jsonl", "out": "out", "replies": 1, "seeds": 2, "max_tokens": 8} | changes)


def ran(folder: Path) -> list[dict]:
    return [json.loads(line) for file in sorted(folder.glob("out/trained/*/ran.txt"))
            for line in file.read_text().splitlines()]


def test_a_comparison_trains_both_over_the_seeds_and_reports(world):
    report = compare.compare("train.py --config config.toml beta=0.1", "beta=0.3", settings())
    told = sorted((words["beta"], words["seed"], words["threads"]) for words in ran(world))
    assert told == [("0.1", "0", "1"), ("0.1", "1", "1"), ("0.3", "0", "1"), ("0.3", "1", "1")]
    assert report["about"]["B"] == "train.py --config config.toml beta=0.1 beta=0.3"
    assert "nothing that is judged has changed" in report["verdict"]  # all models are the base, with its key and seed
    written = json.loads(Path("out/report.json").read_text())
    assert [section["title"] for section in written["sections"]] == ["B - A"]  # one dialogue a task has no interval
    assert [row[0] for row in written["sections"][0]["rows"]] == ["seed 0", "seed 1", "all seeds"]
    assert set(written["scores"]) == {"A", "B"} and len(written["scores"]["A"]["0"]) == 10
    assert "<svg" in Path("out/report.html").read_text()


def test_another_seed_draws_other_replies_and_a_second_reply_is_averaged(world):
    one = compare.compare("train.py --config config.toml", "mine.py", settings())["scores"]["A"]
    two = compare.compare("train.py --config config.toml", "mine.py", settings(replies=2))["scores"]["A"]
    assert one[0] != one[1] and one[0] != two[0]
    assert len(ran(world)) == 4  # nothing was trained anew


def test_runs_are_shared_by_comparisons_and_trained_anew_when_the_script_changes(world):
    first = "train.py --config config.toml"
    compare.compare(first, "beta=0.3", settings())
    compare.compare(first, "mine.py", settings())
    assert len(ran(world)) == 6  # A's two serve twice
    Path("mine.py").write_text(Path("mine.py").read_text() + "# edited\n")
    assert compare.compare(first, "mine.py", settings())["about"]["runs trained now"] == 2
    assert compare.compare(first, "mine.py", settings(seeds=3))["about"]["runs trained now"] == 2
    assert len(ran(world)) == 10


def test_reference_log_probabilities_are_shared_and_computed_once(world):
    """By all seeds and betas; not with other data, nor by a script that was edited. The first is awaited."""
    first = "train.py --config config.toml sleep=0.3"
    compare.compare(first, "beta=0.3", settings(jobs=4))
    began = sorted((words["began"], words["ref_cache"]) for words in ran(world))
    assert len({cache for _, cache in began}) == 1
    assert began[1][0] - began[0][0] > 0.3
    other = compare.variant("B", "data=other.jsonl", a := compare.variant("A", first))
    mine, plain = compare.variant("B", "mine.py", a), compare.variant("B", "plain.py", a)
    own = compare.variant("B", "ref_cache=x", a)
    files = {v: {job.reference for job in compare.jobs_of([v], 3, Path("out"))} for v in (a, other, mine, plain, own)}
    assert len(files[a] | files[other] | files[mine]) == 3 and files[plain] == files[own] == {None}
    by_seed = compare.variant("A", first + " model={seed}/start")
    assert len({job.reference for job in compare.jobs_of([by_seed], 3, Path("out"))}) == 3
    assert [job.variant.at(job.seed)[-1] for job in compare.jobs_of([by_seed], 2, Path("out"))] == ["model=0/start",
                                                                                                   "model=1/start"]


def test_as_many_runs_as_jobs_at_a_time_and_no_more(world):
    """Two of them: the third begins when the first has ended."""
    compare.compare("plain.py --config config.toml sleep=1", "beta=0.3", settings(jobs=2))
    began = sorted(words["began"] for words in ran(world))
    ended = sorted(float(t) for file in world.glob("out/trained/*/ended.txt") for t in file.read_text().split())
    assert began[1] < ended[0] < began[2] and ended[1] < began[3]


def test_a_killed_comparison_goes_on(world):
    """SIGTERM stops the trainers, which save; what was finished is not trained again."""
    command = [sys.executable, str(ROOT / "compare.py"), "plain.py --config config.toml", "sleep=60", "seeds=1",
               "data=dev.jsonl", "out=out", "replies=1"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.time() + 60
    while not (len(ran(world)) == 2 and list(world.glob("out/trained/*/0/model/config.json"))):
        assert time.time() < deadline and process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[1].splitlines()[-1] == "stopped; the same command goes on from there"
    assert process.returncode == 130
    (log,) = [file for file in world.glob("out/trained/*/0.log") if "saved" in file.read_text()]
    assert not (log.with_suffix("") / "model").exists()
    assert sum(words.get("sleep") is None for words in ran(world)) == 1


def test_what_a_killed_comparison_left_running_is_awaited(world):
    jobs = compare.jobs_of([compare.variant("A", "plain.py")], 1, Path("out"))
    holder = jobs[0].folder
    holder.mkdir(parents=True)
    assert not jobs[0].locked()
    code = (f"import fcntl, time, pathlib; lock = open({str(holder / '.lock')!r}, 'w'); "
            f"fcntl.flock(lock, fcntl.LOCK_EX); print('held', flush=True); time.sleep(0.5); "
            f"pathlib.Path({str(holder)!r}, 'model').mkdir(); "
            f"pathlib.Path({str(holder)!r}, 'model', 'config.json').touch()")
    left = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert left.stdout.readline() == "held\n" and jobs[0].locked()
    compare.train(jobs, 1, 1)
    left.wait()
    assert jobs[0].trained() and not ran(world)  # the other one's result serves


def test_a_trainer_that_fails_is_one_line_with_its_last_words(world, capsys):
    exits(capsys, lambda: compare.compare("train.py --config config.toml", "beta=bad", settings()),
          "B, seed 0: train.py ended with code 1: beta is bad, expected a number: mend it", "0.log")


def test_a_trainer_that_was_stopped_is_no_result(world, capsys):
    Path("train.py").write_text("import sys\n")
    exits(capsys, lambda: compare.compare("train.py --config config.toml", "beta=1", settings()),
          "seed 0: train.py was stopped before its end: the same command goes on")


def test_a_result_of_other_data_is_refused(world, capsys):
    Path("pairs.jsonl").write_text("{}\n")
    job = compare.jobs_of([compare.variant("A", "plain.py --config config.toml")], 1, Path("out"))[0]
    (job.model).mkdir(parents=True)
    (job.model / "config.json").touch()
    (job.folder / "config.toml").write_text('data = "pairs.jsonl"\n')
    digests = {"data": compare.runtime.file_hash("pairs.jsonl"), "code": compare.runtime.file_hash("plain.py")}
    (job.folder / "depends_on.json").write_text(json.dumps(digests))
    assert job.trained()
    Path("pairs.jsonl").write_text("{}\n{}\n")
    exits(capsys, job.trained, "its data has changed since it was trained", "choose another out=")


@pytest.mark.parametrize("first, second, said", [
    ("config.toml", "beta=1", "A: 'config.toml' begins with no script that is there"),
    ("missing.py", "beta=1", "A: 'missing.py' begins with no script that is there"),
    ("train.py 'x", "beta=1", "No closing quotation"),
    ("train.py seed=1", "beta=1", "A: seed=1 is for compare.py to say"),
    ("train.py", "out=x", "B: out=x is for compare.py to say"),
    ("train.py --config config.toml", "", "A and B are the same"),
    ("train.py --config none.toml", "beta=1", "none.toml: cannot be read"),
])
def test_texts_that_name_no_two_variants_are_one_line(first, second, said, world, capsys):
    exits(capsys, lambda: compare.compare(first, second, settings()), said)


def test_a_copy_that_was_not_edited_is_the_same(world, capsys):
    Path("mine.py").write_text(Path("train.py").read_text())
    exits(capsys, lambda: compare.compare("train.py", "mine.py", settings()), "the same", "change something")


def test_a_wrong_judge_or_missing_data_is_one_line_before_anything_is_trained(world, capsys):
    for changes, said in (({"judge": "recorded:x.jsonl"}, "compares nothing anew"),
                          ({"judge": "reward:nowhere"}, "judge: nowhere is no folder"),
                          ({"data": "none.jsonl"}, "data=none.jsonl: no such file")):
        exits(capsys, lambda changes=changes: compare.compare("train.py", "beta=1", settings(**changes)), said)
    exits(capsys, lambda: compare.main(["seeds=3"]), "names no two variants")
    exits(capsys, lambda: compare.main(["train.py", "beta=1", "sed=3"]), "unknown key 'sed', did you mean 'seeds'?")
    assert not ran(world)


def test_a_second_text_with_a_config_stands_alone_and_words_come_last(world):
    a = compare.variant("A", "train.py --config config.toml beta=0.1")
    assert compare.variant("B", "mine.py --config config.toml", a).words == ("--config", "config.toml")
    assert compare.variant("B", "mine.py lr=1", a).words == ("--config", "config.toml", "beta=0.1", "lr=1")
    assert a.settings(0) == {"data": "pairs.jsonl", "model": "start", "beta": "0.1"}
    Path("config.toml").write_text("lr = 2.0\n")
    assert a.key() != (key := compare.variant("A", "train.py --config config.toml").key())
    Path("config.toml").write_text("lr = 3.0\n")
    assert compare.variant("A", "train.py --config config.toml").key() != key


def test_any_other_judge_gives_a_score_for_each_dialogue(world, monkeypatch):
    """A reward model's mean over the turns; a model that compares: wins of B, and of A the rest, in percent."""
    monkeypatch.setattr(compare.games, "reward_scores", lambda where, answers, device: {
        key: [[2.0 * (key[0] == "B") + key[1]] * len(q.turns) for q in answers.questions]
        for key in answers.said})
    monkeypatch.setattr(compare, "check_checkpoint", lambda *_, **__: None)
    report = compare.compare("train.py --config config.toml", "mine.py", settings(judge="reward:there"))
    assert report["difference"]["mean"] == 2 and "of the reward model's score" in report["verdict"]

    def games(judge, pairs, answers):
        return [{"judge": "j", "prompt": answers.questions[m.question].id, "turn": m.turn, "repeat": m.seed, "a": m.a,
                 "b": m.b, "a_first": first, "preference": 0.0 if m.question else 0.5} for m, first in pairs]

    monkeypatch.setattr(compare.games, "compare", games)
    report = compare.compare("train.py --config config.toml", "mine.py", settings(judge=str(BASE)))
    a, b = (report["scores"][name][0] for name in "AB")
    assert sorted(b.values()) == [50] + [100] * 9 and all(a[i] + b[i] == 100 for i in a)
