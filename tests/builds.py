"""Every kernel as it is shipped, in bf16 for models of 7 B, with its types and constants: what `aot.py` compiles."""
from aot import Build

from kernels import attention, decode, fused, logprobs, nf4


def builds(sm: int) -> list[Build]:
    """All kernels for sm_80, sm_90 or sm_100."""
    return [*attention_builds(sm), *decode_builds(), *fused_builds(sm), *logprobs_builds(sm), *nf4_builds(sm)]


def attention_builds(sm: int) -> list[Build]:
    """32 query and 8 KV heads; on sm_90 also fp32."""
    masks = ((0, 0.0), (4096, 0.0), (0, 30.0))
    variants = [(width, window, softcap, "bf16") for width in attention.CONFIGS[sm] for window, softcap in masks]
    variants += [(128, 0, 0.0, "fp32")] * (sm == 90)
    found = []
    for width, window, softcap, dtype in variants:
        variant = f"E {width}" + ", window" * bool(window) + ", softcap" * bool(softcap) + ", fp32" * (dtype == "fp32")
        shape = {"H": 32, "K": 8, "E": width, "WIDTH": width, "WINDOW": window, "SOFTCAP": softcap}
        inputs = dict.fromkeys(("q", "k", "v"), "*" + dtype) | dict.fromkeys(("table", "tiles"), "*i32")
        inputs |= {"N": "i32", "scale": "fp32"}
        upstream = {"dout": "*" + dtype, "lse": "*fp32", "delta": "*fp32"}
        kernels = (("forward", attention._forward, {"out": "*" + dtype, "lse": "*fp32"}),
                   ("dQ", attention._dq, upstream | {"out": "*" + dtype, "dq_out": "*" + dtype}),
                   ("dK dV", attention._dkdv, upstream | {"dk_out": "*" + dtype, "dv_out": "*" + dtype,
                                                          "part_heads": "i32", "size": "i32:16"}))
        configs = attention.CONFIG_FP32 if dtype == "fp32" else attention.tile_sizes(sm, width, softcap)
        for (name, kernel, added), (queries, keys, warps, stages, tma) in zip(kernels, configs, strict=True):
            arguments = inputs | added | shape | {"QUERIES": queries, "KEYS": keys, "TMA": tma}
            rows, tiled = (queries, ("q", "dout")) if name == "dK dV" else (keys, ("tiles_k", "tiles_v"))
            arguments |= dict.fromkeys(tiled, f"tensordesc<{dtype}[{rows}, {width}]>" if tma else "*" + dtype)
            found.append(Build(f"attention {name}, {variant}", kernel, arguments, warps, stages, dtype == "bf16"))
        if dtype == "bf16" and (sm, width) in attention.TRUNKS:
            queries, keys, warps, stages = attention.TRUNKS[sm, width]
            values = inputs | kernels[0][2] | shape | {"QUERIES": queries, "KEYS": keys}
            arguments = {argument: values[argument] for argument in attention._forward_trunk.arg_names}
            found.append(Build(f"attention forward of trunks, {variant}", attention._forward_trunk, arguments, warps,
                               stages, matmul=True))
    return found


def decode_builds() -> list[Build]:
    """32 query and 8 KV heads."""
    found = []
    for width in (64, 128, 256):
        for window, parts in ((0, 8), (4096, 8), (0, 1)):
            arguments = dict.fromkeys(("q", "k", "v"), "*bf16") | {"seen": "*i64", "partial": "*fp32", "scale": "fp32"}
            arguments |= {f"{x}_{stride}": "i32:16" for x in "kv" for stride in ("batch", "head", "row")}
            arguments |= {"K": 8, "G": 4, "GROUP": 16, "E": width, "WIDTH": width, "WINDOW": window,
                          "PARTS": parts, "PART": decode.PART, "KEYS": decode.KEYS}
            arguments |= {"partial": "*bf16"} if parts == 1 else {}
            name = f"decode part, E {width}" + ", window" * bool(window) + ", alone" * (parts == 1)
            found.append(Build(name, decode._part, arguments, decode.WARPS, decode.STAGES[2], wide=True))
        arguments = {"partial": "*fp32", "out": "*bf16", "E": width, "WIDTH": width, "PARTS": 8}
        found.append(Build(f"decode merge, E {width}", decode._merge, arguments, 4, 1))
    return found


def fused_builds(sm: int) -> list[Build]:
    """A model 4096 wide with heads of 128; weights of norms in fp32."""
    tile = fused.CONFIGS[sm]["tile"]
    norm = {"x": "*bf16", "weight": "*fp32", "count": "i32", "width": "i32:16", "eps": "fp32"}
    norm_back = norm | {"g": "*bf16", "dx": "*bf16", "parts": "*fp32"}
    head = {"x": "*bf16", "cos": "*bf16", "sin": "*bf16", "y": "*bf16", "count": "i32:16", "heads": "i32:16",
            "WIDTH": 128, "ROWS": tile // 128, "COLUMNS": 64}
    values = {"gate": "*bf16", "up": "*bf16", "count": "i32:16", "SIZE": tile}
    values_back = values | {"g": "*bf16", "dgate": "*bf16", "dup": "*bf16"}
    kernels = []
    for width in (4096, 128):  # of the model, and of queries and keys that are normalised
        size = {"ROWS": tile // width, "COLUMNS": width}
        kernels += [(f"rms_norm forward, {width}", fused._norm_kernel, norm | {"y": "*bf16"} | size),
                    (f"rms_norm backward, {width}", fused._norm_backward_kernel, norm_back | size)]
    kernels += [("rotary forward", fused._rotary_kernel, head | {"BACK": False}),
                ("rotary backward", fused._rotary_kernel, head | {"BACK": True}),
                ("swiglu forward", fused._swiglu_kernel, values | {"y": "*bf16"}),
                ("swiglu backward", fused._swiglu_backward_kernel, values_back)]
    return [Build(name, kernel, arguments, tile // 512, 1, wide=True) for name, kernel, arguments in kernels]


def logprobs_builds(sm: int) -> list[Build]:
    """bf16, and fp32 in its smaller tiles."""
    found = []
    known = dict.fromkeys(("V", "D", "stride", "kept_stride"), "i32:16") | {"M": "i32", "parts": "i32", "scale": "fp32"}
    known |= {"targets": "*i64", "GROUP": logprobs.GROUP}
    known |= dict.fromkeys(("partials", "logits", "logprobs", "lse", "entropies", "g", "g_entropy", "peaks"), "*fp32")
    variants = (("bf16", logprobs.CONFIGS[sm], 0.0), ("bf16", logprobs.CONFIGS[sm], 30.0),
                ("fp32", logprobs.FLOAT32, 30.0))
    for entropy in (False, True):
        suffix = ", entropy" * entropy
        kernels = [(f"combine{suffix}", logprobs._combine, logprobs.COMBINE, "fp32", 0.0)]
        for dtype, config, softcap in variants:
            name = f"{dtype}{suffix}" + ", softcap" * bool(softcap)
            tiles = logprobs._tiles(config, softcap)
            kinds = (("forward", logprobs._forward, {"KEEP": False, "kept": None, "peaks": None}),
                     ("forward, kept", logprobs._forward, logprobs._keeping(tiles) | {"KEEP": True}),
                     ("dz", logprobs._dz, {}), ("dz, kept", logprobs._kept_dz, logprobs.ERROR))
            for kind, kernel, more in kinds:
                if not kind.endswith("kept") or dtype == "bf16" and logprobs.KEPT_BYTES[sm]:
                    kernels.append((f"{kind}, {name}", kernel, tiles | more, dtype, softcap))
        for name, kernel, tiles, dtype, softcap in kernels:
            values = known | dict.fromkeys(("hidden", "weight", "dz", "kept"), f"*{dtype}") | tiles
            values |= {"ENTROPY": entropy, "SOFTCAP": softcap}
            arguments = {key: values[key] for key in kernel.arg_names}
            matmul = dtype == "bf16" and kernel is not logprobs._kept_dz
            found.append(Build(f"logprobs {name}", kernel, arguments, tiles["num_warps"], tiles["num_stages"], matmul,
                               wide=kernel is logprobs._kept_dz))
    return found


def nf4_builds(sm: int) -> list[Build]:
    """Single and double quantisation."""
    configs = nf4.CONFIGS[sm]
    (size, warps), sizes = configs["quantize"], {"count": "i32:16", "blocks": "i32:16"}
    arguments = sizes | {"weight": "*bf16", "midpoints": "*fp32", "codes": "*u8", "scales": "*fp32", "TINY": nf4.TINY,
                         "BLOCK": 64, "BLOCKS": size // 64}
    found = [Build("nf4 quantize", nf4._quantize_kernel, arguments, warps, 1, wide=True)]
    single = {"codes": "*u8", "scales": "*fp32", "scales2": None, "offset": None, "floats": None, "levels": "*fp32",
              "BLOCK": 64}
    double = single | {"scales": "*u8", "scales2": "*fp32", "offset": "*fp32", "floats": "*fp32"}
    for name, packed in (("single", single), ("double", double)):
        size, warps = configs["dequantize"]
        arguments = packed | sizes | {"out": "*bf16", "BLOCKS": size // 64}
        found.append(Build(f"nf4 dequantize, {name}", nf4._dequantize_kernel, arguments, warps, 1, wide=True,
                           fusion=False))
        for m, (n, k, warps, stages) in configs["linear"].items():
            arguments = packed | dict.fromkeys(("outputs", "inputs", "part_inputs"), "i32:16") | {
                "x": "*bf16", "out": "*fp32" if m == 16 else "*bf16", "rows": "i32", "M": m, "N": n, "K": k}
            matmul = n >= 64 or sm == 80  # smaller tiles use the matrix units of sm_80, which later GPUs still have
            found.append(Build(f"nf4 linear, {name}, {m} rows", nf4._linear_kernel, arguments, warps, stages, matmul,
                               wide=True, fusion=False))
    arguments = {"partial": "*fp32", "out": "*bf16", "count": "i32:16", "parts": "i32", "SIZE": nf4.SUM}
    return [*found, Build("nf4 sum", nf4._sum_kernel, arguments, 4, 1, wide=True)]
