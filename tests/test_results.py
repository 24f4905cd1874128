import re
import tomllib

import pytest
from conftest import ROOT

from benchmarks.results import PLACE, cells, fill, gpu_hours, peers_gpu, table

PAGES = {name: (ROOT / name).read_text() for name in ("README.md", "RESULTS.md", "SPEEDRUN.md", "CONTRIBUTING.md")}
README, RESULTS = PAGES["README.md"], PAGES["RESULTS.md"]
# Places that stay empty until somebody measures.
WAITING = {"demo.json", "peers_gpu", "gpu_hours", "kernels_gpu"}


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "SPEEDRUN.md"])
def test_the_measured_parts_are_those_of_the_committed_results(name):
    assert PLACE.sub(fill, PAGES[name]) == PAGES[name], "python -m benchmarks.results makes them anew"


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "SPEEDRUN.md"])
def test_every_place_is_closed_and_filled(name):
    places = list(PLACE.finditer(PAGES[name]))
    assert len(places) == PAGES[name].count("<!-- / -->") == PAGES[name].count("<!-- ") / 2
    empty = {re.split(r"\s", place[1])[0] for place in places if not place[3].strip()}
    assert empty <= WAITING


@pytest.mark.parametrize("name", ["README.md", "RESULTS.md", "SPEEDRUN.md"])
def test_no_place_within_a_sentence_begins_a_line(name):
    """There Markdown takes the whole line for HTML and shows it as it is."""
    assert not re.search(r"^<!-- [^\n]+ -->[^\n<]", PAGES[name], re.MULTILINE)


def test_no_column_is_empty():
    for lines in re.findall(r"(?:^\|.*\n)+", README + RESULTS, re.MULTILINE):
        columns = zip(*([cell.strip() for cell in line.strip("| \n").split(" | ")] for line in lines.splitlines()[2:]),
                      strict=False)
        assert all(set(column) - {"-", ""} for column in columns), lines


def test_results_open_with_their_contents():
    titles = re.findall(r"^## (.+)$", RESULTS, re.MULTILINE)
    links = [(title, re.sub(r"[^a-z0-9 -]", "", title.lower()).replace(" ", "-")) for title in titles]
    assert re.findall(r"^- \[(.+)\]\(#(.+)\)$", RESULTS[:RESULTS.index("\n## ")], re.MULTILINE) == links


def test_the_readme_is_short():
    assert README.count("\n") <= 150


@pytest.mark.parametrize("name", PAGES)
def test_every_file_a_page_names_exists(name):
    text = PLACE.sub("", PAGES[name])
    named = re.findall(r"`((?:configs|data|kernels|benchmarks|tests|runtime|collect|judging)/[\w./-]+|\w+\.py)`", text)
    named += re.findall(r"\]\(([^#)]+)\)", text) + re.findall(r'--config (\S+?)[` \n"]', text)
    modules = set(re.findall(r"python -m ([\w.]+)", text)) - {"pytest"}
    named += [module.replace(".", "/") for module in modules]
    beside = (".", "configs/zephyr-7b", "configs/tiny")
    assert named
    for path in named:
        assert any((ROOT / folder / f"{path}{end}").exists() for folder in beside for end in ("", ".py")), path


def test_the_map_names_every_source_file():
    tree = README[README.index("## The map"):README.index("## Train a real model")]
    for room in (".", "runtime", "kernels", "data", "data/tiny", "rewards", "collect", "judging"):
        for file in (ROOT / room).glob("*.py"):
            if file.name != "__init__.py":
                assert re.search(rf"\b{file.stem}\b", tree), file


def test_the_loss_that_the_readme_edits_is_the_one_in_dpo():
    block = re.search(r"```diff\n(.*?)```", README, re.DOTALL)[1].splitlines()
    source = (ROOT / "dpo.py").read_text().splitlines()
    places = [source.index(line[1:]) for line in block if line[0] != "+"]
    assert places == sorted(places)


def test_the_licence_is_the_one_that_pyproject_names():
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
    assert (ROOT / "LICENSE").read_text().startswith(f"{named} License")


def test_commands_use_the_keys_of_today():
    for old in ("floor=", "warmup=", "clip=", "lam=", "ratio_clip="):
        assert not any(re.search(rf"\b{old}", text) for text in PAGES.values()), old


def test_a_cell_shows_a_mean_over_seeds_with_its_interval():
    """1, 2, 3: standard deviation 1, t of two degrees of freedom 4.303, half-width 4.303 / sqrt(3) = 2.48."""
    row = {"gold": [1, 2, 3], "same": [600, 600], "judge": {"value": 1, "low": 0, "high": 2}, "none": None,
           "share": 0.25}
    written = cells.vformat("{gold:.1f} {same} {judge} {none} {share:.0%}", (), row)
    assert written == "2.0 ± 2.5 600 1.0 [0.0, 2.0] - 25 %"


def test_rows_that_differ_in_a_heading_share_a_line():
    rows = [{"model": "a", "batch": 1, "rate": 5}, {"model": "a", "batch": 2, "rate": 1234},
            {"model": "b", "batch": 1, "rate": 7.25}]
    lines = table(rows[:2], {"model": "{model}", "batch {batch}": "{rate:rate}"}).splitlines()
    assert lines == ["| model | batch 1 | batch 2 |", "| --- | --- | --- |", "| a | 5 | 1,234 |"]
    assert table(rows[2:], {}).splitlines()[2] == "| b | 1 | 7.2 |"


def test_a_gpu_tells_utilisation_and_what_zephyr_would_cost():
    row = {"unit": "/s", "peak_mib": 2048}
    report = {"device": "NVIDIA H200", "ours": "torch", "peers": "trl", "peak_tflops": 989, "rows": [
        row | {"shape": "7 B, chat", "task": "sft", "side": "ours", "rate": 10000.0, "tflops": 494.5},
        row | {"shape": "7 B, chat", "task": "sft", "side": "TRL, micro", "rate": 5000.0},
        {"shape": "7 B, chat", "task": "sft", "side": "TRL, padded", "error": "out of memory"},
        row | {"shape": "7 B, pairs", "task": "dpo", "side": "ours", "rate": 10.0, "reference_s": 0.02}]}
    ours, theirs, failed, _ = peers_gpu(report)
    assert ours["mfu"] == 0.5 and theirs["ratio"] == 2 and failed["rate"] == "out of memory"
    columns = re.search(r"<!-- peers_gpu\n(.*?)\n-->", RESULTS, re.DOTALL)[1].splitlines()
    written = table(peers_gpu(report), dict(column.split(": ", 1) for column in columns))
    assert "| 494 | 50 % | 2,048 |" in written and "TRL, padded | out of memory" in written
    # 285,212,672 tokens at 10,000 a second; 61,135 pairs three times at 10 a second and once at 50
    assert "13.4 GPU-hours: SFT on UltraChat-200k 7.9, three epochs of DPO on UltraFeedback 5.4" in gpu_hours(report)
