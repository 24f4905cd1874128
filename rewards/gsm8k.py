"""Reward functions for GSM8K and what is like it: is the number at the end of a reply the right one?

    python ppo.py reward=rewards/gsm8k.py:right data=train.jsonl advantages=grpo n=8

The right number is the record's "final", as the reader of GSM8K finds it; without one it is that of "answer".
"""
import re
from decimal import Decimal

NUMBER = re.compile(r"(?:(?<![\w)])-)?\$?(\d[\d,]*(?:\.\d+)?|\.\d+)")


def final_number(text: str) -> Decimal | None:
    """The number after the first ####, or without that mark the last one; None if there is none.

    1,200 and $1200.00 and 1200 are one number; a minus counts unless it stands between two terms.
    """
    _, mark, end = text.partition("####")
    found = NUMBER.match(end.strip()) if mark else None
    found = found or (None if mark else next(iter([*NUMBER.finditer(text)][-1:]), None))
    if found is None:
        return None
    value = Decimal(found[1].replace(",", ""))
    return -value if found[0].startswith("-") else value


def right(records: list[dict], replies: list[str], tokens: list[int], finished: list[bool]) -> list[float]:
    """1 for the right final number, 0 for another or none."""
    wanted = [final_number(str(record["final"] if "final" in record else record["answer"])) for record in records]
    return [float(number is not None and final_number(reply) == number)
            for number, reply in zip(wanted, replies, strict=True)]
