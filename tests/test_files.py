"""Files, folders and patterns as data sets, and Parquet, Arrow and zstd in them."""
import builtins
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import FIXTURES, ROOT, exits, write_jsonl

from data.files import exists, shards, values
from data.formats import Report, main, read, read_all
from runtime import file_hash


def chat(text: str) -> dict:
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "Yes."}]}


def write(path: Path, *records: dict) -> Path:
    """The records, in the kind of file that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(records)), path)
    elif path.suffix == ".zst":
        with pa.output_stream(str(path), compression="zstd") as file:
            file.write("".join(json.dumps(r) + "\n" for r in records).encode())
    elif path.suffix == ".arrow":
        table = pa.Table.from_pylist(list(records))
        with pa.ipc.new_stream(str(path), table.schema) as file:
            file.write_table(table, max_chunksize=2)
    else:
        write_jsonl(path, list(records))
    return path


def asked(path) -> list[str]:
    return [r["messages"][0]["content"] for r in read_all(path)]


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl.zst", "x.jsonl"])
def test_every_kind_of_file_gives_the_same_records(name, tmp_path):
    assert asked(write(tmp_path / name, *(chat(f"q{i}") for i in range(5)))) == ["q0", "q1", "q2", "q3", "q4"]


def test_a_folder_that_datasets_has_saved_is_read_and_so_is_its_file():
    """tests/fixtures/saved is save_to_disk of three rows of UltraChat-200k's layout: datasets' stream format."""
    for path in (FIXTURES / "saved", FIXTURES / "saved" / "data-00000-of-00001.arrow"):
        records = read_all(path)
        assert len(records) == 3 and [m["role"] for m in records[0]["messages"]] == ["user", "assistant"] * 2
        assert records[2]["messages"][3]["content"] == "1,852 metres."


def test_the_file_format_of_arrow_is_read_too(tmp_path):
    table = pa.Table.from_pylist([chat("a"), chat("b")])
    with pa.ipc.new_file(str(tmp_path / "x.arrow"), table.schema) as file:
        file.write_table(table)
    assert asked(tmp_path / "x.arrow") == ["a", "b"]


def test_a_file_is_what_its_first_bytes_say(tmp_path):
    write(tmp_path / "x.parquet", chat("a")).rename(tmp_path / "x.jsonl")
    assert asked(tmp_path / "x.jsonl") == ["a"]


def test_tables_are_read_a_batch_at_a_time(tmp_path, monkeypatch):
    """Of 3,000 rows no more than 1,000 are Python objects before the first is asked for."""
    write(tmp_path / "x.parquet", *(chat(str(i)) for i in range(3000)))
    sizes = []
    monkeypatch.setattr("data.files._rows", lambda batch: sizes.append(len(batch)) or batch.to_pylist())
    found = values(tmp_path / "x.parquet", Report("x"))
    place, value = next(found)
    assert (place, value, sizes) == (0, chat("0"), [1000])
    assert [place for place, _ in found] == list(range(1, 3000)) and sizes == [1000] * 3


def test_nulls_that_a_table_fills_in_are_as_if_the_key_were_not_there(tmp_path):
    no = {"role": "assistant", "content": "No.", "tool_calls": None}
    rows = [{"chosen": chat("a")["messages"], "rejected": [{"role": "user", "content": "a"}, no], "margin": 2.0},
            {"chosen": chat("b")["messages"], "rejected": [{"role": "user", "content": "b"}, no], "prompt": None,
             "system": None, "tools": None, "label": None, "category": None}]
    first, second = read_all(write(tmp_path / "x.parquet", *rows))
    assert first["margin"] == 2 and "margin" not in second and second["prompt"] == [{"role": "user", "content": "b"}]
    parts = [{"type": "text", "text": "Hi", "image_url": None}]
    message = [{"role": "user", "content": parts, "name": None}, {"role": "assistant", "content": parts, "name": None}]
    (record,) = read_all(write(tmp_path / "y.parquet", {"messages": message, "prompt": None}))
    assert record == {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi"}]}


def test_rows_with_dates_and_bytes_can_be_written_as_json_lines(tmp_path, monkeypatch, capsys):
    from datetime import datetime

    write(tmp_path / "x.parquet", chat("a") | {"date": datetime(2024, 1, 2), "raw": b"\x00"})
    monkeypatch.setattr("sys.argv", ["formats", str(tmp_path / "x.parquet"), "--out", str(tmp_path / "out.jsonl")])
    main()
    assert read_all(tmp_path / "out.jsonl")[0]["date"] == "2024-01-02 00:00:00"


def test_a_row_that_is_not_utf8_is_one_reject(tmp_path):
    good = pa.array(["a", "b", "c"])
    bad = pa.StringArray.from_buffers(3, good.buffers()[1], pa.py_buffer(b"a\xffc"))
    pq.write_table(pa.table({"text": bad}), tmp_path / "x.parquet")
    records, report = read(tmp_path / "x.parquet")
    assert [r["text"] for r in records] == ["a", "c"] and report.kinds == {"not UTF-8": 1}
    assert report.rejects[0][0] == 1 and report.unit == "row"


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl.zst"])
def test_a_file_cut_short_is_one_line(name, tmp_path, capsys):
    whole = write(tmp_path / name, *(chat(f"q{i}") for i in range(50))).read_bytes()
    (tmp_path / name).write_bytes(whole[:len(whole) // 2])
    exits(capsys, lambda: read_all(tmp_path / name), f"{name}: cannot be read", "copy it again")


@pytest.mark.parametrize("name", ["x.parquet", "x.arrow", "x.jsonl.zst"])
def test_without_pyarrow_one_line_says_how_to_install_it(name, tmp_path, monkeypatch, capsys):
    write(tmp_path / name, chat("a"))
    whole = builtins.__import__

    def without(module, *more):
        if module.startswith("pyarrow"):
            raise ImportError(module)
        return whole(module, *more)

    monkeypatch.setattr(builtins, "__import__", without)
    exits(capsys, lambda: read_all(tmp_path / name), f"{name}: needs pyarrow", "pip install pyarrow")


# --------------------------------------------------------------------------------- folders and patterns

def test_shards_of_a_folder_or_a_pattern_are_one_data_set_by_name(tmp_path):
    for i in (2, 0, 1):
        write(tmp_path / "chat" / "data" / f"train_sft-0000{i}-of-00003-a3ec{i}.parquet", chat(f"q{i}"))
    (tmp_path / "chat" / "README.md").write_text("# A data set")
    write(tmp_path / "chat" / ".cache" / "x.jsonl", chat("half loaded"))
    for path in (tmp_path / "chat", tmp_path / "chat/data", f"{tmp_path}/chat/data/train_sft-*.parquet",
                 f"{tmp_path}/**/*.parquet"):
        assert asked(path) == ["q0", "q1", "q2"] and exists(path)
    assert not exists(f"{tmp_path}/chat/*.jsonl")


def test_a_folder_that_lacks_a_shard_is_refused_unless_a_pattern_names_the_others(tmp_path, capsys):
    for i in (0, 2):
        write(tmp_path / f"train-{i:05}-of-00003.parquet", chat(f"q{i}"))
    exits(capsys, lambda: shards(tmp_path), "holds 2 of 3 shards", "train-*.parquet")
    assert asked(tmp_path / "train-*.parquet") == ["q0", "q2"]
    write(tmp_path / "train-00001-of-00003.parquet", chat("q1"))
    assert asked(tmp_path) == ["q0", "q1", "q2"]


def test_files_of_any_names_are_one_data_set_unless_one_is_named_as_a_split(tmp_path, capsys):
    for name in ("law.jsonl", "medicine.jsonl", "contest.jsonl"):
        write(tmp_path / "a" / name, chat(name))
    assert asked(tmp_path / "a") == ["contest.jsonl", "law.jsonl", "medicine.jsonl"]
    write(tmp_path / "a" / "test.jsonl", chat("x"))
    exits(capsys, lambda: read(tmp_path / "a"), "a: holds 4 data sets", "a/test.jsonl'")


@pytest.mark.parametrize("names, shown", [
    (["data/train_prefs-00000-of-00001.parquet", "data/test_prefs-00000-of-00001.parquet",
      "data/train_sft-00000-of-00002.parquet", "data/train_sft-00001-of-00002.parquet"],
     ["data/test_prefs-*.parquet'", "data/train_prefs-*.parquet'", "data/train_sft-*.parquet'", "holds 3 data sets"]),
    (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"],
     ["train/data-*.arrow'", "test/data-*.arrow'"]),
    (["train.jsonl", "validation.jsonl"], ["train.jsonl'", "validation.jsonl'"]),
    (["helpful/a.jsonl", "harmless/a.jsonl"], ["helpful/*.jsonl'", "harmless/*.jsonl'"]),  # configurations
    (["x.jsonl", "x.parquet"], ["*.jsonl'", "*.parquet'"]),  # perhaps the same twice
])
def test_of_a_folder_with_several_sets_one_has_to_be_chosen(names, shown, tmp_path, capsys):
    for name in names:
        write(tmp_path / name, chat(name))
    exits(capsys, lambda: read(tmp_path), *shown, "choose one of")
    for part in shown[:2]:  # what is shown can be given
        assert set(asked(f"{tmp_path}/{part[:-1]}")) <= set(names)


def test_a_pattern_that_mixes_training_and_test_data_is_refused_and_others_are_not(tmp_path, capsys):
    root = tmp_path / "test"  # the name of a folder around all files says nothing
    for name in ("train_a-0.jsonl", "train_b-0.jsonl", "test_a-0.jsonl"):
        write(root / name, chat(name))
    exits(capsys, lambda: read(f"{root}/*_a-*"), "holds 2 data sets", "test_a-*.jsonl'", "train_a-*.jsonl'")
    assert asked(f"{root}/train_*") == ["train_a-0.jsonl", "train_b-0.jsonl"]


def test_what_datasets_keeps_beside_the_data_is_not_data(tmp_path):
    write(tmp_path / "data-00000-of-00001.arrow", chat("a"))
    write(tmp_path / "cache-1f2e.arrow", chat("b"))
    for name in ("state.json", "dataset_info.json"):
        (tmp_path / name).write_text("{}")
    (tmp_path / "LICENSE.txt").write_text("Free.")
    assert [file.name for file in shards(tmp_path)] == ["data-00000-of-00001.arrow"]
    assert asked(f"{tmp_path}/*.arrow") == ["a"]


def test_a_reject_names_the_shard_and_the_row_or_line(tmp_path, capsys):
    write(tmp_path / "x-0.parquet", chat("a"))
    write(tmp_path / "x-1.parquet", chat("b"), chat(""), chat("c"))
    records, report = read(tmp_path)
    assert len(list(records)) == 3 and report.rejects[0][0] == "x-1.parquet row 1"
    exits(capsys, report.refuse, "shard x-1.parquet row 1: 'messages.content' is empty", "--out good.jsonl` keeps")
    write(tmp_path / "y" / "x-0.jsonl", chat("a"), chat(""))
    write(tmp_path / "y" / "x-1.jsonl", chat("b"))
    exits(capsys, lambda: read_all(f"{tmp_path}/y/*"), "shard x-0.jsonl line 2: ", f"'{tmp_path}/y/*' --out")


def test_a_missing_path_says_what_it_may_have_been(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    fetch = "hf download HuggingFaceH4/ultrachat_200k --repo-type dataset --local-dir ultrachat_200k"
    for path in ("HuggingFaceH4/ultrachat_200k", "hf://datasets/HuggingFaceH4/ultrachat_200k",
                 "https://huggingface.co/datasets/HuggingFaceH4/ultrachat_200k"):
        exits(capsys, lambda path=path: read(path), "no such file", fetch)
    for path in ("none.jsonl", "runs/none", "*.parquet"):
        with pytest.raises(SystemExit):
            read(path)
        said = capsys.readouterr().err
        assert "no such file" in said and "hf download" not in said
    exits(capsys, lambda: read("runs"), "runs: is a folder without data files")


# ----------------------------------------------------------------------------------------------- JSON, CSV

@pytest.mark.parametrize("text", [
    '{"prompt": {"0": "Hi", "1": "Bye"}, "chosen": {"0": "A", "1": "B"}, "rejected": {"0": "C", "1": "D"}}',
    '{"train": [{"prompt": "Hi", "chosen": "A", "rejected": "C"}, {"prompt": "Bye", "chosen": "B", "rejected": "D"}], '
    '"test": []}',
    '{"version": 1,\n"data": [{"prompt": "Hi", "chosen": "A", "rejected": "C"},\n'
    '{"prompt": "Bye", "chosen": "B", "rejected": "D"}]}',
])
def test_a_table_by_columns_and_the_rows_under_a_split_are_read(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    records, report = read(tmp_path / "x.json")
    found = [(r["prompt"][0]["content"], r["chosen"], r["rejected"]) for r in records]
    assert found == [("Hi", "A", "C"), ("Bye", "B", "D")]
    assert report.read == 2 and report.unit == "index"


def test_several_splits_in_one_object_are_refused_and_a_record_is_a_record(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"train": [chat("a")], "test": [chat("b")]}))
    records, report = read(tmp_path / "x.json")
    assert not list(records) and "several splits (train, test)" in report.rejects[0][1]
    (tmp_path / "y.json").write_text(json.dumps(chat("a") | {"data": {"0": 1}}))
    assert asked(tmp_path / "y.json") == ["a"]
    (tmp_path / "z.jsonl").write_text('{"": "0", "text": "one"}')
    assert read_all(tmp_path / "z.jsonl") == [{"": "0", "text": "one"}]


def test_a_list_of_test_cases_does_not_hide_the_one_record_it_belongs_to(tmp_path):
    cases = {"test_cases": [{"input": "1 2", "output": "3"}]}
    for name in ("x.json", "x.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": "Add.", "completion": "sum(x)"} | cases))
        assert asked(tmp_path / name) == ["Add."]


def test_two_lines_that_make_one_object_do_not_hide_the_third(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text":\n"one"}\n{"text": "two"}\n')
    records, report = read(tmp_path / "x.jsonl")
    assert list(records) == [{"text": "two"}] and [place for place, _ in report.rejects] == [1, 2]


def test_lists_in_csv_cells_are_read_as_json_and_refused_as_python(tmp_path):
    cell = json.dumps(chat("a")["messages"]).replace('"', '""')
    (tmp_path / "x.csv").write_text(f'messages,id\n"{cell}",1\n')
    assert asked(tmp_path / "x.csv") == ["a"]
    python = "[{'role': 'user', 'content': 'Hi'}\n {'role': 'assistant', 'content': 'Yes.'}]"  # numpy has no commas
    (tmp_path / "y.csv").write_text(f'prompt,messages\nHi,"{python}"\nHi,"[{{a set}}]"\n')
    records, report = read(tmp_path / "y.csv")
    assert [r["messages"] for r in records] == ["[{a set}]"]  # a prompt, and a column that travels along
    assert report.kinds == {"a list as text": 1} and report.rejects[0][0] == 2


def test_a_csv_header_that_names_a_column_twice_is_refused(tmp_path):
    (tmp_path / "x.csv").write_text("prompt,prompt,completion\nHi,Ho,Yes.\n")
    records, report = read(tmp_path / "x.csv")
    assert not list(records) and "with two columns 'prompt'" in report.rejects[0][1]
    (tmp_path / "y.csv").write_text("prompt,completion,,\nHi,Yes.,,\n")  # empty columns, as a spreadsheet leaves them
    assert [r["messages"][0]["content"] for r in read_all(tmp_path / "y.csv")] == ["Hi"]


def test_csv_fields_of_any_length_are_read(tmp_path):
    (tmp_path / "x.csv").write_text(f"text\n{'x' * 500_000}\nshort\n")
    assert [len(r["text"]) for r in read_all(tmp_path / "x.csv")] == [500_000, 5]


# ------------------------------------------------------------------------------------------ those who read

def test_the_hash_of_a_folder_or_a_pattern_changes_with_every_shard(tmp_path):
    for i in range(2):
        write(tmp_path / "data" / "deep" / f"x-{i}.jsonl", chat(str(i)))
    paths = tmp_path / "data", f"{tmp_path}/data/deep/x-*.jsonl", tmp_path / "data/deep"
    before = [file_hash(path) for path in paths]
    assert before == [file_hash(path) for path in paths]
    write(tmp_path / "data" / "deep" / "x-1.jsonl", chat("2"))
    assert all(file_hash(path) != old for path, old in zip(paths, before, strict=True))
    (tmp_path / "data" / "config.json").write_text("{}")  # a checkpoint: its own files alone
    before = file_hash(tmp_path / "data")
    write(tmp_path / "data" / "deep" / "x-1.jsonl", chat("3"))
    assert file_hash(tmp_path / "data") == before


def test_the_command_ends_with_2_when_nothing_was_used_and_quietly_when_nobody_reads_on(tmp_path, monkeypatch, capsys):
    file = write(tmp_path / "x.jsonl", chat(""), chat(" "))
    monkeypatch.setattr("sys.argv", ["formats", str(file), "--out", str(tmp_path / "out.jsonl")])
    with pytest.raises(SystemExit) as left:
        main()
    out, err = capsys.readouterr()
    assert left.value.code == 2 and "2 read, 0 used" in out and "line 1: " in out
    assert err.splitlines() == [f"{file}: none of its 2 records can be used"]
    write(file, chat("Hi"), *(chat("") for _ in range(20_000)))
    command = f"{sys.executable} -m data.formats {file} | head -n 1"
    done = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith("line 2: ") and done.stderr == "" and done.returncode == 0
