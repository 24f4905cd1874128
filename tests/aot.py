"""Compile every shipped kernel for three generations of GPUs, on a machine without one, and inspect the machine code.

    python tests/aot.py            compare with aot_baseline.json, exit code 1 if anything is wrong
    python tests/aot.py --all      compile also what has not changed since the baseline was written
    python tests/aot.py --write    make what is found the baseline of this Triton version, build by build

Triton's compiler and NVIDIA's assembler need no driver. The machine code shows registers that spill to memory (LDL,
STL), idle matrix units (no HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100), memory accesses narrower than 128 bits
and warp specialisation that did not happen (warps). It says nothing about speed.

Versions of Triton differ by dozens of registers, hence a baseline for each. A build whose key (of source, arguments and
version, as in Triton's own cache) is the one in the baseline would come out the same, so it is not compiled again.
"""
import argparse
import hashlib
import json
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from copy import deepcopy
from io import StringIO
from multiprocessing import connection
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

BASELINE = Path(__file__).parent / "aot_baseline.json"         # Triton version -> kernel -> sm -> KEPT
SHARED = {80: 163, 90: 227, 100: 227}                          # KiB of shared memory a block may have
MATRIX = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC[A-Z0-9]*MMA"}  # the instructions of the matrix units
TYPE = re.compile(r"\*?(bf16|fp16|fp32|fp64|[iu](1|8|16|32|64))(:16)?|tensordesc<.*>")
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.x]*)")
DOT = re.compile(r"(?:tt\.|warp_group_)dot .*? : \S*?<(\d+)x(\d+)x.* -> tensor<\d+x(\d+)xf32, #mma")  # M, K, N
GROUPS = re.compile(r"HGMMA\.(\d+)x(\d+)x(\d+)\..*")  # what four warps multiply in one instruction: 64 x N x 16
MORE_REGISTERS = 8  # than the baseline before it counts as a fault: small edits move a few
KEPT = ("key", "registers", "spills", "shared", "warps", "matrix", "products", "hmma", "tma", "setmaxreg",
        "loads", "wide_loads", "stores", "wide_stores")


class Build(NamedTuple):
    """One kernel as it is shipped."""

    name: str             # "attention forward", and what varies: "E 128, window"
    kernel: object        # the function under @jit
    arguments: dict       # name -> "*bf16", "*i32", "i32", "i32:16" (a multiple of 16), "fp32"; a tl.constexpr's value
    warps: int
    stages: int
    matmul: bool = False  # must use the matrix units
    wide: bool = False    # memory-bound: must move 128 bits at a time
    fusion: bool = True   # of products and sums, as it is launched


# ------------------------------------------------------------------------------------------------------------ compiling

def source(build: Build):
    """What triton.compile takes: types and constants apart, with the attributes the JIT would add by itself."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        value = build.arguments[name]
        if not (isinstance(value, str) and TYPE.fullmatch(value)):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = value.removesuffix(":16")
            # Aligned pointers and multiples of 16: without this the same loads come out 32 bits wide.
            if value.startswith("*") or value.endswith(":16"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(build.kernel, signature, constants, attributes)


def compiled(build: Build, sm: int) -> dict:
    """One kernel compiled for sm_80, sm_90 or sm_100: what the checks look at."""
    import triton
    from triton.backends.compiler import GPUTarget

    log = StringIO()  # the assembler's, which TRITON_DUMP_PTXAS_LOG prints
    with redirect_stdout(log), tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        options = {"num_warps": build.warps, "num_stages": build.stages, "enable_fp_fusion": build.fusion}
        kernel = triton.compile(source(build), target=GPUTarget("cuda", sm, 32), options=options)
    return {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps,
            "serialized": "wgmma" in log.getvalue(), **counts(kernel, sm, build.warps)}


def products(opcodes: Counter, ttgir: str, warps: int) -> float | None:
    """How often the matrix units multiply what the tile needs once; None where that cannot be seen.

    More warps than the tile has rows and columns for, and they compute the same: two warpgroups on 64 rows.
    """
    needed = sum(m * k * n for m, k, n in (map(int, sizes) for sizes in DOT.findall(ttgir)))
    done = sum(count * 16 * 8 * 16 * warps for opcode, count in opcodes.items() if opcode.startswith("HMMA.16816."))
    for opcode, count in opcodes.items():
        if found := GROUPS.fullmatch(opcode):
            done += count * math.prod(map(int, found.groups())) * warps // 4
    return round(done / needed, 2) if needed and done else None


def counts(kernel, sm: int, warps: int) -> dict:
    """Registers and instructions of a kernel compiled for so many warps that compute, from its disassembly."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        listing = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name],
                                 check=True, capture_output=True, text=True).stdout
    opcodes = Counter(OPCODE.findall(listing))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))

    return {"registers": max(int(n) for n in re.findall(r"REG:(\d+)", listing)), "spills": count(r"(LDL|STL)(\..*)?"),
            "matrix": count(MATRIX[sm] + r"(\..*)?"),
            "products": products(opcodes, kernel.asm["ttgir"], warps),
            "hmma": count(r"HMMA(\..*)?"),
            "tma": count(r"(UTMA|UBLK)\w+(\..*)?"), "setmaxreg": count(r"USETMAXREG(\..*)?"),
            "loads": count(r"(LDG|LDGSTS)\..*"), "wide_loads": count(r"(LDG|LDGSTS)\..*(128|256)(\..*)?"),
            "stores": count(r"STG\..*"), "wide_stores": count(r"STG\..*(128|256)(\..*)?")}


def inspect(build: Build, sm: int, before: dict, everything: bool) -> dict:
    """The row of one build: compiled, or as `before` says if it has not changed."""
    import triton

    row = {"kernel": build.name, "sm": sm, "matmul": build.matmul, "wide": build.wide, "compiled": False}
    try:
        key = f"{source(build).hash()} {build.warps} {build.stages} {triton.__version__}"
        key += " unfused" * (not build.fusion)
        row["key"] = hashlib.sha256(key.encode()).hexdigest()[:16]
        if before.get("key") == row["key"] and not everything:
            return row | before | {"serialized": False}
        return row | compiled(build, sm) | {"compiled": True}
    except Exception as error:  # any failure of the compiler is this row's finding
        while error.__cause__:
            error = error.__cause__
        last = " ".join((str(error).strip() or "no message").splitlines()[-1].split())
        return row | {"error": f"{type(error).__name__}: {last[:200]}"}


def inspect_all(todo: list[tuple], workers: int) -> Iterator[dict]:
    """A row for each (build, sm, before, everything), from worker processes: a compiler that crashes costs one row."""
    context = multiprocessing.get_context("fork")
    running = {}  # connection -> the process that writes to it, and what it has yet to do

    def work(queue: list[tuple], sender) -> None:
        for each in queue:
            sender.send(inspect(*each))

    def start(queue: list[tuple]) -> None:
        receiver, sender = context.Pipe(duplex=False)
        process = context.Process(target=work, args=(queue, sender))
        process.start()
        sender.close()  # the process holds the only other one: when it ends, the receiver meets the end of the file
        running[receiver] = process, queue

    for i in range(min(workers, len(todo))):
        start(todo[i::workers])
    while running:
        for receiver in connection.wait(list(running)):
            try:
                row = receiver.recv()
            except EOFError:
                process, queue = running.pop(receiver)
                process.join()
                if not queue:
                    continue
                row = {"kernel": queue[0][0].name, "sm": queue[0][1], "compiled": True, "error": "the compiler crashed"}
                if queue[1:]:
                    start(queue[1:])
            else:
                running[receiver][1].pop(0)
            yield row


# ------------------------------------------------------------------------------------------------------------- checking

def faults(row: dict, before: dict) -> list[str]:
    """What is wrong with a row, by itself and beside its baseline entry; empty if nothing is."""
    if row.get("error"):
        return [row["error"]]
    known = before or {"spills": 0, "registers": row["registers"], "warps": row["warps"]}
    wrong = []
    if row["shared"] > SHARED[row["sm"]] * 1024:
        wrong.append(f"{row['shared'] / 1024:.0f} KiB of shared memory, sm_{row['sm']} has {SHARED[row['sm']]}")
    if row["spills"] > known["spills"]:
        wrong.append(f"{row['spills']} spill instructions, {known['spills']} allowed")
    if row["registers"] > known["registers"] + MORE_REGISTERS:
        wrong.append(f"{row['registers']} registers, {known['registers']} before")
    if row["warps"] < known["warps"]:
        wrong.append(f"{row['warps']} warps, {known['warps']} before: warp specialisation did not happen")
    if row["matmul"] and not row["matrix"]:
        wrong.append(f"no {MATRIX[row['sm']]} instruction: the matrix units are idle")
    if (row.get("products") or 0) > (known.get("products") or 1):
        wrong.append(f"computes {row['products']:g} times the products of its tile: more warps than it has rows for")
    if row["serialized"]:
        wrong.append("the assembler runs the wgmma instructions one after another")
    if row["wide"] and not row["wide_loads"] + row["wide_stores"] + row["tma"]:
        wrong.append("no global access is 128 bits wide")
    wrong += [f"no {name.replace('_', ' ')} left, {before[name]} before" for name in ("wide_loads", "wide_stores")
              if row["wide"] and before.get(name) and not row[name]]
    return wrong


def line(row: dict, before: dict) -> str:
    """A row for the terminal."""
    name, wrong = f"{row['kernel']:<40} sm_{row['sm']:<3}", faults(row, before)
    if row.get("error"):
        return f"{name} FAILED: {row['error']}"
    facts = (f"{row['registers']:3} regs {row['spills']:3} spills {row['shared'] / 1024:6.1f} KiB "
             f"{row['warps']:2} warps {row['matrix']:3} mma x {row.get('products') or 1:<4g} {row['tma']:2} tma "
             f"{row['wide_loads']:3}/{row['loads']:<3} wide loads {row['wide_stores']:3}/{row['stores']:<3} stores")
    return f"{name} {facts}  {'FAILED: ' + '; '.join(wrong) if wrong else 'ok' if before else 'ok, no baseline'}"


def write_baseline(rows: list[dict], version: str, baseline: dict, file: Path) -> None:
    """These rows in place of those of the same builds."""
    kernels = baseline.setdefault(version, {})
    for row in rows:
        if not row.get("error"):
            kernels.setdefault(row["kernel"], {})[str(row["sm"])] = {key: row.get(key) for key in KEPT}
    baseline[version] = {name: dict(sorted(found.items(), key=lambda item: int(item[0])))
                         for name, found in sorted(kernels.items())}
    file.write_text(json_lines(dict(sorted(baseline.items()))) + "\n")


def json_lines(value: object, indent: str = "\n") -> str:
    """JSON with every row (what holds no object itself) on one line, to be read in a diff."""
    if not any(isinstance(part, dict) for part in value.values()):
        return json.dumps(value)
    lines = [f"{json.dumps(key)}: {json_lines(part, indent + ' ')}" for key, part in value.items()]
    return "{" + indent + " " + f",{indent} ".join(lines) + indent + "}"


def main(builds: Callable[[int], list[Build]]) -> int:
    """`builds` gives the kernels of an architecture: those of builds.py, or a test's."""
    parser = argparse.ArgumentParser("python tests/aot.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile also what has not changed")
    parser.add_argument("--write", action="store_true", help="make the result the baseline of this Triton version")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--workers", type=int, default=2)
    given = parser.parse_args()
    os.environ["TRITON_DUMP_PTXAS_LOG"] = "1"
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    baseline = json.loads(given.baseline.read_text()) if given.baseline.exists() else {}
    written = deepcopy(baseline)  # with --write; every row is judged beside what there was
    todo = [(build, sm) for sm in SHARED for build in builds(sm)]
    for (name, sm), n in Counter((build.name, sm) for build, sm in todo).items():
        if n > 1:
            raise SystemExit(f"two builds are called {name!r} on sm_{sm}: the baseline could not tell them apart")

    def entry(name: str, sm: int) -> dict:
        return baseline.get(version, {}).get(name, {}).get(str(sm), {})

    for function in [part for build, _ in todo for part in vars(sys.modules[build.kernel.__module__]).values()
                     if hasattr(part, "starting_line_number")]:  # in a set it would have its key already
        function.starting_line_number = 0  # or a line added above a kernel would change its key
    rows = []
    for row in inspect_all([(build, sm, entry(build.name, sm), given.all) for build, sm in todo], given.workers):
        rows.append(row)
        print(line(row, entry(row["kernel"], row["sm"])), flush=True)
        if given.write and not row.get("error"):
            write_baseline(rows, version, written, given.baseline)
    failed = [row for row in rows if faults(row, entry(row["kernel"], row["sm"]))]
    unknown = sum(not entry(row["kernel"], row["sm"]) for row in rows)
    gone = sorted(set(baseline.get(version, {})) - {row["kernel"] for row in rows})
    print(f"{len(rows)} builds with Triton {version}, {sum(row['compiled'] for row in rows)} compiled: "
          f"{len(failed)} failed, {unknown} without a baseline" + f"; built no more: {', '.join(gone)}" * bool(gone))
    if failed:
        print("failed: " + "; ".join(f"{row['kernel']} sm_{row['sm']}" for row in failed))
    if given.write:
        if any(row.get("error") for row in rows):
            raise SystemExit(f"{given.baseline} has the rows above; builds that do not compile keep those they had")
        written[version] = {}  # without what is built no more
        write_baseline(rows, version, written, given.baseline)
        print(f"wrote {given.baseline}")
    return 1 if failed else 0


if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "0"  # before the first import of Triton: 1 would leave nothing to compile
    from builds import builds

    raise SystemExit(main(builds))
