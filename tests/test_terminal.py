"""runtime/terminal.py: closed pipes, narrow terminals, other encodings, Ctrl-C; a run outlives them all."""
import io
import os
import re
import signal
import subprocess
import sys

import kills
import pytest
from conftest import ROOT, metrics_of, write_jsonl

import runtime
from runtime.run import StopRequest


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("terminal")
    kills.prepare(folder)
    write_jsonl(folder / "letters.jsonl", [{"messages": [
        {"role": "user", "content": "Grüße, 世界"}, {"role": "assistant", "content": "Привет, 世界!"}]}] * 3)
    return folder


def read_one_line(words: list[str], **environment) -> tuple[str, str, int]:
    """The command's first line, after which nobody reads; its errors and exit code."""
    usual = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=usual | environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    first = process.stdout.readline()
    process.stdout.close()
    said = process.stderr.read().decode()
    process.stderr.close()
    return first.decode("latin-1"), said, process.wait(120)


def test_a_run_outlives_who_reads_it_and_an_output_that_lacks_its_letters(data, tmp_path):
    """python sft.py ... | head -1, and under latin-1: it trains to the end, and its model is there."""
    words = ["sft.py", *kills.words_for("sft", data), f"data={data}/letters.jsonl", f"out={tmp_path / 'run'}",
             "eval_data=", "samples=2", "epochs=1"]
    first, said, code = read_one_line(words, PYTHONIOENCODING="latin-1")
    assert first.startswith("torch ") and said == "" and code == 0
    assert metrics_of(tmp_path / "run") and (tmp_path / "run" / "model" / "config.json").is_file()


@pytest.mark.parametrize("module", ["data.formats", "data.pack"])
def test_tools_end_quietly_when_nobody_reads_on(module, data):
    first, said, code = read_one_line(["-m", module, f"{data}/letters.jsonl"], PYTHONIOENCODING="ascii")
    assert "letters.jsonl" in first and said == "" and code == 0


def prints(code: str, **streams) -> subprocess.CompletedProcess:
    """What a command that has been prepared prints."""
    code = f"from runtime import terminal\nimport os, signal, sys, time\nterminal.prepare()\n{code}"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.PIPE, **streams)


def test_letters_that_an_output_lacks_are_shown_as_their_numbers():
    assert prints("print('é ▁a')", stdout=subprocess.PIPE).stdout == b"\\xe9 \\u2581a\n"


def test_a_closed_output_is_nobodys():
    done = prints("print('a'); print(sys.stdout.isatty(), file=sys.stderr)", preexec_fn=lambda: os.close(1))
    assert done.stderr == b"False\n" and done.returncode == 0


def test_ctrl_c_is_one_line_where_nothing_else_waits_for_it():
    done = prints("os.kill(os.getpid(), signal.SIGINT)\ntime.sleep(9)")
    assert done.stderr.split() == b"stopped by Ctrl-C; files written before are whole".split()
    assert done.returncode == -signal.SIGINT


def test_other_errors_keep_their_traceback():
    assert b"ZeroDivisionError" in prints("1 / 0").stderr


class Screen(io.StringIO):
    """A terminal's rows; no row is wider than it."""

    def isatty(self) -> bool:
        return True

    def rows(self, columns: int) -> list[str]:
        rows = [""]
        for piece in re.split("(\r\033\\[K|\n)", self.getvalue()):
            if piece == "\n":
                rows.append("")
            elif piece == "\r\033[K":
                rows[-1] = ""
            else:
                wrapped = rows[-1] + piece
                rows[-1:] = [wrapped[i : i + columns] for i in range(0, len(wrapped), columns)] or [""]
        return rows


@pytest.mark.parametrize("columns", [200, 80, 40, 12])
def test_the_live_line_takes_one_row_whatever_the_width(columns, tmp_path, monkeypatch):
    """Nine metrics take 150 characters; the last line, which stays, is whole."""
    screen, shown = Screen(), [f"metric_{i}" for i in range(9)]
    monkeypatch.setattr(sys, "stdout", screen)
    monkeypatch.setenv("COLUMNS", str(columns))
    log = runtime.Log(tmp_path, 0, 5, tuple(shown), "off", None)
    for step in range(1, 6):
        log.last = 0.0  # however soon after the one before
        log.step(step, dict.fromkeys(shown, 1.5))
        if step < 5:
            rows = screen.rows(columns)
            assert len(rows) == 1 and rows[0].startswith(f"step {step}/5"[:columns])
    log.close()
    whole = screen.getvalue().split("\r\033[K")[-1]
    assert "metric_8 1.500" in whole and whole.endswith("\n")
    assert len([row for row in screen.rows(columns) if row.startswith("step")]) == 1


@pytest.mark.parametrize("kind, asked", [(signal.SIGTERM, True), (signal.SIGHUP, True), (signal.SIGHUP, False)])
def test_a_closed_window_is_a_request_to_stop_unless_nohup_ignores_it(kind, asked):
    kinds = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
    before = {kind: signal.getsignal(kind) for kind in kinds}
    try:
        signal.signal(kind, signal.SIG_DFL if asked else signal.SIG_IGN)
        request = StopRequest()
        os.kill(os.getpid(), kind)
        assert bool(request) == asked
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
