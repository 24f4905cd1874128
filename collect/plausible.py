"""The slides' tables of lengths, and whether a table of eight numbers can be true of any set of lengths."""
import math
from collections.abc import Callable, Mapping

import numpy as np

COLUMNS = ("count", "mean", "std", "min", "25%", "50%", "75%", "max")
QUANTILES = COLUMNS[3:]

# Prompt lengths as the slides print them: InstructGPT's sets, and three vendors' pilots.
SLIDES = {name: dict(zip(COLUMNS, row, strict=True)) for name, row in {
    "instructgpt_train": (12725, 408, 433, 1, 37, 283, 632, 2048),
    "instructgpt_valid": (1653, 401, 433, 4, 41, 234, 631, 2048),
    "reward_train": (33207, 199, 334, 1, 20, 64, 203, 2032), "reward_valid": (17887, 209, 327, 1, 26, 77, 229, 2039),
    "ppo_train": (31144, 166, 278, 2, 19, 62, 179, 2044), "ppo_valid": (16185, 186, 292, 1, 24, 71, 213, 2039),
    "test": (3196, 115, 194, 1, 17, 49, 127, 1836), "surge_pilot": (75, 104, 94, 7, 38, 81, 135, 505),
    "sagemaker_pilot": (129, 54, 46, 0, 8, 13, 31, 1036), "scale_pilot": (69, 22, 16, 5, 13, 18, 24, 116)}.items()}


def implausible(table: Mapping[str, float], rounding: float = 0.5) -> list[str]:
    """Why no set of lengths can have this table of eight numbers, each printed to within `rounding`; empty if one can.

    Quantiles must be ordered. They also box in every order statistic, x_i in [l_i, h_i], and the boxes bound the mean,
    sum l / n <= mean <= sum h / n; given the mean, the standard deviation is least where all x_i lie as close to one
    level c as their boxes let them, x_i = clip(c, l_i, h_i), and greatest where the upper boxes are filled first. The
    textbook's bound, std >= |max - mean| sqrt(n) / (n - 1), is the special case without quartiles.
    """
    n, quantiles = int(table["count"]), [table[q] for q in QUANTILES]
    if n < 1 or quantiles != sorted(quantiles) or quantiles[0] < 0:
        return [f"count {n}, quantiles {quantiles}: expected at least one record, and ordered lengths from 0"]
    place, i = (n - 1) * np.array([0, .25, .5, .75, 1]), np.arange(n)
    known = list(zip(place, quantiles, strict=True))
    low = np.max([np.where(i >= np.ceil(p), q - rounding, -math.inf) for p, q in known], axis=0)
    high = np.min([np.where(i <= np.floor(p), q + rounding, math.inf) for p, q in known], axis=0)
    mean, std = table["mean"], table["std"]
    if not low.mean() - rounding <= mean <= high.mean() + rounding:
        return [f"mean {mean:g}: the quantiles allow {low.mean():.1f} to {high.mean():.1f}"]
    if n == 1:
        return [] if math.isnan(std) else [f"std {std:g}: one record has none"]

    def level(excess: Callable[[float], float]) -> float:
        """Where a falling function of the level crosses zero."""
        a, b = low[0], high[-1]
        for _ in range(60):
            c = (a + b) / 2
            a, b = (c, b) if excess(c) > 0 else (a, c)
        return c

    flattest = level(lambda c: np.clip(c, low, high).mean() - c)  # the least deviation any mean allows
    between = [level(lambda c, m=m: m - np.clip(c, low, high).mean()) for m in (mean - rounding, mean + rounding)]
    least = np.clip(np.clip(flattest, *between), low, high).std(ddof=1)
    spare, room = max(0, n * (mean + rounding) - low.sum()), np.cumsum((high - low)[::-1])
    filled = int(np.searchsorted(room, spare))
    x = np.concatenate([low[:n - filled], high[n - filled:]])
    if filled < n:
        x[n - filled - 1] += spare - (room[filled - 1] if filled else 0)
    greatest = math.sqrt(max(0, x @ x - n * max(0, mean - rounding) ** 2) / (n - 1))
    if not least - rounding <= std <= greatest + rounding:
        return [f"std {std:g}: quantiles and mean allow {least:.1f} to {greatest:.1f}"]
    return []


def pilot_section(tables: Mapping[str, Mapping[str, float]] = SLIDES) -> dict:
    """The vendors' pilots beside the sets they were ordered to match, with what flags a table as impossible."""
    rows = [[name, *(table[column] for column in COLUMNS), "; ".join(implausible(table)) or "possible"]
            for name, table in tables.items()]
    return {"title": "Pilots, prompt length in tokens", "columns": ["", *COLUMNS, "flag"], "rows": rows,
            "text": "As the talk prints them. A flag says that no set of lengths has these eight numbers: ask the "
                    "vendor how they were counted before buying."}
