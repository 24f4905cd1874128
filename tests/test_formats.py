import gzip
import json
import os
from pathlib import Path

import pytest
from conftest import exits, write_jsonl

from data.formats import main, read

HI = {"role": "user", "content": "Hi"}
HELLO = {"role": "assistant", "content": "Hello"}


def write(path, *records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def test_the_first_record_tells_the_format(tmp_path):
    for record, name in (({"messages": [HI, HELLO]}, "messages"), ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "preference"),
                         ({"text": "Once."}, "text")):
        records, report = read(write(tmp_path / f"{name}.jsonl", record))
        assert len(list(records)) == 1 and report.format == name and not report.rejects


def test_preferences_come_in_four_shapes_and_leave_in_one(tmp_path):
    shapes = [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go", "margin": 3},
        {"prompt": [HI], "chosen": "Hello", "rejected": "Go"},
        {"prompt": [HI], "chosen": [HELLO], "rejected": [HELLO | {"content": "Go"}]},
        {"prompt": "Hi", "chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]},
    ]
    records = list(read(write(tmp_path / "p.jsonl", *shapes))[0])
    assert all((r["prompt"], r["chosen"], r["rejected"]) == ([HI], "Hello", "Go") for r in records)
    assert records[0]["margin"] == 3


def test_compressed_files_and_empty_lines_are_read(tmp_path):
    with gzip.open(tmp_path / "d.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "one"}) + "\n\n" + json.dumps({"text": "two"}) + "\n")
    assert [r["text"] for r in read(tmp_path / "d.jsonl.gz")[0]] == ["one", "two"]


def test_other_keys_travel_along(tmp_path):
    (record,) = read(write(tmp_path / "m.jsonl", {"messages": [HI, HELLO], "category": "chat", "id": 7}))[0]
    assert record["category"] == "chat" and record["id"] == 7


@pytest.mark.parametrize("record, reason", [
    ("not json", "is not JSON"),
    ("[1, 2]", "is a JSON list"),
    ({"messages": []}, "expected a list of messages"),
    ({"messages": "Hi"}, "expected a list of messages"),
    ({"messages": [HI]}, "ends with a user turn"),
    ({"messages": [HELLO]}, "where user is due"),
    ({"messages": [HI, HI]}, "where assistant is due"),
    ({"messages": [HI, {"role": "bot", "content": "x"}]}, "role 'bot'"),
    ({"messages": [HI, {"role": "assistant", "content": "  "}]}, "'messages.content' is empty"),
    ({"messages": [HI, {"role": "assistant", "content": 3}]}, "expected text"),
    ({"messages": [HI, {"role": "assistant", "content": "\ud800"}]}, "half a surrogate pair"),
    ({"messages": [{"role": "system", "content": "s"}]}, "no user turn"),
])
def test_a_bad_dialogue_is_reported_with_its_line_and_the_others_are_kept(record, reason, tmp_path):
    good = {"messages": [HI, HELLO]}
    records, report = read(write(tmp_path / "m.jsonl", good, record, good))
    assert len(list(records)) == 2 and report.read == 3
    ((line, said),) = report.rejects
    assert line == 2 and reason in said


@pytest.mark.parametrize("change, reason", [
    ({"rejected": ""}, "'rejected' is empty"),
    ({"rejected": "Hello"}, "'chosen' equals 'rejected'"),
    ({"rejected": None}, "expected text"),
    ({"chosen": [HI, HELLO], "rejected": [HI | {"content": "Ho"}, HELLO | {"content": "Go"}]}, "disagree on what precedes the reply"),
    ({"rejected": [HI | {"content": "Ho"}, HELLO | {"content": "Go"}]}, "disagree on what precedes the reply"),
    ({"prompt": [HI | {"content": "Ho"}], "chosen": [HI, HELLO], "rejected": [HI, HELLO | {"content": "Go"}]}, "disagree"),
    ({"prompt": [HI, HELLO]}, "ends with a reply"),
    ({"prompt": 5}, "expected a list of messages"),
    ({"margin": "big"}, "'margin' is"),
    ({"margin": -1}, "'margin' is -1"),
])
def test_a_bad_pair_is_reported(change, reason, tmp_path):
    good = {"prompt": [HI], "chosen": "Hello", "rejected": "Go"}
    records, report = read(write(tmp_path / "p.jsonl", good, good | change))
    assert len(list(records)) == 1 and report.rejects[0][0] == 2 and reason in report.rejects[0][1]


def test_training_refuses_a_file_with_one_bad_line_in_ten_thousand(tmp_path, capsys):
    good = json.dumps({"messages": [HI, HELLO]})
    path = write(tmp_path / "m.jsonl", *[good] * 6000, '{"messages": [', *[good] * 4000)
    records, report = read(path)
    assert len(list(records)) == 10_000
    exits(capsys, report.refuse, "m.jsonl line 6001: is not JSON")


def test_empty_binary_and_missing_files_are_one_line(tmp_path, capsys):
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "binary.jsonl").write_bytes(b"\x89PNG\xff\xfe" * 40)
    for name, said in (("empty", "is empty"), ("binary", "is not UTF-8 text")):
        records, report = read(tmp_path / f"{name}.jsonl")
        list(records)
        exits(capsys, report.refuse, said)
    exits(capsys, lambda: read(tmp_path / "none.jsonl"), "no such file")
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    exits(capsys, lambda: list(read(tmp_path / "cut.jsonl.gz")[0]), "cut.jsonl.gz: cannot be read")
    exits(capsys, lambda: read(write(tmp_path / "x.jsonl", {"text": "a"}), "csv"), "format 'csv' is unknown")


def test_the_command_lists_rejects_and_keeps_the_good(tmp_path, capsys, monkeypatch):
    path = write(tmp_path / "m.jsonl", {"messages": [HI, HELLO]}, "{", {"messages": [HI]})
    monkeypatch.setattr("sys.argv", ["formats", str(path), "--out", str(tmp_path / "good.jsonl")])
    main()
    said = capsys.readouterr().out
    assert "line 2: is not JSON" in said and "format messages, 3 read, 1 used, 2 rejected" in said
    assert len((tmp_path / "good.jsonl").read_text().splitlines()) == 1


def test_rankings_and_prompts_are_read_and_bad_ranks_reported(tmp_path):
    good = {"prompt": "Hi", "answers": ["Hello!", "Hm."], "ranks": [0, 1]}
    bad = [{"ranks": [0]}, {"ranks": [1, 1]}, {"ranks": [0, -1]}, {"ranks": [0, 1.5]}, {"answers": ["Hello!", ""]}, {"prompt": ""}]
    file = write_jsonl(tmp_path / "r.jsonl", [good, *(good | change for change in bad)])
    records, report = read(file)
    assert list(records) == [good | {"prompt": [{"role": "user", "content": "Hi"}]}] and report.format == "ranking"
    assert [line for line, _ in report.rejects] == [2, 3, 4, 5, 6, 7]
    records, report = read(write_jsonl(tmp_path / "p.jsonl", [{"prompt": "Hi", "id": 1}]))
    assert list(records) == [{"prompt": [{"role": "user", "content": "Hi"}], "id": 1}] and report.format == "prompt"


@pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")
def test_real_ultrafeedback_pairs_are_read():
    """150 binarized UltraFeedback pairs, plain strings: none empty or identical among these."""
    records, report = read(Path(os.environ["REAL_DATA"]) / "datasets" / "ultrafeedback" / "train_pairs_150.jsonl.gz")
    records = list(records)
    assert (report.format, report.read, len(records) + len(report.rejects)) == ("preference", 150, 150)
    assert len(records) >= 145 and all(r["prompt"][-1]["role"] == "user" for r in records)
