"""judging/people.py: people's votes, whatever side each of them saw; from the rating page to the report."""
import json
import random

import pytest
from conftest import write_jsonl
from scripted import Scripted
from test_annotate import SHARED, rate, serving
from test_judging import answers_of, judged

import judge
from collect.annotate import load_shared
from collect.raters import collect_labels, rater_table
from judge import Config
from judging import people, tables, trial
from judging.recorded import read


def vote(prompt, rater, left, right, rating, **more):
    return {"prompt": prompt, "turn": 1, "a": left, "b": right, "rating": rating, "annotator": rater, **more}


def votes_of(tmp_path, records):
    return read(write_jsonl(tmp_path / "votes.jsonl", records))


def report_of(tmp_path, records, **settings):
    """The sections of judge.py on these votes, by title."""
    write_jsonl(tmp_path / "votes.jsonl", records)
    judge.main(Config(judges=[f"people=recorded:{tmp_path / 'votes.jsonl'}"], data="none", out=str(tmp_path / "out"),
                      show=0, device="cpu", threads=1, **settings))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    return {section["title"]: section for section in report["sections"]}


def line(section, name) -> dict:
    (row,) = [row for row in section["rows"] if row[0] == name]
    return dict(zip(section["columns"], row, strict=True))


def mirrored(record):
    return record | {"a": record["b"], "b": record["a"], "rating": record["rating"] and 9 - record["rating"]}


def test_a_majority_counts_whatever_side_each_rater_saw(tmp_path):
    """Twenty prompts, two of three for m1, one of them with m1 on the right: 20 wins of 20, where votes grouped by side
    give 20 ties. Ratings for m1: 2, 2 and 7: mean 11 / 3."""
    records = [v for i in range(20) for v in (vote(f"p{i}", "r1", "m1", "m2", 2), vote(f"p{i}", "r2", "m2", "m1", 7),
                                              vote(f"p{i}", "r3", "m2", "m1", 2))]
    games = tables.majority(votes_of(tmp_path, records).games, "people")
    assert len(games) == 20 and {g["preference"] for g in games} == {1} and {g["a"] for g in games} == {"m1"}
    assert all(g["rating"] == pytest.approx(11 / 3) for g in games) and {g["a_first"] for g in games} == {None}
    found = report_of(tmp_path, records)
    wins = line(found["people: wins against m2"], "m1")
    assert wins["win rate, %"]["value"] == 100 and (wins["wins"], wins["draws"], wins["n"]) == (20, 0, 20)
    assert all("same in both orders" not in row[0] for row in found["The judges on trial"]["rows"])
    mine = line(found["people: votes"], "m1 against m2")
    assert (mine["items"], mine["votes"], mine["for the first"], mine["for the second"]) == (20, 60, 40, 20)
    assert mine["of all votes, %"] == pytest.approx(200 / 3) and mine["mean rating"]["value"] == pytest.approx(11 / 3)


def test_ties_and_abstentions_are_stated_and_no_failure_to_read(tmp_path):
    """Items: 2:1 for m1; 1:1 and one who cannot tell: no majority; all abstain: in no mean. Eleven more for m2."""
    skip, bad = {"flag": "skip"}, {"flag": "bad"}
    records = [vote("p0", "r1", "m1", "m2", 1), vote("p0", "r2", "m2", "m1", 8), vote("p0", "r3", "m1", "m2", 8),
               vote("p1", "r1", "m1", "m2", 1), vote("p1", "r2", "m2", "m1", 1),
               vote("p1", "r3", "m1", "m2", None, **skip),
               *(vote("p2", r, "m1", "m2", None, **bad) for r in ("r1", "r2", "r3")),
               *(vote(f"p{i}", r, "m1", "m2", 8) for i in range(3, 14) for r in ("r1", "r2"))]
    found = report_of(tmp_path, records)
    mine = line(found["people: votes"], "m1 against m2")
    counted = [mine[key] for key in ("items", "votes", "for the first", "ties", "for the second", "abstained",
                                     "tied items")]
    assert counted == [14, 27, 3, 0, 24, 4, 1]
    wins = found["people: wins against m2"]
    assert line(wins, "m1")["win rate, %"]["value"] == pytest.approx(100 * 1.5 / 13)
    assert line(wins, "m1")["unread"] == 0 and "1 more are abstentions" in wins["text"]


def test_swapping_all_sides_changes_nothing_and_swapping_all_names_swaps_everything(tmp_path):
    for seed in range(3):
        rng = random.Random(seed)
        records = []
        for i in range(30):
            for rater in ("r1", "r2", "r3"):
                record = vote(f"p{i}", rater, "m1", "m2", rng.choice([1, 2, 4, 5, 7, None]))
                records.append(mirrored(record) if rng.random() < 0.5 else record)
        found = report_of(tmp_path, records)
        again = report_of(tmp_path, [mirrored(r) for r in records])
        of_sides = ("people: position", "people: raters")
        assert {t: s for t, s in found.items() if t not in of_sides} == {
            t: s for t, s in again.items() if t not in of_sides}
        names = {"m1": "m2", "m2": "m1"}
        swapped = report_of(tmp_path, [r | {"a": names[r["a"]], "b": names[r["b"]]} for r in records])
        one, other = (line(x["people: wins against m2"], "m1")["win rate, %"] for x in (found, swapped))
        assert one["value"] == pytest.approx(100 - other["value"])
        one, other = (line(x["people: votes"], "m1 against m2")["mean rating"]["value"] for x in (found, swapped))
        assert one == pytest.approx(9 - other)
        for ties in ("no ties", "ties allowed"):
            elo = [line(x[f"people: Elo, {ties}"], m)["Elo"]["value"] for x, m in ((found, "m1"), (swapped, "m2"))]
            assert elo[0] == pytest.approx(elo[1], abs=3)  # the random orders differ


def test_elo_is_from_all_ratings_not_from_the_first_rater(tmp_path):
    """r1 always prefers m1 and two others m2: of all ratings m2 is ahead; of r1's alone it would be m1."""
    records = [v for i in range(40) for v in (vote(f"p{i}", "r1", "m1", "m2", 3), vote(f"p{i}", "r2", "m2", "m1", 3),
                                              vote(f"p{i}", "r3", "m1", "m2", 6))]
    for scale in ("rating", "choice"):
        if scale == "choice":  # 1 to 8 as a choice and a margin: 3 is a by 2, 6 is b by 2
            records = [{k: v for k, v in r.items() if k != "rating"}
                       | {"choice": "a" if r["rating"] < 5 else "b", "margin": 2} for r in records]
        board = report_of(tmp_path, records)["people: Elo, no ties"]
        assert board["rows"][0][0] == "m2" and line(board, "m2")["ratings"] == 120 and "120 ratings" in board["text"]


def test_the_two_tables_of_one_set_of_ratings():
    """x slightly better (4) on every prompt: without ties it wins them all, with ties nobody does."""
    def tables_of(*rated):
        return people.elo_tables({"judge": "j", "prompt": i, "a": a, "b": b, "a_first": True, "rating": rating,
                                  "preference": float(rating < 5)} for a, b, rating in rated for i in range(30))[0]

    said = tables_of(("x", "y", 4), ("y", "x", 5))
    assert [(line["rating"], line["rank"]) for line in said["ties allowed"].values()] == [(1000, 1), (1000, 1)]
    first, second = said["no ties"].values()
    assert (first["model"], first["rank"], second["rank"]) == ("x", 1, 2) and first["rating"] > 1150
    # Mirrored ratings mirror the table.
    mirrored = list(tables_of(("x", "y", 5), ("y", "x", 4))["no ties"].values())
    assert [line["model"] for line in mirrored] == ["y", "x"]
    assert mirrored[0]["rating"] == pytest.approx(first["rating"])


def test_no_ratings_are_no_elo_and_no_crash(tmp_path):
    records = [vote("p", r, "m1", "m2", None) for r in ("r1", "r2")]
    found = report_of(tmp_path, records)
    assert line(found["people: votes"], "m1 against m2")["abstained"] == 2
    sections = people.likert_sections("people", votes_of(tmp_path, records).games)
    assert [s["title"] for s in sections] == ["people: Elo"] and "no ratings" in sections[0]["text"]
    apart = [vote("p", "r1", "m1", "m2", 1), vote("p", "r1", "m3", "m4", 1)]
    assert "no chain of games" in people.likert_sections("people", votes_of(tmp_path, apart).games)[0]["text"]


def test_what_is_left_out_of_a_file_stands_in_the_report(tmp_path):
    """Of two votes without a name on one pair nobody knows whether they are two people's: the second is left out."""
    records = [vote(f"p{i}", "r1", "m1", "m2", 1) for i in range(3)]
    found = report_of(tmp_path, [{k: v for k, v in r.items() if k != "annotator"} for r in records + records])
    assert "judges again" in found["people: 3 records left out"]["text"]
    assert line(found["people: wins against m2"], "m1")["n"] == 3


def test_one_judge_in_both_orders_is_no_group_of_people():
    """Both orders of one judge stay two games, to be merged by the rule that a win needs both."""
    rows = [{"judge": "j", "prompt": 1, "a": "x", "b": "y", "a_first": first, "preference": p, "rating": r}
            for first, p, r in ((True, 1.0, 2), (False, 0.0, 3))]
    games = tables.majority(rows, "j")
    assert sorted(map(json.dumps, games)) == sorted(map(json.dumps, rows))
    # x shown first gets 2; shown second the rating 3 is y's, so 6 of x's: mean 4
    (merged,) = tables.merge_orders(games)[0]
    assert (merged["preference"], merged["rating"]) == (0.5, 4) and tables.turned(merged)["rating"] == 5


def test_the_slot_of_an_item_that_one_person_rated_is_not_the_majoritys(tmp_path):
    """Ten items of two raters and two of one, who took the left: people's majority has no order to be biased by."""
    records = [vote(f"p{i}", rater, "m1", "m2", 2) for i in range(10) for rater in ("r1", "r2")]
    found = report_of(tmp_path, records + [vote(f"q{i}", "r1", "m2", "m1", 2) for i in range(2)])
    assert [row[0] for row in found["The judges on trial"]["rows"]] == ["not to be read, %"]
    assert found["The judges on trial"]["rows"][0][2] == 12
    wins = line(found["people: wins against m2"], "m1")
    assert (wins["wins"], wins["losses"], wins["n"]) == (10, 2, 12)
    assert line(found["people: position"], "as recorded")["decided"] == 22


def test_what_no_judge_of_several_could_say_is_unread_and_no_abstention():
    rows = [{"judge": name, "prompt": "p", "a": "x", "b": "y", "a_first": True, "preference": None, "why": why}
            for name, why in (("one", "abstained: cannot tell"), ("two", "cut before its end"))]
    (game,) = tables.majority(rows, "judges")
    assert game["preference"] is None and game["why"] == "cut before its end"
    (game,) = tables.majority([rows[0], rows[0] | {"judge": "three"}], "judges")
    assert game["why"].startswith("abstained")


def test_raters_are_held_against_the_others_and_their_side_is_counted(tmp_path):
    """r1 and r2 always prefer m1, whatever side; r3 always takes the left."""
    records = []
    for i in range(40):
        pair = ("m1", "m2") if i % 2 else ("m2", "m1")
        for rater in ("r1", "r2", "r3"):
            rating = 2 if rater == "r3" or pair[0] == "m1" else 7
            records.append(vote(f"p{i}", rater, *pair, rating, seconds=float(i)))
    table = rater_table(collect_labels(people.label_rows(votes_of(tmp_path, records).games)))
    assert table["r3"]["position"]["value"] == 1 and table["r1"]["position"]["value"] == 0.5
    assert table["r3"]["majority"] == 0.5 and table["r1"]["labels"] == 40 and table["r1"]["seconds"] == 19.5
    found = report_of(tmp_path, records)
    assert [row[0] for row in found["people: raters"]["rows"]] == ["r1", "r2", "r3"]
    assert line(found["people: position"], "as recorded")["first slot, %"]["value"] == pytest.approx(200 / 3)


def test_the_leaderboard_has_judges_by_subset_with_ties_and_without(tmp_path):
    """GPT-4 on all; people on all, instruct and code-instruct, where they say the opposite. 4 of 8 is a tie, or not."""
    people_say = [vote(f"p{i}", r, "m1", "m2", 1 if i % 2 else 5, category="code-instruct" if i % 2 else "instruct")
                  for i in range(40) for r in ("r1", "r2")]
    gpt = [vote(f"p{i}", "gpt-4", "m2", "m1", 1) for i in range(40)]
    write_jsonl(tmp_path / "gpt.jsonl", gpt)
    write_jsonl(tmp_path / "votes.jsonl", people_say)
    judge.main(Config(judges=[f"{n}=recorded:{tmp_path / f}" for n, f in (("GPT-4", "gpt.jsonl"),
                                                                        ("people", "votes.jsonl"))],
                      data="none", out=str(tmp_path / "out"), show=0, device="cpu", threads=1))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (board,) = [s for s in report["sections"] if s["title"].startswith("Leaderboard")]
    rows = {(row[0], row[1]): dict(zip(board["columns"], row, strict=True)) for row in board["rows"]}
    assert set(board["columns"]) >= {"GPT-4: all", "people: all", "people: instruct", "people: code-instruct"}
    assert rows["ratings", ""]["people: all"] == 80 and rows["ratings", ""]["people: instruct"] == 40
    assert rows["m2", "no ties"]["GPT-4: all"]["value"] > 1100 > 900 > rows["m1", "no ties"]["GPT-4: all"]["value"]
    assert rows["m2", "no ties"]["people: instruct"]["value"] > 1100  # 5 of 8 is m2, slightly
    assert rows["m2", "ties allowed"]["people: instruct"]["value"] == 1000
    assert rows["m1", "ties allowed"]["people: code-instruct"]["value"] > 1100
    chosen = people.leaderboard_section({"people": read(tmp_path / "votes.jsonl").games}, {"code": {"code-instruct"}})
    assert chosen["columns"][2:] == ["people: all", "people: code"]


def test_thousands_of_voters_need_no_table_of_voters_by_battles():
    rng = random.Random(0)
    rows = [{"judge": f"user {rng.randrange(3000)}", "prompt": i, "a": "x", "b": "y", "a_first": True,
             "preference": float(rng.random() < 0.5)} for i in range(6000)]
    assert people.agreement_section(rows, "people") is people.votes_section(rows, "people") is None
    assert people.label_rows(rows) == []
    shared = [r | {"prompt": i // 3} for i, r in enumerate(rows)]  # three voters each, but a table of 6 million cells
    section = people.agreement_section(shared, "people")
    assert 5900 < section["rows"][0][0] <= 6000 and people.label_rows(shared) == []
    assert people.votes_section(shared, "people")["rows"][0][1] == 2000
    units, prompts = people._table([[1.0, 0.0], [1.0]], [("p",), ("q",)])
    assert units.shape == (2, 1) and prompts == ["p"]


@pytest.mark.parametrize("scale", ["choice", "likert"])
def test_from_the_page_to_the_report_three_people_are_heard(tmp_path, scale):
    """Everybody rates the same four shared pairs, each on sides of their own. Ann and Bob choose the good reply by 3,
    Cy the bad one by 1: the majority is for the good one in all four, the mean rating (2 + 2 + 5) / 3 = 3.
    """
    shared = write_jsonl(tmp_path / "shared.jsonl", SHARED)
    with serving(tmp_path / "votes.jsonl", models=[("scripted", Scripted(lambda *_: "x"))], shared=str(shared),
                 shared_every=1, scale=scale) as server:
        for name in ("Ann", "Bob", "Cy"):
            for _ in SHARED:
                state = server.seen(name)
                if state["item"] is None:  # a dialogue of one's own between two shared pairs
                    server.post("/say", annotator=name, dialogue=state["dialogue"], turn=state["turn"], text="Hello",
                                category="chat")
                    rate(server, None, flag="bad", name=name)
                    state = server.seen(name)
                assert state["item"]["shared"]
                good = [r["text"].startswith("good") for r in state["item"]["replies"]].index(True)
                side = ("left", "right")[good if name != "Cy" else 1 - good]
                rate(server, side, 1 if name == "Cy" else 3, name=name)
    ratings = tmp_path / "votes.ratings.jsonl"
    sides = {(r["annotator"], r["prompt"]): r["a"] for r in map(json.loads, ratings.open()) if "shared" in r["prompt"]}
    assert len(sides) == 12 and len(set(sides.values())) == 2  # not all saw the same side
    judge.main(Config(judges=[f"people=recorded:{ratings}"], data="none", out=str(tmp_path / "out"), show=0,
                      device="cpu", threads=1))
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    found = {section["title"]: section for section in report["sections"]}
    mine = line(found["people: votes"], "reply 1 against reply 2")
    assert (mine["items"], mine["votes"], mine["for the first"], mine["for the second"]) == (4, 12, 8, 4)
    assert mine["majority for the first, %"]["value"] == 100 and mine["mean rating"]["value"] == pytest.approx(3)
    assert [row[0] for row in found["people: raters"]["rows"]] == ["Ann", "Bob", "Cy"]
    assert line(found["people: raters"], "Ann")["with majority"] == 0.5  # Bob and Cy are split: half of a tie


def test_shared_replies_may_say_who_wrote_them(tmp_path):
    """Then the page's votes are votes on models, and three people a board of them."""
    items = [item | {"models": ["old", "new"]} for item in SHARED]
    shared = write_jsonl(tmp_path / "shared.jsonl", items)
    with serving(tmp_path / "votes.jsonl", models=[("s", Scripted(lambda *_: "x"))], shared=str(shared)) as server:
        for name in ("Ann", "Bob"):
            texts = [r["text"] for r in server.seen(name)["item"]["replies"]]
            rate(server, ("left", "right")[texts.index("good 0")], 2, name=name)
    games = read(tmp_path / "votes.ratings.jsonl").games
    assert [(g["a"], g["b"], g["preference"]) for g in tables.majority(games, "people")] == [("new", "old", 0)]
    for wrong in (["old"], ["old", "old"], ["old", 3], "old"):
        with pytest.raises(SystemExit):
            load_shared(str(write_jsonl(tmp_path / "bad.jsonl", [SHARED[0] | {"models": wrong}])))


@pytest.mark.parametrize("form", ["pair", "label", "likert", "margin"])
def test_swapping_the_models_swaps_every_result_of_every_form(form, tmp_path):
    """A judge with a bias to the left and one for length, asked about x against y and about y against x."""
    def verdict(a, b):
        gap = len(a) - len(b) + 3
        side, size = "AB"[gap < 0], min(4, 1 + abs(gap) // 4)
        eight = 5 - size if side == "A" else 4 + size
        return {"pair": f"[[{side}]]", "label": side, "likert": f"[[{eight}]]", "margin": f"[[{side} {size}]]"}[form]

    rng = random.Random(form)
    said = {name: [f"reply {i} " + "w" * rng.randrange(20) for i in range(60)] for name in "xy"}
    found = {}
    for first, second in (("x", "y"), ("y", "x")):
        answers = answers_of(60, x=said[first].__getitem__, y=said[second].__getitem__)
        rows, _ = judged(verdict, answers, tmp_path / first, "y", form=form)
        found[first] = rows
    rates = [tables.win_rates(tables.merge_orders(rows)[0], "y")[0] for rows in found.values()]
    assert rates[0]["win_rate"] == pytest.approx(100 - rates[1]["win_rate"]) and rates[0]["draws"] == rates[1]["draws"]
    firsts = [trial.position(rows)[0]["first_slot_share"] for rows in found.values()]
    assert firsts[0] == firsts[1] > 0.5
    if form in ("likert", "margin"):
        strengths = [sum(r["rating"] for r in people.rated(rows)) for rows in found.values()]
        assert strengths[0] + strengths[1] == 9 * len(people.rated(found["x"]))
        boards = [people.elo_tables(rows)[0] for rows in found.values()]
        for ties in ("no ties", "ties allowed"):
            x, y = (board[ties][m]["rating"] for board, m in zip(boards, "xy", strict=True))
            assert x == pytest.approx(y, abs=5)  # the random orders differ
    # Both orders named the same way round: a's rating by its own words, whoever was shown first.
    for row in found["x"]:
        if row["rating"]:
            assert (row["rating"] <= 4) == (row["preference"] == (1 if row["a_first"] else 0))


def test_a_new_judges_marks_are_held_against_recorded_ones():
    """Four replies: 8 6 4 2 and one more each time: order 1, higher by 1."""
    def marks(judge, scores):
        return [{"judge": judge, "prompt": i, "turn": 1, "model": "m", "score": s} for i, s in enumerate(scores)]

    section = trial.marks_agreement_section({"GPT-4": marks("GPT-4", (8, 6, 4, 2)), "new": marks("new", (9, 7, 5, 3))},
                                            "GPT-4")
    assert section["rows"][0][0] == "new" and section["rows"][0][3:] == [4, 4]
    assert section["rows"][0][1]["value"] == pytest.approx(1) and section["rows"][0][2]["value"] == 1
    assert trial.marks_agreement_section({"GPT-4": marks("GPT-4", (8,)), "new": []}, "GPT-4") is None
