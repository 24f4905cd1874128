"""collect/annotate.py: what is written and when, what the page shows, who may ask; the page in a real browser."""
import asyncio
import contextlib
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from conftest import ROOT, exits, write_jsonl
from scripted import Scripted

from collect.annotate import Config, Server, Votes, agreement, load_shared
from data.formats import read
from data.llm import Checkpoint, open_model
from judging import recorded
from runtime.serving import server as http_server

TINY = ROOT / "runs/tiny/0/sft/model"
MODEL = "scripted=http://127.0.0.1:1/v1#scripted"
SHARED = [{"id": f"s{i}", "prompt": f"Name {i} fruits.", "replies": [f"good {i}", f"bad {i}"], "category": "brainstorm"}
          for i in range(4)]


def talk(request, sampling):
    """Another reply for each sampling, side, turn and item."""
    turn = sum(m["role"] == "user" for m in request.messages)
    return f"Turn {turn}, top_p {sampling.top_p:g}, {request.tag}, {request.repeat}"


@contextlib.contextmanager
def serving(out: Path, reply=talk, models=None, **config):
    """A running page, its Server with .url and .post(path, **body)."""
    config = Config(models=[MODEL], out=str(out), **config)
    server = Server(config, models or [("scripted", Scripted(reply))])
    listener = socket.create_server(("127.0.0.1", 0))
    http = http_server(server.app())
    thread = threading.Thread(target=http.run, args=([listener],))
    thread.start()
    server.url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    headers = {"authorization": f"Bearer {config.token}"} if config.token else {}
    server.client = httpx.Client(base_url=server.url, timeout=30, headers=headers)
    server.post = lambda path, **body: server.client.post(path, json=body)
    server.seen = lambda name="Ann": server.client.get("/state", params={"annotator": name}).json()
    try:
        yield server
    finally:
        http.should_exit = True
        thread.join(10)
        listener.close()
        server.votes.stream.close()
        assert not thread.is_alive()


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def say(server, text="Hello", name="Ann", state=None) -> dict:
    """Send a turn; the state with the two replies."""
    state = state or server.seen(name)
    return server.post("/say", annotator=name, dialogue=state["dialogue"], turn=state["turn"], text=text,
                       category="chat").json()


def rate(server, choice, margin=None, flag=None, name="Ann", item=None) -> dict:
    """Answer what is shown; the state after it."""
    item = item or server.seen(name)["item"]["id"]
    return server.post("/answer", annotator=name, id=item, choice=choice, margin=margin, flag=flag).json()


# ------------------------------------------------------------------------------- what is written

def test_a_choice_becomes_a_preference_that_training_can_read(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server:
        shown = say(server, "Tell me about rain.")
        after = rate(server, "right", 3)
    (vote,) = lines(tmp_path / "votes.jsonl")
    left, right = (r["text"] for r in shown["item"]["replies"])
    assert (vote["chosen"], vote["rejected"], vote["margin"], vote["chosen_slot"]) == (right, left, 3, "right")
    assert vote["prompt"] == [{"role": "user", "content": "Tell me about rain."}] and vote["annotator"] == "Ann"
    assert (vote["id"], vote["turn"], vote["category"]) == ("Ann/1/1", 1, "chat") and vote["seconds"] >= 0
    for side in ("chosen", "rejected"):  # the reply says which sampling made it
        assert f"top_p {vote[f'{side}_by']['top_p']:g}," in vote[side] and vote[f"{side}_by"]["model"] == "scripted"
    assert {vote["chosen_by"]["top_p"], vote["rejected_by"]["top_p"]} == {0.8, 1.0}
    assert after["messages"][-1] == {"role": "assistant", "content": right} and after["turn"] == 2
    records, report = read(tmp_path / "votes.jsonl")
    assert len(list(records)) == 1 and report.format == "preference" and not report.rejects


def test_four_turns_are_one_dialogue_along_the_chosen_replies(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server:
        for turn, side in enumerate(("left", "right", "left", "right"), 1):
            say(server, f"Question {turn}")
            rate(server, side, turn)
    votes = lines(tmp_path / "votes.jsonl")
    assert [v["turn"] for v in votes] == [v["margin"] for v in votes] == [1, 2, 3, 4]
    for earlier, later in zip(votes, votes[1:], strict=False):
        assert later["prompt"][:-2] == earlier["prompt"] and later["prompt"][-2]["content"] == earlier["chosen"]


def test_flags_are_kept_but_are_no_preference(tmp_path):
    """Cannot tell: one of the two goes on. Both bad: the dialogue is over."""
    with serving(tmp_path / "votes.jsonl") as server:
        shown = say(server)
        after = rate(server, None, flag="skip")
        assert after["messages"][-1]["content"] in [r["text"] for r in shown["item"]["replies"]] and after["turn"] == 2
        say(server)
        after = rate(server, None, flag="bad")
        assert (after["dialogue"], after["turn"], after["messages"], after["tokens"]) == (2, 1, [], 0)
        counts = "2 answers: 0 preferences, 0 between replies that were cut, 1 cannot tell, 1 both bad"
        assert str(server.votes) == counts
    assert lines(tmp_path / "votes.jsonl") == []
    ratings = lines(tmp_path / "votes.ratings.jsonl")
    assert [(r["flag"], r["choice"], r["margin"]) for r in ratings] == [("skip", None, None), ("bad", None, None)]
    said = recorded.read(tmp_path / "votes.ratings.jsonl")
    assert said.unparsed == 2 and not said.rejects


@pytest.mark.parametrize("scale", ["choice", "likert"])
def test_ratings_are_read_as_people_s_votes(tmp_path, scale):
    """Left by 4, 1 is a rating of 1, 4; right by 1, 4 one of 5, 8."""
    with serving(tmp_path / "votes.jsonl", scale=scale) as server:
        for side, margin in (("left", 4), ("left", 1), ("right", 1), ("right", 4)):
            say(server)
            rate(server, side, margin)
    assert [v["margin"] for v in lines(tmp_path / "votes.jsonl")] == [4, 1, 1, 4]
    said = recorded.read(tmp_path / "votes.ratings.jsonl")
    assert said.format == "likert" and not said.rejects and said.unparsed == 0
    assert [game["rating"] for game in said.games] == [1, 4, 5, 8]
    assert [game["preference"] for game in said.games] == [1, 1, 0, 0]
    names = {"scripted top_p=0.8 top_k=0", "scripted top_p=1 top_k=40"}
    assert all({game["a"], game["b"]} == names for game in said.games)
    for game, vote in zip(said.games, lines(tmp_path / "votes.jsonl"), strict=True):
        preferred = game["a"] if game["rating"] <= 4 else game["b"]
        assert preferred.startswith(f"scripted top_p={vote['chosen_by']['top_p']:g}")


def test_a_reply_that_was_cut_is_rated_but_not_learnt_from(tmp_path):
    with serving(tmp_path / "votes.jsonl", lambda request, sampling: (talk(request, sampling),
                                                                      sampling.top_p == 1)) as server:
        shown = say(server)
        assert sorted(r["cut"] for r in shown["item"]["replies"]) == [False, True]
        assert rate(server, "left", 2)["turn"] == 2
        assert "1 between replies that were cut" in str(server.votes)
    assert lines(tmp_path / "votes.jsonl") == [] and lines(tmp_path / "votes.ratings.jsonl")[0]["margin"] == 2


# ------------------------------------------------------------------------------ once, and for good

def test_clicks_that_come_eight_times_at_once_count_once(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server, ThreadPoolExecutor(8) as pool:
        start = server.seen()
        (item,) = {state["item"]["id"] for state in pool.map(lambda _: say(server, state=start), range(8))}
        assert len(server.models[0][1].asked) == 2
        states = list(pool.map(lambda margin: rate(server, "left", margin, item=item), [1, 2, 3, 4] * 2))
        done = [s for s in states if "error" not in s]  # one margin, sent twice; the others are told that it is late
        assert {s["turn"] for s in done} == {2} and {s["rated"] for s in done} == {1} and len(done) == 2
        assert {s["error"] for s in states if s not in done} == {"These two have been rated already: your first answer "
                                                                 "counts"}
        assert "error" in rate(server, "right", 4, item=item)  # the back button: an old page
        assert say(server, "again", state=start)["turn"] == 2 and server.seen()["item"] is None
        pool.map(lambda _: server.post("/next", annotator="Ann", dialogue=1), range(8))
    assert len(lines(tmp_path / "votes.jsonl")) == len(lines(tmp_path / "votes.ratings.jsonl")) == 1
    assert [e["event"] for e in lines(tmp_path / "votes.journal.jsonl")] == ["item", "answer", "next"]


def test_wherever_the_journal_breaks_off_the_rest_is_made_from_what_is_whole(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server:
        for side in ("left", "right", "left"):
            say(server)
            rate(server, side, 2)
        say(server, "the fourth turn")
        last = server.seen()
    journal, votes = (tmp_path / "votes.journal.jsonl").read_bytes(), lines(tmp_path / "votes.jsonl")
    rng = random.Random(0)
    for cut in [0, *(rng.randrange(len(journal)) for _ in range(20))]:
        (tmp_path / "votes.journal.jsonl").write_bytes(journal[:cut])
        (tmp_path / "votes.jsonl").write_text("half a l")  # what is made from the journal may be older, or broken
        again = Votes(str(tmp_path / "votes.jsonl"))
        answers = sum(json.loads(line)["event"] == "answer" for line in journal[:cut].split(b"\n")[:-1])
        assert lines(tmp_path / "votes.jsonl") == votes[:answers]
        assert len(lines(tmp_path / "votes.ratings.jsonl")) == answers
        again.stream.close()
    for cut, turn in ((len(journal), 4), (len(journal) - 1, 4)):
        (tmp_path / "votes.journal.jsonl").write_bytes(journal[:cut])
        with serving(tmp_path / "votes.jsonl") as server:
            assert server.seen() == last if cut == len(journal) else server.seen()["item"] is None
            assert say(server)["turn"] == turn and rate(server, "left", 1)["rated"] == 4
            now = lines(tmp_path / "votes.jsonl")
            assert now[:3] == votes and len(now) == 4
        Votes(str(tmp_path / "votes.jsonl")).stream.close()  # from the journal as it is after that
        assert lines(tmp_path / "votes.jsonl") == now


def test_an_answer_is_on_the_disk_before_it_is_confirmed_the_journal_first(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(Path(os.readlink(f"/proc/self/fd/{fd}")).name))
    with serving(tmp_path / "votes.jsonl") as server:
        say(server)
        assert synced == ["votes.journal.jsonl"]
        rate(server, "left", 1)
    assert synced == ["votes.journal.jsonl"] * 2 + ["votes.ratings.jsonl", "votes.jsonl"]


@pytest.fixture
def full_disk(tmp_path):
    """A folder of 64 kB, with a function that fills it up and one that makes room again; where root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small disk takes root")

    def fill():
        with (folder / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(1024))

    yield folder, fill, (folder / "ballast").unlink
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize("near_the_end", [True, False])
def test_on_a_full_disk_an_answer_is_refused_whole_and_never_lands_later(full_disk, near_the_end):
    """The answer that was confirmed is the one that counts, before and after the page is started again. Where only the
    journal still had room, it was the first, and the other files are written as soon as they can be."""
    folder, fill, empty = full_disk
    with serving(folder / "votes.jsonl") as server:
        say(server)
        journal = folder / "votes.journal.jsonl"
        for i in range(200):
            if (journal.stat().st_size % 4096 > 3950) == near_the_end:
                break
            server.post("/next", annotator="Bob", dialogue=i + 1)
        fill()
        item = {"annotator": "Ann", "id": "Ann/1/1", "flag": None}
        answers = [server.post("/answer", **item, choice="left", margin=4),
                   server.post("/answer", **item, choice="right", margin=1)]
        empty()
        answers.append(server.post("/answer", **item, choice="right", margin=2))
        codes = [answer.status_code for answer in answers]
        assert codes == ([507, 507, 200] if near_the_end else [200, 409, 409])
        assert not near_the_end or "does not count" in answers[0].json()["error"]
        say(server, name="Bob")
        rate(server, "left", 3, name="Bob")
        before = (folder / "votes.jsonl").read_bytes()
    with serving(folder / "votes.jsonl") as server:
        assert (folder / "votes.jsonl").read_bytes() == before and len(server.votes.answers) == 2
    confirmed = ("right", 2) if near_the_end else ("left", 4)
    first = lines(folder / "votes.jsonl")[0]
    assert (first["id"], first["chosen_slot"], first["margin"]) == ("Ann/1/1", *confirmed)
    assert len(lines(folder / "votes.jsonl")) == len(lines(folder / "votes.ratings.jsonl")) == 2


def test_a_journal_with_two_answers_to_one_item_is_refused(tmp_path, capsys):
    with serving(tmp_path / "votes.jsonl") as server:
        say(server)
        rate(server, "left", 1)
    journal = tmp_path / "votes.journal.jsonl"
    journal.write_text(journal.read_text() + journal.read_text().splitlines()[-1] + "\n")
    exits(capsys, lambda: Votes(str(tmp_path / "votes.jsonl")), "line 3: answers Ann/1/1 a second time", "drop the")


def test_the_state_does_not_grow_with_the_votes(tmp_path, monkeypatch):
    """Agreement is computed when a shared rating has come, and no list of items or ratings is gone through again."""
    shared, asked = write_jsonl(tmp_path / "shared.jsonl", SHARED), []
    monkeypatch.setattr("collect.annotate.agreement", lambda ratings: asked.append(len(ratings)))
    with serving(tmp_path / "votes.jsonl", shared=str(shared), shared_every=1) as server:
        rate(server, "left", 1)
        sizes = [len(server.client.get("/state", params={"annotator": name}).content) for name in ("Ann", "Bob") * 3]
        assert asked == [1] and max(sizes) - min(sizes) < 200
        monkeypatch.setattr(server.votes, "items", None)
        monkeypatch.setattr(server.votes, "answers", None)
        assert server.seen("Ann")["rated"] == 1 and server.seen("Bob")["rated"] == 0


def test_killed_outright_it_has_lost_nothing_and_goes_on(tmp_path):
    """In a process of its own, with -9, the moment an answer is confirmed."""
    script = tmp_path / "page.py"
    script.write_text(f"""
import socket, sys, uvicorn
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
from test_annotate import *
server = Server(Config(models=[MODEL], out=sys.argv[1]), [("scripted", Scripted(talk))])
listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
uvicorn.Server(uvicorn.Config(server.app(), log_level="critical")).run([listener])
""")
    process = subprocess.Popen([sys.executable, str(script), str(tmp_path / "votes.jsonl")], stdout=subprocess.PIPE,
                               text=True)
    try:
        client = httpx.Client(base_url=f"http://127.0.0.1:{process.stdout.readline().strip()}", timeout=30)
        for turn in (1, 2):
            shown = client.post("/say", json={"annotator": "Ann", "dialogue": 1, "turn": turn, "text": "Hi",
                                              "category": "chat"}).json()
            answer = {"annotator": "Ann", "id": shown["item"]["id"], "choice": "left", "margin": turn, "flag": None}
            assert client.post("/answer", json=answer).json()["turn"] == turn + 1
        shown = client.post("/say", json={"annotator": "Ann", "dialogue": 1, "turn": 3, "text": "And?",
                                          "category": "chat"}).json()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert [v["margin"] for v in lines(tmp_path / "votes.jsonl")] == [1, 2]
    with serving(tmp_path / "votes.jsonl") as server:
        assert server.seen()["item"] == shown["item"] and server.seen()["messages"][-1]["content"] == "And?"
        rate(server, "right", 4)
    assert [v["margin"] for v in lines(tmp_path / "votes.jsonl")] == [1, 2, 4]


def test_other_people_s_files_are_left_alone(tmp_path, capsys):
    (tmp_path / "pairs.jsonl").write_text("precious\n")
    exits(capsys, lambda: Votes(str(tmp_path / "pairs.jsonl")), "pairs.jsonl", "without the", "choose another out=")
    assert (tmp_path / "pairs.jsonl").read_text() == "precious\n" and not (tmp_path / "pairs.journal.jsonl").exists()
    first = Votes(str(tmp_path / "votes.jsonl"))
    exits(capsys, lambda: Votes(str(tmp_path / "votes.jsonl")), "another process is writing here")
    first.stream.close()
    write_jsonl(tmp_path / "votes.journal.jsonl", [{"event": "next", "annotator": "Ann"},
                                                   {"event": "answer", "id": "Ann/9/9"}])
    exits(capsys, lambda: Votes(str(tmp_path / "votes.jsonl")), "votes.journal.jsonl line 2", "damaged")


# ---------------------------------------------------------------------------------- several people

def test_two_people_at_once_do_not_mix_and_do_not_wait_for_each_other(tmp_path):
    """Each waits in the model until the other has come: one after the other they would wait for ever."""
    meeting = threading.Barrier(4)  # two replies each

    def reply(request, sampling):
        meeting.wait(10)
        return talk(request, sampling)

    with serving(tmp_path / "votes.jsonl", reply) as server, ThreadPoolExecutor(2) as pool:
        for turn in (1, 2, 3):
            shown = list(pool.map(lambda name: say(server, f"{name} asks", name), ("Ann", "Bob")))  # noqa: B023
            assert [s["messages"][-1]["content"] for s in shown] == ["Ann asks", "Bob asks"]
            list(pool.map(lambda name: rate(server, "left", turn, name=name), ("Ann", "Bob")))  # noqa: B023
    votes = lines(tmp_path / "votes.jsonl")
    for name in ("Ann", "Bob"):
        mine = [v for v in votes if v["annotator"] == name]
        assert [v["margin"] for v in mine] == [1, 2, 3]
        assert all(m["content"].startswith(name) or f"{name}/1/" in m["content"] for v in mine for m in v["prompt"])
    assert recorded.read(tmp_path / "votes.ratings.jsonl").rejects == []


def test_nobody_answers_for_another(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server:
        item = say(server)["item"]["id"]
        stolen = server.post("/answer", annotator="Bob", id=item, choice="left", margin=1, flag=None)
        assert stolen.status_code == 404 and server.seen()["item"]["id"] == item


def vote(rater, unit, rating, flag=None, swapped=False) -> dict:
    return {"prompt": unit, "a": "two" if swapped else "one", "b": "one" if swapped else "two", "annotator": rater,
            "flag": flag,
            "rating": 9 - rating if swapped and rating else rating}


def test_agreement_by_hand():
    """Ann says 1, 1, 2, 2 and Bob 1, 2, 2, 2: 3 of 4 alike; by chance .5 * .25 + .5 * .75 = .5, kappa (.75 - .5) / .5 =
    .5.

    Alpha: coincidences 1-1 2, 2-2 4, 1-2 and 2-1 1 each; n 3 and 5 of 8; D_o = 2/8, D_e = 2 * 15 / (8 * 7), alpha = 1 -
    .4667 = .5333.
    """
    votes = [vote(name, f"u{i}", x, swapped=name == "Bob" and i % 2)
             for name, row in (("Ann", (2, 1, 6, 8)), ("Bob", (4, 5, 6, 7)))
             for i, x in enumerate(row)]
    votes += [vote("Ann", "alone", 3), vote("Bob", "bad", None, "bad"), vote("Ann", "bad", 1)]
    found = agreement(votes)
    assert (found["raters"], found["units"], found["n"], found["raw"]) == (2, 4, 4, 0.75)
    assert found["kappa"] == pytest.approx(0.5) and found["alpha"] == pytest.approx(0.5333, abs=1e-4)
    assert agreement(votes[:4]) is None and agreement([]) is None
    three = agreement([*votes, *(vote("Cleo", f"u{i}", 1) for i in range(2))])
    assert three["raters"] == 3 and three["n"] == 8 and three["kappa"] is None
    assert agreement([vote(name, "u", 1) for name in "ab"])["kappa"] is None  # undefined, not 0 or 1


def test_to_say_that_one_cannot_tell_is_an_answer_too():
    """Alike where both cannot tell, not alike where one can: 1 and 1 of 3; of those where both chose 1 of 1."""
    votes = [vote(name, f"u{i}", x, None if x else "skip") for name, row in (("Ann", (2, None, None)),
                                                                             ("Bob", (1, None, 8)))
             for i, x in enumerate(row)]
    found = agreement(votes)
    assert (found["n"], found["raw"], found["n_decided"], found["decided"]) == (3, pytest.approx(2 / 3), 1, 1)


def test_shared_items_show_agreement_while_collecting(tmp_path):
    """As in the test by hand, on whichever side the replies stand for each of the two."""
    shared = write_jsonl(tmp_path / "shared.jsonl", SHARED)
    orders = set()
    with serving(tmp_path / "votes.jsonl", shared=str(shared), shared_every=1) as server:
        for name, wanted in (("Ann", (0, 0, 1, 1)), ("Bob", (0, 1, 1, 1))):
            for i, reply in enumerate(wanted):
                item = server.seen(name)["item"]
                assert item["shared"] and item["id"] == f"{name}/shared/s{i}"
                texts = [r["text"] for r in item["replies"]]
                assert sorted(texts) == sorted(SHARED[i]["replies"])
                orders.add((i, texts[0] == SHARED[i]["replies"][0]))
                state = rate(server, ("left", "right")[texts.index(SHARED[i]["replies"][reply])], 2, name=name)
                # then one of their own
                assert state["item"] is None and state["turn"] == 1 and state["dialogue"] == 1 + i
                say(server, name=name)
                rate(server, None, flag="bad", name=name)
        assert server.seen()["item"] is None  # all rated
        found = server.seen()["agreement"]
        assert (found["raters"], found["n"], found["raw"], found["kappa"]) == (2, 4, 0.75, pytest.approx(0.5))
    # one item not in the same order for both
    assert {order for _, order in orders} == {True, False} and len(orders) > 4
    assert lines(tmp_path / "votes.jsonl") == [] and len(lines(tmp_path / "votes.shared.jsonl")) == 8
    assert agreement(row for row in lines(tmp_path / "votes.ratings.jsonl") if "shared" in row["id"]) == found


@pytest.mark.parametrize("bad, said", [
    ({"prompt": "x", "replies": ["a"]}, "not two texts"), ({"prompt": "x", "replies": ["a", "a"]}, "the same"),
    ({"prompt": "x"}, "not two texts"), ({"id": "s0", "prompt": "x", "replies": ["a", "b"]}, "twice")])
def test_a_bad_shared_item_is_named(tmp_path, capsys, bad, said):
    exits(capsys, lambda: load_shared(str(write_jsonl(tmp_path / "shared.jsonl", [SHARED[0], bad]))), "record 2", said)


# ------------------------------------------------------------------------------------- the replies

def test_sides_samplings_and_models_are_dealt_by_lot(tmp_path):
    """300 items: every count lies within four standard deviations, 4 * sqrt(300 / 4) = 35 of 150."""
    models = [("old", Scripted(talk)), ("new", Scripted(talk))]
    with serving(tmp_path / "votes.jsonl", models=models) as server:
        pairs = [asyncio.run(server.two_replies([{"role": "user", "content": "?"}], f"Ann/{i}/1", 50))
                 for i in range(300)]
    assert all({a["model"], b["model"]} == {"old", "new"} and {a["top_p"], b["top_p"]} == {0.8, 1.0} for a, b in pairs)
    for count in (sum(a["model"] == "old" for a, _ in pairs), sum(a["top_p"] == 1 for a, _ in pairs),
                  sum((a["model"] == "old") == (a["top_p"] == 1) for a, _ in pairs)):
        assert abs(count - 150) < 35


def test_the_page_is_never_told_whose_a_reply_is(tmp_path):
    with serving(tmp_path / "votes.jsonl", lambda request, sampling: f"words {sampling.top_p == 1}") as server:
        said = json.dumps([say(server), server.seen(), rate(server, "left", 1)])
        assert all(word not in said for word in ("scripted", "top_p", "top_k", "temperature", "0.8"))


def test_replies_that_are_the_same_are_drawn_again_and_then_cannot_be_chosen(tmp_path):
    def reply(request, sampling):
        return "other" if request.tag == "Ann/2/1" and request.repeat == 5 else "same"

    with serving(tmp_path / "votes.jsonl", reply) as server:
        shown = say(server)
        assert shown["item"]["same"] and len(server.models[0][1].asked) == 2 + 3
        refused = server.post("/answer", annotator="Ann", id=shown["item"]["id"], choice="left", margin=1, flag=None)
        assert refused.status_code == 400 and "same" in refused.json()["error"]
        rate(server, None, flag="bad")
        shown = say(server)
        assert not shown["item"]["same"] and sorted(r["text"] for r in shown["item"]["replies"]) == ["other", "same"]


def test_a_dialogue_ends_with_its_tokens(tmp_path):
    """Budget 100; a reply to 30 letters may take 100 - 10 = 90 tokens, one to 30 more after 50 tokens 40; at 90 only 10
    are left: over.
    """
    model = Scripted(lambda request, sampling: talk(request, sampling))
    rooms = []

    class Counting:
        name = "counting"

        def replies(self, requests, sampling):
            rooms.append(sampling.max_tokens)
            users = sum(m["role"] == "user" for m in requests[0].messages)
            for i, reply in model.replies(requests, sampling):
                yield i, reply._replace(prompt_tokens=40 * users, completion_tokens=10)

    with serving(tmp_path / "votes.jsonl", models=[("counting", Counting())], tokens=100) as server:
        say(server, "x" * 30)
        assert rate(server, "left", 1)["tokens"] == 50
        refused = server.post("/say", annotator="Ann", dialogue=1, turn=2, text="x" * 120, category="chat")
        assert refused.status_code == 400 and "no room" in refused.json()["error"]
        say(server, "x" * 30)
        after = rate(server, "left", 1)
        assert rooms == [90, 90, 40, 40] and (after["dialogue"], after["tokens"], after["budget"]) == (2, 0, 100)


def test_a_checkpoint_s_positions_bound_the_dialogue(tmp_path, checkpoint):
    server = Server(Config(models=[f"mine={checkpoint}"], out=str(tmp_path / "votes.jsonl"), device="cpu"))
    assert server.tokens == 256 and [name for name, _ in server.models] == ["mine"]
    left, right = asyncio.run(server.two_replies([{"role": "user", "content": "Hello"}], "Ann/1/1", 20))
    assert left["text"] != right["text"] and left["model"] == right["model"] == "mine"
    assert left["identity"] == server.models[0][1].name
    server.votes.stream.close()


@pytest.mark.parametrize("fault", ["text", "exit"])
def test_a_model_that_fails_is_reported_and_nothing_is_written(tmp_path, fault, capsys):
    down = [True]

    def reply(request, sampling):
        if down[0] and fault == "exit":
            raise SystemExit(2)
        return None if down[0] else talk(request, sampling)

    with serving(tmp_path / "votes.jsonl", reply) as server:
        failed = server.post("/say", annotator="Ann", dialogue=1, turn=1, text="Hello", category="chat")
        assert failed.status_code == 502 and "No reply came" in failed.json()["error"]
        assert (tmp_path / "votes.journal.jsonl").read_text() == ""
        down[0] = False
        assert say(server)["item"]


def test_what_no_record_may_hold_does_not_come_in(tmp_path):
    with serving(tmp_path / "votes.jsonl", lambda request, sampling: f"a\0b\ud800{sampling.top_p}") as server:
        for text in ("", "  ", None, "a\0b", 7):
            assert server.post("/say", annotator="Ann", dialogue=1, turn=1, text=text,
                               category="chat").status_code == 400
        half = b'{"annotator": "Ann", "dialogue": 1, "turn": 1, "text": "\\ud800", "category": "chat"}'
        headers = {"content-type": "application/json"}
        assert server.client.post("/say", content=half, headers=headers).status_code == 400
        say(server)
        for answer in ({"choice": "left", "margin": 5}, {"choice": "left", "margin": True},
                       {"choice": "up", "margin": 1},
                       {"choice": "left"}, {"flag": "love"}, {"choice": "left", "margin": 1, "flag": "bad"}, {},
                       {"margin": 2},
                       {"choice": [], "margin": 2}):
            assert server.post("/answer", annotator="Ann", id="Ann/1/1", **answer).status_code == 400, answer
        rate(server, "left", 1)
    records, report = read(tmp_path / "votes.jsonl")
    assert [r["chosen"][:3] for r in records] == ["ab?"] and not report.rejects


def test_openings_are_dealt_once_each_to_those_who_rate(tmp_path):
    """A name that somebody types into the address takes none, nor does one that has only asked."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": f"Opening {i}", "category": "rewrite"}
                                                       for i in range(4)])
    openings = [f"Opening {i}" for i in range(4)]
    with serving(tmp_path / "votes.jsonl", prompts=str(prompts)) as server:
        for i in range(40):
            shown = server.seen(f"Nobody {i}")["opening"]["text"]
            assert shown in openings and server.seen(f"Nobody {i}")["opening"]["text"] == shown
        assert not server.votes.openings and not server.votes.people
        first = {}
        for name in ("Ann", "Bob"):
            first[name] = server.seen(name)["opening"]["text"]
            say(server, "In other words", name=name)
            assert server.seen(name)["opening"] is None
            assert len(server.votes.openings - {None}) == len(set(first.values())) - 1  # asked, not rated
            rate(server, "left", 1, name=name)
        taken = set(first.values())
        for name in ("Ann", "Bob"):
            server.post("/next", annotator=name, dialogue=1)
            own = server.seen(name)["opening"]["text"]
            assert own not in taken and own == server.seen(name)["opening"]["text"]
            taken.add(own)
        late = server.seen("Dan")["opening"]
        assert late["text"] in set(openings) - taken or (late["text"] == "" and taken == set(openings))
        assert late["category"] in server.seen("Dan")["categories"]
        say(server, "Again", name="Ann")
        asked = server.votes.items["Ann/2/1"]["opening"]
    with serving(tmp_path / "votes.jsonl", prompts=str(prompts)) as server:
        used = {openings.index(text) for text in first.values()} | {asked}
        assert server.votes.openings - {None} == used  # Bob's second, which he has not used, comes back
        assert openings.index(server.seen("Bob")["opening"]["text"]) not in used


# -------------------------------------------------------------------------------------- who may ask

def test_an_address_that_others_reach_needs_a_token(tmp_path, capsys):
    exits(capsys, lambda: Config(models=[MODEL], host="0.0.0.0"), "host is '0.0.0.0'", "set token=")
    Config(models=[MODEL], host="0.0.0.0", token="secret")
    with serving(tmp_path / "votes.jsonl", token="secret") as server:
        assert server.seen()["annotator"] == "Ann"
        for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret2"}):
            stranger = httpx.Client(base_url=server.url, headers=headers)
            assert stranger.get("/state", params={"annotator": "Ann"}).status_code == 401
            for path in ("/say", "/answer", "/next"):
                assert stranger.post(path, json={"annotator": "Ann"}).status_code == 401


def test_other_web_pages_cannot_ask(tmp_path):
    with serving(tmp_path / "votes.jsonl") as server:
        rebound = server.client.get("/state", params={"annotator": "Ann"}, headers={"host": "evil.example"})
        assert rebound.status_code == 400 and "evil.example" in rebound.json()["error"]
        form = server.client.post("/next", content=b'{"annotator": "Ann", "dialogue": 1}',
                                  headers={"content-type": "text/plain"})
        assert form.status_code == 400 and server.seen()["dialogue"] == 1
        for name in ("", "a/b", "x" * 41, "<b>", " Ann", "../x", "Ann "):
            assert server.client.get("/state", params={"annotator": name}).status_code == 400, name
        assert server.seen("Zoë d'Arc-Ö.")["annotator"] == "Zoë d'Arc-Ö."
        assert server.client.post("/say", content=b"x" * 300_000,
                                  headers={"content-type": "application/json"}).status_code == 413
        policy = server.client.get("/").headers["content-security-policy"]
        assert "default-src 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize("change, said", [
    ({"models": []}, "models holds 0"), ({"models": [MODEL] * 3}, "models holds 3"),
    ({"top_p": [0.5]}, "top_p and top_k"),
    ({"top_p": [0.5, 1.5]}, "top_p is 1.5"), ({"top_p": [1.0, 1.0], "top_k": [0, 0]}, "told apart"),
    ({"out": "votes.csv"}, "out is 'votes.csv'"), ({"temperature": 0.0}, "temperature is 0"),
    ({"guidelines": "no.md"}, "guidelines=no.md"), ({"tokens": 1}, "tokens is 1"),
])
def test_a_wrong_setting_is_named(capsys, change, said):
    exits(capsys, lambda: Config(**({"models": [MODEL]} | change)), said)


# ---------------------------------------------------------------------------------------- the page

@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    driver, chromium = shutil.which("chromedriver"), shutil.which("chromium") or shutil.which("google-chrome")
    if not driver or not chromium:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu",
                 "--window-size=1200,800"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield browser
    browser.quit()


def press(browser, *keys) -> None:
    browser.switch_to.active_element.send_keys(*keys)


def until(browser, condition: str, seconds: float = 20) -> None:
    """Wait for a JavaScript expression to be true."""
    deadline = time.time() + seconds
    while not browser.execute_script(f"return Boolean({condition})"):
        shown = browser.find_element("tag name", "body").text
        assert time.time() < deadline, f"never {condition}; the page says: {shown}"
        time.sleep(0.02)


RATING = "state && state.item && !busy"
WRITING = "state && !state.item && !busy && document.activeElement.id === 'text'"


def test_a_dialogue_of_four_turns_by_keyboard_alone(tmp_path, browser):
    """With a reply that would run a script, a reload, a double click, the back button and a shared item on the way."""
    from selenium.webdriver.common.keys import Keys

    def reply(request, sampling):
        return f"<script>window.pwned=1</script><img src=x onerror='window.pwned=1'>&amp; **{talk(request, sampling)}**"

    guidelines, shared = tmp_path / "guidelines.md", write_jsonl(tmp_path / "shared.jsonl", SHARED[:1])
    guidelines.write_text("# House rules\nBe fair.\n\n- **First** <i>this</i>, **then**\n- then that\n")
    with serving(tmp_path / "votes.jsonl", reply, guidelines=str(guidelines), shared=str(shared)) as server:
        browser.get(server.url)
        press(browser, "Zoë", Keys.ENTER)
        until(browser, RATING + " && state.item.shared")
        press(browser, Keys.ARROW_RIGHT)
        press(browser, "2")
        for turn in (1, 2, 3, 4):
            until(browser, WRITING + f" && state.turn === {turn}")
            press(browser, f"Question {turn}", Keys.SHIFT, Keys.ENTER, Keys.NULL, "second line", Keys.ENTER)
            until(browser, RATING)
            shown = [e.text for e in browser.find_elements("css selector", ".reply .said")]
            assert all(text.startswith("<script>window.pwned=1</script><img") and "&amp; **Turn" in text
                       for text in shown)
            assert browser.find_elements("css selector", ".turn.user .said")[-1].text == f"Question {turn}\nsecond line"
            if turn == 2:  # what was shown is shown again
                browser.refresh()
                until(browser, RATING)
                assert shown == [e.text for e in browser.find_elements("css selector", ".reply .said")]
            press(browser, Keys.SPACE, Keys.ENTER)  # on no button: rates nothing
            press(browser, Keys.ARROW_LEFT)
            press(browser, Keys.ESCAPE, "3", Keys.ARROW_LEFT)  # after Escape 3 says nothing
            press(browser, str(turn), str(turn), str(turn))
        until(browser, WRITING + " && state.turn === 5")
        aside = browser.find_element("tag name", "aside")
        assert aside.find_element("tag name", "h3").text == "House rules"
        assert [e.text for e in aside.find_elements("tag name", "li")] == ["First <i>this</i>, then", "then that"]
        assert [e.text for e in aside.find_elements("css selector", "li b")] == ["First", "then"]
        assert browser.find_element("id", "progress").text == "Zoë, 5 rated"
        browser.get("about:blank")
        browser.back()
        until(browser, WRITING + " && state.turn === 5")
        browser.execute_script("act('answer', {id: 'Zoë/1/4', choice: 'right', margin: 1, flag: null})")  # an old page
        until(browser, "!busy")
        press(browser, Keys.ALT, "n")
        until(browser, WRITING + " && state.dialogue === 2")
        press(browser, "Another", Keys.ENTER)
        until(browser, RATING)
        press(browser, "x")
        until(browser, WRITING + " && state.dialogue === 3")
        press(browser, "Another", Keys.ENTER)
        until(browser, RATING)
        press(browser, "s")
        until(browser, WRITING + " && state.turn === 2")
        assert browser.execute_script("return window.pwned === undefined "
                                      "&& !document.querySelector('main img, main script')")
        faults = [e["message"] for e in browser.get_log("browser") if e["level"] == "SEVERE"
                  and "favicon" not in e["message"]]
        assert faults == []
    votes = lines(tmp_path / "votes.jsonl")
    assert [(v["turn"], v["margin"], v["chosen_slot"]) for v in votes] == [(t, t, "left") for t in (1, 2, 3, 4)]
    assert [r["flag"] for r in lines(tmp_path / "votes.ratings.jsonl")] == [None] * 5 + ["bad", "skip"]
    records, report = read(tmp_path / "votes.jsonl")
    assert len(list(records)) == 4 and not report.rejects


def test_the_scale_of_eight_and_the_token_in_the_browser(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    with serving(tmp_path / "votes.jsonl", scale="likert", token="secret") as server:
        browser.get(server.url)
        press(browser, "Ann", Keys.ENTER)
        until(browser, "!document.getElementById('needs-token').hidden && document.activeElement.id === 'token'")
        press(browser, "secret", Keys.ENTER)
        for key in "1458":
            until(browser, WRITING)
            press(browser, f"Question for {key}", Keys.ENTER)
            until(browser, RATING)
            press(browser, Keys.ARROW_LEFT, key)
        until(browser, WRITING + " && state.turn === 5")
        browser.get(server.url + "/#token=wrong")
        browser.refresh()
        until(browser, "!document.getElementById('needs-token').hidden")
    assert [r["rating"] for r in lines(tmp_path / "votes.ratings.jsonl")] == [1, 4, 5, 8]
    votes = [(v["chosen_slot"], v["margin"]) for v in lines(tmp_path / "votes.jsonl")]
    assert votes == [("left", 4), ("left", 1), ("right", 1), ("right", 4)]


@pytest.mark.skipif(not (TINY / "config.json").is_file(), reason="needs the SFT model of `make demo`")
def test_the_tiny_checkpoint_holds_a_dialogue(tmp_path, browser):
    from selenium.webdriver.common.keys import Keys

    with serving(tmp_path / "votes.jsonl", models=[("sft", open_model(str(TINY), "cpu"))], max_tokens=64) as server:
        assert isinstance(server.models[0][1], Checkpoint) and server.tokens == 512  # its positions
        browser.get(server.url)
        press(browser, "Ann", Keys.ENTER)
        asked = ("Tell me a story of three sentences about Leo, a bear and the market.", "Now tell it about Luke.",
                 "Use the name David instead.", "Make it two sentences.")
        for turn, text in enumerate(asked, 1):
            until(browser, WRITING + f" && state.turn === {turn}")
            press(browser, text, Keys.ENTER)
            until(browser, RATING)
            if browser.execute_script("return state.item.same"):
                press(browser, "s")
            else:
                press(browser, Keys.ARROW_RIGHT, "2")
        until(browser, WRITING + " && state.turn === 5")
        assert 40 < server.seen()["tokens"] <= 512
    ratings = lines(tmp_path / "votes.ratings.jsonl")
    assert len(ratings) == 4 and all(r["replies"][0]["identity"] == server.models[0][1].name for r in ratings)
    records, report = read(tmp_path / "votes.jsonl")
    assert len(list(records)) >= 2 and not report.rejects
