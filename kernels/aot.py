"""Compile every shipped kernel for three generations of GPUs, on a machine without one, and look at what came out.

    python -m kernels.aot             compare with kernels/aot_baseline.json, exit 1 if anything is amiss
    python -m kernels.aot --all       compile also what has not changed since the baseline was written
    python -m kernels.aot --write     then make what was found the baseline of this Triton version

Triton's compiler and NVIDIA's assembler need no driver. The machine code says what a benchmark would only hint at:
registers that spill to memory (LDL, STL), matrix units left idle (HMMA on sm_80, HGMMA on sm_90, UTC*MMA on sm_100),
loads narrower than 128 bits, warp specialisation that quietly did not happen (warps). It says nothing about speed.

Two worker processes compile. They run with TRITON_INTERPRET=0, since 1 would leave nothing to compile, and a compiler
that crashes costs one row. Versions of Triton differ by dozens of registers, hence a baseline for each. A build whose
key (what Triton's own cache would look it up by: source, arguments, version) is that of its baseline entry would come
out the same, so it is not compiled again unless asked.
"""
from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from kernels import Build

MODULES = ["kernels.attention", "kernels.decode", "kernels.fused", "kernels.logprobs", "kernels.nf4"]
BASELINE = Path(__file__).parent / "aot_baseline.json"
SHARED = {80: 163, 90: 227, 100: 227}                          # KiB a block may have
MATRIX = {80: r"HMMA", 90: r"HGMMA", 100: r"UTC[A-Z0-9]*MMA"}  # the instructions of the matrix units
TYPE = re.compile(r"\*?(bf16|fp16|fp32|fp64|[iu](1|8|16|32|64))(:16)?|tensordesc<.*>")
OPCODE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)")
MORE_REGISTERS = 8  # above the baseline before it is a fault: small edits move a few


def source(build: Build):
    """What triton.compile takes: types and constants apart, with the attributes the JIT would add by itself. Only in a worker."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, name in enumerate(build.kernel.arg_names):
        value = build.arguments[name]
        if isinstance(value, tuple):
            signature[name] = value
        elif not (isinstance(value, str) and TYPE.fullmatch(value)):
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = value.removesuffix(":16")
            # Aligned pointers and multiples of 16: without this the same loads come out 32 bits wide.
            if value.startswith("*") or value.endswith(":16"):
                attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(build.kernel, signature, constants, attributes)


def compiled(build: Build, sm: int) -> dict:
    """One kernel compiled for sm_80, sm_90 or sm_100: what the checks look at. Only in a worker."""
    import triton
    from triton.backends.compiler import GPUTarget

    said = StringIO()
    with redirect_stdout(said):  # the assembler's report, see TRITON_DUMP_PTXAS_LOG below
        kernel = triton.compile(source(build), target=GPUTarget("cuda", sm, 32),
                                options={"num_warps": build.warps, "num_stages": build.stages})
    return {"shared": kernel.metadata.shared, "warps": kernel.metadata.num_warps, "serialized": "wgmma" in said.getvalue(),
            **counts(kernel.asm["cubin"], sm)}


def counts(cubin: bytes, sm: int) -> dict:
    """Registers and instructions of a cubin, from its disassembly."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run([knobs.nvidia.cuobjdump.path, "-sass", "-res-usage", file.name],
                                 check=True, capture_output=True, text=True).stdout
    opcodes = Counter(OPCODE.findall(listing))

    def count(pattern: str) -> int:
        return sum(n for opcode, n in opcodes.items() if re.fullmatch(pattern, opcode))

    return {"registers": max(int(n) for n in re.findall(r"REG:(\d+)", listing)), "spills": count(r"(LDL|STL)(\..*)?"),
            "matrix": count(MATRIX[sm] + r"(\..*)?"), "hmma": count(r"HMMA(\..*)?"),
            "tma": count(r"(UTMA|UBLK)\w+(\..*)?"), "setmaxreg": count(r"USETMAXREG(\..*)?"),
            "loads": count(r"(LDG|LDGSTS)\..*"), "wide_loads": count(r"(LDG|LDGSTS)\..*(128|256)(\..*)?"),
            "stores": count(r"STG\..*"), "wide_stores": count(r"STG\..*(128|256)(\..*)?")}


def every_build(modules: list[str]) -> list[tuple[Build, int]]:
    """Every module's builds for every architecture, with keys that a line added above a kernel does not change."""
    found = []
    for module in map(importlib.import_module, modules):
        for part in vars(module).values():
            if hasattr(part, "starting_line_number"):
                part.starting_line_number = 0
        found += [(build, sm) for sm in SHARED for build in module.builds(sm)]
    twice = [key for key, n in Counter((build.name, sm) for build, sm in found).items() if n > 1]
    if twice:
        raise SystemExit(f"two builds are called {twice[0][0]!r} on sm_{twice[0][1]}: the baseline could not tell them apart")
    return found


def worker(modules: list[str], file: Path, first: int, step: int, everything: bool) -> None:
    """Builds first, first + step, ...; a JSON line before each says which, one after says what came of it."""
    import triton

    version = ".".join(triton.__version__.split(".")[:2])
    baseline = read_baseline(file).get(version, {})
    for build, sm in every_build(modules)[first::step]:
        row = {"kernel": build.name, "sm": sm, "triton": version, "matmul": build.matmul, "wide": build.wide, "compiled": True}
        print(json.dumps(row | {"error": "the compiler crashed"}), flush=True)
        before = baseline.get(build.name, {}).get(str(sm), {})
        try:
            key = f"{source(build).hash()} {build.warps} {build.stages} {triton.__version__}"
            row["key"] = hashlib.sha256(key.encode()).hexdigest()[:16]
            if before.get("key") == row["key"] and not everything:
                row |= before | {"serialized": False, "compiled": False}
            else:
                row |= compiled(build, sm)
        except Exception as error:  # any failure of the compiler is this row's finding
            while error.__cause__:
                error = error.__cause__
            row["error"] = f"{type(error).__name__}: " + " ".join((str(error).strip() or "no message").splitlines()[-1].split())[:200]
        print(json.dumps(row), flush=True)


def share(modules: list[str], file: Path, first: int, step: int, everything: bool, show) -> list[dict]:
    """The rows of one worker, started again behind a row that killed it. Raises SystemExit if it cannot even start."""
    rows: list[dict] = []
    with tempfile.TemporaryDirectory() as cache, tempfile.TemporaryFile("w+") as errors:
        env = os.environ | {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1", "TRITON_INTERPRET": "0"}
        while True:
            command = [sys.executable, "-m", "kernels.aot", "--worker", str(first + step * len(rows)), str(step),
                       *["--all"] * everything, "--baseline", file, "--modules", *modules]
            running = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=errors, text=True)
            lines = []
            for text in running.stdout:
                lines.append(json.loads(text))
                if len(lines) % 2 == 0:
                    show(lines[-1])
            if running.wait() == 0:
                return rows + lines[1::2]
            errors.seek(0)
            said = errors.read().strip().splitlines() or [f"a worker ended with {running.returncode}"]
            if len(lines) % 2 == 0:
                raise SystemExit(said[-1])
            lines[-1]["error"] += ": " + next((s for s in said if "Assertion" in s), said[-1])[-200:]
            show(lines[-1])
            rows += [*lines[1::2], lines[-1]]


def faults(row: dict, before: dict | None) -> list[str]:
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
    if row["serialized"]:
        wrong.append("the assembler runs the wgmma instructions one after another")
    if row["wide"] and not row["wide_loads"] + row["wide_stores"] + row["tma"]:
        wrong.append("no global access is 128 bits wide")
    wrong += [f"no {name.replace('_', ' ')} left, {before[name]} before" for name in ("wide_loads", "wide_stores")
              if row["wide"] and before and before[name] and not row[name]]
    return wrong


def line(row: dict, wrong: list[str], known: bool) -> str:
    name = f"{row['kernel']:<40} sm_{row['sm']:<3}"
    if row.get("error"):
        return f"{name} FAILED: {row['error']}"
    facts = (f"{row['registers']:3} regs {row['spills']:3} spills {row['shared'] / 1024:6.1f} KiB "
             f"{row['warps']:2} warps{' specialised' * bool(row['setmaxreg'])} "
             f"{row['matrix']:3} mma {row['hmma']:3} hmma {row['tma']:2} tma {row['wide_loads']:3}/{row['loads']:<3} wide loads "
             f"{row['wide_stores']:3}/{row['stores']:<3} stores")
    return f"{name} {facts}  {'FAILED: ' + '; '.join(wrong) if wrong else 'ok' if known else 'ok, no baseline'}"


KEPT = ("key", "registers", "spills", "shared", "warps", "matrix", "hmma", "tma", "setmaxreg",
        "loads", "wide_loads", "stores", "wide_stores")


def read_baseline(file: Path) -> dict:
    """Triton version -> kernel -> sm -> facts."""
    return json.loads(file.read_text()) if file.exists() else {}


def write_baseline(rows: list[dict], baseline: dict, file: Path) -> None:
    """These rows in place of all of their version; other versions stay as they are. A line a row, to be read in a diff."""
    version = rows[0]["triton"]
    baseline[version] = {}
    for row in sorted(rows, key=lambda row: (row["kernel"], row["sm"])):
        baseline[version].setdefault(row["kernel"], {})[str(row["sm"])] = {key: row[key] for key in KEPT}
    versions = []
    for name, kernels in sorted(baseline.items()):
        entries = [f'  {json.dumps(kernel)}: {{\n' + ",\n".join(f'   "{sm}": {json.dumps(facts)}' for sm, facts in sms.items()) + "}"
                   for kernel, sms in kernels.items()]
        versions.append(f' "{name}": {{\n' + ",\n".join(entries) + "}")
    file.write_text("{\n" + ",\n".join(versions) + "\n}\n")


def main() -> int:
    parser = argparse.ArgumentParser("python -m kernels.aot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="compile also what has not changed since the baseline was written")
    parser.add_argument("--write", action="store_true", help="make the result the baseline of this Triton version")
    parser.add_argument("--modules", nargs="+", default=MODULES, help="modules that export builds(sm)")
    parser.add_argument("--baseline", type=Path, default=BASELINE)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--worker", nargs=2, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.modules, given.baseline, *given.worker, given.all)
        return 0
    baseline = read_baseline(given.baseline)

    def entry(row: dict) -> dict | None:
        return baseline.get(row["triton"], {}).get(row["kernel"], {}).get(str(row["sm"]))

    def show(row: dict) -> None:
        print(line(row, faults(row, entry(row)), entry(row) is not None), flush=True)

    with ThreadPoolExecutor(given.workers) as pool:
        parts = pool.map(lambda first: share(given.modules, given.baseline, first, given.workers, given.all, show), range(given.workers))
        rows = [row for part in parts for row in part]
    if not rows:
        raise SystemExit(f"nothing to compile in {' '.join(given.modules)}")
    failed = [row for row in rows if faults(row, entry(row))]
    version = rows[0]["triton"]
    gone = sorted(set(baseline.get(version, {})) - {row["kernel"] for row in rows}) if given.modules == MODULES else []
    print(f"{len(rows)} builds with Triton {version}, {sum(row['compiled'] for row in rows)} compiled: {len(failed)} failed, "
          f"{sum(entry(row) is None for row in rows)} without a baseline" + f"; built no more: {', '.join(gone)}" * bool(gone))
    if failed:
        print("failed: " + "; ".join(f"{row['kernel']} sm_{row['sm']}" for row in failed))
    if given.write:
        if any(row.get("error") for row in rows):
            raise SystemExit(f"{given.baseline} stays as it was: it is written when every build compiles")
        write_baseline(rows, baseline, given.baseline)
        print(f"wrote {given.baseline}")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
