"""How often attention's kernels multiply what a tile needs once, in machine code: `python tests/tiles.py`.

Tiles as shipped, from aot_baseline.json, beside those they have replaced, which are compiled anew. On sm_100 a single
thread starts the product of a whole tile, so none is computed twice. Writes benchmarks/results/tiles.json.
"""
import json
import os

os.environ["TRITON_INTERPRET"] = "0"  # before the first import of Triton

import aot
import triton
from builds import attention_builds

from kernels import attention

KERNELS = ("forward", "dQ", "dK dV")
REPLACED = {  # (queries, keys, warps, stages), all by pointers
    (80, 128, "dQ"): (64, 32, 8, 2), (80, 128, "dK dV"): (32, 64, 8, 2), (80, 256, "forward"): (64, 32, 8, 1),
    (90, 128, "dK dV"): (64, 64, 8, 2), (90, 256, "forward"): (64, 64, 8, 2), (90, 256, "dQ"): (64, 64, 8, 1),
}


def facts(tile: tuple[int, ...], found: dict) -> dict:
    kept = {key: found[key] for key in ("products", "matrix", "registers", "spills", "shared")}
    return {"tile": "{} x {}, {} warps, {} stages".format(*tile) + ", TMA" * (tile[4:] == (True,))} | kept


def rows() -> list[dict]:
    version = ".".join(triton.__version__.split(".")[:2])
    shipped, found = json.loads(aot.BASELINE.read_text())[version], []
    for sm in (80, 90):
        builds = {build.name: build for build in attention_builds(sm)}
        for width in attention.CONFIGS[sm]:
            for kernel, tile in zip(KERNELS, attention.CONFIGS[sm][width], strict=True):
                name = f"attention {kernel}, E {width}"
                now = before = facts(tile, shipped[name][str(sm)])
                if (sm, width, kernel) in REPLACED:
                    queries, keys, warps, stages = old = REPLACED[sm, width, kernel]
                    arguments = builds[name].arguments | {"QUERIES": queries, "KEYS": keys, "TMA": False}
                    arguments |= {x: "*bf16" for x, kind in arguments.items() if str(kind).startswith("tensordesc")}
                    former = builds[name]._replace(arguments=arguments, warps=warps, stages=stages)
                    before = facts(old, aot.compiled(former, sm))
                found.append({"kernel": kernel, "width": width, "sm": sm, "before": before, "now": now})
    return found


if __name__ == "__main__":
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    out = aot.BASELINE.parent.parent / "benchmarks" / "results" / "tiles.json"
    report = {"command": "python tests/tiles.py", "triton": triton.__version__, "rows": rows()}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {out}")
