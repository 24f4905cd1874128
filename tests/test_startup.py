from conftest import BASE

from benchmarks.startup import TOKENS, measure


def test_a_start_is_measured_cold_and_warm():
    row = measure(1100, str(BASE))  # few, but enough to be kept
    assert row["dialogues"] == 1100 and abs(row["tokens"] / 1100 / TOKENS - 1) < 0.25
    assert 0 < row["warm_s"] < row["cold_s"] and row["resident_after_an_epoch_mib"] > 2 * row["tokens"] / 2**20
