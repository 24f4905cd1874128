import json
import math

import pytest
from conftest import exits

import judge
from data.tiny import build
from judge import Config, interval, summarize, table, win_rate


def test_interval_by_hand():
    """60, 62, 64: mean 62, sd 2, t(2) = 4.303, so 4.303 * 2 / sqrt 3 = 4.969."""
    centre, half = interval([60, 62, 64])
    assert centre == 62 and half == pytest.approx(4.9686, abs=1e-3)
    assert math.isnan(interval([5.0])[1])


def test_win_rate_by_hand():
    """Preferences 2, 2, 1, 1.5: mean 1.625, so 62.5 %; sd 0.4787 / 2 = 23.94 points."""
    result = win_rate([2, 2, 1, 1.5, math.nan])
    assert (result["win_rate"], result["n"], result["wins"], result["losses"], result["draws"]) == (62.5, 4, 2, 1, 1)
    assert result["standard_error"] == pytest.approx(23.94, abs=0.01)


def test_swapping_the_sides_mirrors_the_win_rate():
    preferences = [2, 1, 1.5, 1.2, 1.9]
    assert win_rate(preferences)["win_rate"] + win_rate([3 - p for p in preferences])["win_rate"] == pytest.approx(100)


def test_win_rate_refuses_what_is_no_preference():
    for bad in ([], [math.nan], [0.5], [3]):
        with pytest.raises(ValueError, match="preference"):
            win_rate(bad)


def graded(*dialogues):
    return [[{"text": "a b", "finished": True, "gold": g} for g in d] for d in dialogues]


def test_a_summary_by_hand():
    """Replies 1, 0 | 0.5 in seed 0 and 1, 1 | 1 in seed 1: 50 and 100 points, mean 75; t(1) = 12.706 times 25 = 317.65."""
    dialogues = [{"category": "x"}, {"category": "y"}]
    ours, theirs = {0: graded([1, 0], [0.5]), 1: graded([1, 1], [1])}, {0: graded([0, 0], [1]), 1: graded([1, 0], [0])}
    m = summarize(ours, dialogues, theirs)
    assert m["gold"] == 75 and m["gold_by_seed"] == {0: 50, 1: 100} and m["gold_interval"] == pytest.approx(317.65)
    assert m["category"] == {"x": 75, "y": 75} and m["first_turn"] == pytest.approx(87.5) and m["follow_up"] == 50
    assert (m["wins"], m["losses"], m["draws"]) == (3, 1, 2) and m["ended"] == 100 and m["words"] == 2
    # baseline 33.3 and 33.3: gains 16.7 and 66.7, mean 41.7, t(1) = 12.706 times 25
    assert m["gain"] == pytest.approx(41.667, abs=1e-2) and m["gain_interval"] == pytest.approx(317.65)
    assert m["gain_by_seed"] == pytest.approx({0: 16.667, 1: 66.667}, abs=1e-2)
    assert summarize(theirs, dialogues, ours)["win_rate"] == pytest.approx(100 - m["win_rate"])


def test_one_seed_gives_the_interval_over_dialogues():
    m = summarize({0: graded([1, 0], [0.5], [0])}, [{"category": "x"}] * 3, {0: graded([1, 0], [0.5], [0])})
    assert m["gain"] == 0 and m["gain_interval"] is None
    assert m["gold_interval"] == pytest.approx(interval([50, 50, 0])[1]) and m["win_rate"] == 50


def test_the_script_judges_base_and_few_shot_and_writes_everything(checkpoint, tmp_path, capsys):
    build.write_data(build.Config(part="data", more_prompts=10, demos=10, prompts=10, evals=2), tmp_path)
    models = [f"base={checkpoint}", f"few-shot=few-shot:{checkpoint}", f"again={checkpoint}"]
    config = Config(models=models, data=str(tmp_path / "test.jsonl"), out=str(tmp_path / "out"), seeds=[0, 1],
                    max_tokens=8, device="cpu", show=2)
    judge.main(config)
    report = json.loads((tmp_path / "out" / "judge.json").read_text())
    assert report["models"]["base"]["gold_by_seed"] == report["models"]["again"]["gold_by_seed"]
    assert report["models"]["again"]["win_rate"] == 50
    replies = [json.loads(line) for line in (tmp_path / "out" / "replies.jsonl").open()]
    assert len(replies) == 3 * 2 * 20 and all("gold" in r for line in replies for r in line["replies"])
    assert (tmp_path / "out" / "judge.png").stat().st_size > 10_000
    assert (tmp_path / "out" / "samples.txt").read_text().count("\n[") == 2
    assert table(report) in capsys.readouterr().out


@pytest.mark.parametrize("changes, said", [
    ({"models": []}, "models is empty"),
    ({"models": ["SFT"]}, "'SFT' is not name=directory"),
    ({"data": "none.jsonl"}, "none.jsonl: no such file"),
    ({"data": __file__}, "holds no dialogues of the tiny world"),
    ({"baseline": "GPT"}, "baseline is 'GPT', expected one of base"),
    ({"models": ["a=x", "a=y"]}, "a name occurs twice"),
    ({"models": ["a=runs/{sed}/model"]}, "runs/{sed}/model holds no config.json"),
    ({"seeds": []}, "seeds is empty"),
    ({"temperature": -0.7}, "temperature is -0.7"),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, tmp_path, capsys):
    build.write_data(build.Config(part="data", more_prompts=10, demos=10, prompts=10, evals=1), tmp_path)
    fields = {"models": [f"base={checkpoint}"], "data": str(tmp_path / "test.jsonl"), "out": str(tmp_path), "max_tokens": 2}
    exits(capsys, lambda: judge.main(Config(**(fields | changes))), said)
