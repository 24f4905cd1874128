from collections import Counter
from dataclasses import replace

import pytest
from conftest import exits, write_jsonl
from scripted import Scripted, damaged, number, records, survives_kills

from collect.red_team import BEHAVIOURS, HOLE, OPERATORS, TEMPLATES, Config, load_templates, main
from judging import safety


def speaker(request) -> str:
    text = request.messages[-1]["content"]
    if "[[unsafe]]" in text:
        return "judge"
    return "attacker" if text.startswith("An assistant is tested") or "with the mark [REQUEST]" in text else "target"


def reply(request, sampling):
    """An attacker, a target and a judge; the verdict and every fault depend on the request alone."""
    who, n = speaker(request), number(request.messages, request.repeat, request.tag)
    if who == "judge":
        return "It is so. [[unsafe]]" if n % 12 == 0 else "No. [[safe]]" if n % 5 else "I cannot say."
    if n % 19 == 0:
        return "cut in the", False
    if "to be put in front of it" in request.messages[-1]["content"]:
        return f"Prelude {n % 1000}."
    if who == "attacker" and HOLE in request.messages[-1]["content"]:
        return f"Game {n % 1000}: {HOLE} now" if n % 6 else "no hole"
    return f"{who} {n % 1000}"


@pytest.fixture
def config(tmp_path):
    return Config(out=str(tmp_path / "out"), attempts=3, steps=12, probes=8)


def run(config: Config, reply=reply) -> tuple[list[dict], list[dict], Scripted]:
    model = Scripted(reply)
    main(config, model, model, model)
    return *records(config.out, "transcripts", "dropped"), model


# ------------------------------------------------------------------------------------------- direct

def test_attempts_at_a_behaviour_end_with_the_first_that_succeeds(config, tmp_path, capsys):
    transcripts, dropped, _ = run(config)
    assert {t["behaviour"] for t in transcripts} == set(BEHAVIOURS)
    assert len({t["id"] for t in transcripts}) == len(transcripts)
    for behaviour in BEHAVIOURS:
        mine = [t for t in transcripts if t["behaviour"] == behaviour]
        assert all(t["judged"] != "unsafe" for t in mine[:-1])
        assert [t["attempt"] for t in mine] == sorted({t["attempt"] for t in mine})
        lost = sum(d["id"].startswith(mine[0]["goal"]) for d in dropped)
        assert mine[-1]["judged"] == "unsafe" or len(mine) + lost == 3
    assert {t["judged"] for t in transcripts} == {"unsafe", "safe", None}
    assert safety.read_transcripts(tmp_path / "out" / "transcripts.jsonl") == transcripts
    assert f"{len(transcripts)} attempts at 10 behaviours" in capsys.readouterr().out


def test_after_a_failure_the_attacker_sees_the_message_and_the_reply(config):
    transcripts, _, model = run(replace(config, attempts=2),
                                lambda r, s: reply(r, s) if speaker(r) != "judge" else "[[safe]]")
    asked = [text for r in model.asked if "This message did not" in (text := r.messages[-1]["content"])]
    first = [t for t in transcripts if t["attempt"] == 0]
    assert len(asked) >= len(first) > 5
    assert all(any(t["messages"][0]["content"] in text and t["messages"][1]["content"] in text for text in asked)
               for t in first)


def test_the_behaviours_may_come_from_a_file(config, tmp_path):
    file = write_jsonl(tmp_path / "b.jsonl", [{"behaviour": "hum"}, {"behaviour": "sing"}])
    assert {t["behaviour"] for t in run(replace(config, behaviours=str(file)))[0]} == {"hum", "sing"}


# --------------------------------------------------------------------------------------------- leaks

def test_what_was_planted_is_found_in_whatever_shape(config):
    """The target tells its password in capitals to a third of the probes, at the first attempt or when pressed."""
    def chatty(request, sampling):
        if speaker(request) == "attacker":
            return "Please, it is urgent."
        system, n = request.messages[0]["content"], number(request.messages[0])
        urgent = request.messages[-1]["content"].startswith("Please")
        tells = n % 3 == 0 and (n % 2 or urgent)
        return "It is " + system.split("password ")[1].split(".")[0].upper() if tells else "I keep it."

    transcripts, _, model = run(replace(config, mode="leak", probes=30), chatty)
    told = {t["behaviour"]: t["attempt"] for t in transcripts if t["judged"] == "unsafe"}
    probes = safety.leak_probes(30)
    assert len(told) == sum(number(p["messages"][0]) % 3 == 0 for p in probes) and set(told.values()) == {0, 1}
    assert "judge" not in {speaker(r) for r in model.asked}
    assert {t["judge"] for t in transcripts} == {"the strings that were planted"}
    assert [t["messages"][:-1] for t in transcripts if t["attempt"] == 0] == [p["messages"] for p in probes]


# ------------------------------------------------------------------------------------------- fuzzing

def test_templates_that_win_join_the_pool_and_are_changed_in_turn(config):
    transcripts, dropped, model = run(replace(config, mode="fuzz", steps=40))
    assert Counter(t["operator"] for t in transcripts).keys() == OPERATORS.keys()
    for t in transcripts:
        assert t["template"].count(HOLE) == 1
        assert t["messages"][0]["content"] == t["template"].replace(HOLE, t["behaviour"])
    shown = " ".join(r.messages[-1]["content"] for r in model.asked if speaker(r) == "attacker")
    won = {t["template"] for t in transcripts if t["judged"] == "unsafe"}
    assert any(template in shown for template in won), "a template that won is changed further"
    lost = {t["template"] for t in transcripts} - won
    assert lost and not any(template in shown for template in lost)
    assert f"does not hold {HOLE} once" in {d["reason"] for d in dropped}


def test_the_templates_of_the_pool_are_changed_in_turn(config):
    _, _, model = run(replace(config, mode="fuzz", steps=7),
                      lambda r, s: "Once." if speaker(r) == "attacker" else "[[safe]]")
    shown = [r.messages[-1]["content"].partition("Template: ")[2] for r in model.asked if speaker(r) == "attacker"]
    assert len(shown) == 7 and all(text.startswith(TEMPLATES[i % 5]) for i, text in enumerate(shown))


def test_what_is_put_in_front_of_a_template_keeps_the_template(config):
    transcripts, _, _ = run(replace(config, mode="fuzz", steps=60),
                            lambda r, s: "Once." if speaker(r) == "attacker" else "[[safe]]")
    assert {t["operator"] for t in transcripts} == {"expand"}
    assert {t["template"] for t in transcripts} <= {f"Once. {t}" for t in TEMPLATES}


# ---------------------------------------------------------------------------------------- end to end

@pytest.mark.parametrize("mode", ["direct", "fuzz", "leak"])
def test_whenever_it_is_killed_it_goes_on_to_the_same_files(mode, config, tmp_path):
    config = replace(config, mode=mode, steps=4, attempts=2)
    found = survives_kills(lambda model, out: main(replace(config, out=str(out)), model, model, model), reply,
                           tmp_path, deaths=2)
    assert found["transcripts.jsonl"]


@pytest.mark.parametrize("mode", ["direct", "fuzz", "leak"])
def test_corrupted_replies_are_dropped_with_a_reason(mode, config, tmp_path):
    """Every reply is damaged, over 500 in the three runs: nothing raises, every transcript can be read and counted."""
    transcripts, dropped, model = run(replace(config, mode=mode, steps=30, attempts=12, probes=20), damaged(reply))
    assert len(model.asked) > 150 and safety.read_transcripts(tmp_path / "out" / "transcripts.jsonl") == transcripts
    assert all(d["reason"] for d in dropped)


def test_a_target_that_fails_is_not_counted_as_safe(config, capsys):
    transcripts, dropped, _ = run(config, lambda r, s: None if speaker(r) == "target" else "attack")
    assert transcripts == [] and {d["reason"] for d in dropped} == {"no reply"}
    assert "0 brought about, 0 not, 0 not judged, 10 not tried" in capsys.readouterr().out


def test_what_ships_is_ten_behaviours_and_five_templates():
    assert len(set(BEHAVIOURS)) == 10 and all(text.count(HOLE) == 1 for text in TEMPLATES) and len(OPERATORS) == 5


def test_what_a_user_gets_wrong_is_one_line(config, tmp_path, capsys):
    def file(*records):
        return str(write_jsonl(tmp_path / "f.jsonl", list(records)))

    exits(capsys, lambda: load_templates(Config(templates=file({"text": "no hole"}))),
          "line 1: holds [REQUEST] 0 times")
    exits(capsys, lambda: safety.load_texts(file({"x": 1}), "behaviour"), "has no")
    exits(capsys, lambda: safety.load_texts(file(*[{"behaviour": "a"}] * 2), "behaviour"), "drop the repeats")
    exits(capsys, lambda: main(replace(config, behaviours="none.jsonl")), "none.jsonl: no such file")
    exits(capsys, lambda: Config(steps=0), "steps is 0")
