"""The Triton attention against the PyTorch one in float64: on a GPU where there is one, else interpreted."""
import pytest
import torch
from interpreter import DEVICE, close, guarded, intact, strict

import kernels
import kernels.attention as kernel
import kernels.decode as decode
from kernels import launch
from kernels.attention import attention
from kernels.decode import decode_attention, decode_reference
from kernels.layout import Layout

TOLERANCE = {torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 1.5e-2}
SMALL, SMALL_KEYS = (16, 32, 4, 1, True), (32, 16, 4, 1, True)  # queries, keys, warps, stages, TMA

PLAIN = {
    "one token": [1],
    "around a tile's edge": [1, 2, 15, 16, 17, 31, 33],
    "around 64 and 128": [64, 65, 127],
    "two tiles and one token": [129],
}
TREES = {  # lengths, trunks, prefixes
    "a leaf after the first token": ([40, 20], [0, 0], [1]),
    "a leaf that sees nothing of its trunk": ([40, 70], [0, 0], [0]),
    "leaves mid-tile, at a tile's edge and at the end": ([48, 5, 33, 17], [0] * 4, [21, 32, 48]),
    "two trees and a plain sequence": ([20, 18, 3, 37, 50, 16], [0, 0, 2, 3, 3, 5], [7, 50 - 13]),
}


def layout_of(lengths, trunks=None, prefixes=()):
    """Prefixes are given for the leaves only."""
    if trunks is None:
        return Layout.build(lengths)
    rest = iter(prefixes)
    found = [0 if s == trunk else min(next(rest), lengths[trunk]) for s, trunk in enumerate(trunks)]
    return Layout.build(lengths, trunks, found)


def draw(layout, heads, kv_heads, width, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(layout.tokens, h, width) for h in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]  # q, k, v, upstream


def check(layout, heads=2, kv_heads=1, width=16, dtype=torch.float32, inputs=None, tolerance=None, **options):
    """Output and gradients of both versions; returns what Triton found."""
    given = inputs or draw(layout, heads, kv_heads, width, dtype)
    q, k, v, upstream = (guarded(x.to(DEVICE)) for x in given)
    for x in (q, k, v):
        x.requires_grad_()
    kernels.use("triton")
    try:
        out = attention(q, k, v, layout.to(DEVICE), **options)
        found = [out, *torch.autograd.grad(out, (q, k, v), upstream)]
    finally:
        kernels.use("auto")
    wide = [x.double().requires_grad_() for x in given[:3]]
    truth = attention(*wide, layout, **options)
    truths = [truth, *torch.autograd.grad(truth, wide, given[3].double())]
    for ours, right in zip(found, truths, strict=True):
        close(ours.cpu(), right, tolerance or TOLERANCE[given[0].dtype])
    assert all(intact(x) for x in (q, k, v, upstream))
    return found


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(kernel, "CONFIGS", {90: {256: (SMALL, SMALL, SMALL_KEYS)}})
    monkeypatch.setattr(kernel, "CONFIG_FP32", (SMALL, SMALL, SMALL_KEYS))
    if DEVICE == "cuda":
        monkeypatch.setattr(kernel, "architecture", lambda device: 90)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*PLAIN, *TREES])
def test_output_and_gradients_equal_pytorch_in_float64(small_tiles, name, dtype):
    layout = Layout.build(PLAIN[name]) if name in PLAIN else layout_of(*TREES[name])
    check(layout, dtype=dtype)


@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(1, 1, 32), (4, 2, 40), (4, 1, 16), (8, 1, 8), (6, 3, 24)])
def test_groups_of_heads_and_widths_that_are_no_power_of_two(small_tiles, heads, kv_heads, width):
    check(layout_of(*TREES["a leaf after the first token"]), heads, kv_heads, width)


@pytest.mark.parametrize("window", [1, 9, 40, 1000])
def test_windows(small_tiles, window):
    check(layout_of(*TREES["leaves mid-tile, at a tile's edge and at the end"]), 1, 1, window=window)


def test_a_window_over_plain_sequences(small_tiles):
    check(Layout.build(PLAIN["around a tile's edge"]), window=9)


def test_softcap_and_scale(small_tiles):
    layout = layout_of(*TREES["a leaf after the first token"])
    check(layout, softcap=5.0, scale=1.0)
    check(layout, softcap=2.0, window=9)


def test_forty_leaves_on_one_trunk(small_tiles):
    """What the trunk's keys meet is divided among programs, whose sums are added in order: twice the same bits."""
    lengths = [70, *[1 + i % 5 for i in range(40)]]
    layout = layout_of(lengths, [0] * 41, [1 + (7 * i) % 70 for i in range(40)])
    tiles, shared = kernel.key_tile_list(layout, 32, None, 1)
    assert len(tiles) > 40 + 3 and len(shared) > 1
    first, second = check(layout, 1, 1), check(layout, 1, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("programs, window", [(8, None), (50, None), (1000, None), (1000, 9)])
def test_every_reader_of_every_tile_of_keys_is_listed_once(monkeypatch, programs, window):
    """A trunk of 40 with 5 leaves, one of which branches at once, and a plain sequence; tiles of 16 keys."""
    monkeypatch.setattr(kernel, "PROGRAMS", programs)
    layout = layout_of([40, 9, 30, 1, 7, 12, 20], [0] * 6 + [6], [1, 16, 40, 33, 2])
    tiles, shared = kernel.key_tile_list(layout, 16, window, 2)
    readers, rows = {}, []
    for segment, first, a, b, row in tiles.tolist():
        readers.setdefault((segment, first), []).append(range(a, min(b, layout.last_child[segment])))
        rows += range(row, row + min(16, layout.lengths[segment] - first))
    for (segment, _), parts in readers.items():
        assert sorted(r for part in parts for r in part) == [segment, *range(segment + 1, layout.last_child[segment])]
    assert len(readers) == 3 + 1 + 2 + 1 + 1 + 1 + 2
    assert sorted(rows) == [*range(layout.tokens + sum(map(len, shared)))]  # each output row has one writer
    assert all(len(set(tokens.tolist())) == len(tokens) for tokens in shared) and bool(shared) == (programs > 8)


def test_a_split_trunk_reads_and_writes_as_an_unsplit_one(small_tiles, monkeypatch):
    layout = layout_of([20, 18, 3, 37, 25, 50, 16], [0, 0, 0, 0, 0, 5, 5], [7, 20, 1, 16, 13])
    monkeypatch.setattr(kernel, "PROGRAMS", 1000)
    assert kernel.key_tile_list(layout, 32, None, 1)[1]
    with strict():
        check(layout, 2, 1, 24)
        check(layout, 2, 1, 24, window=9)


@pytest.mark.parametrize("window", [None, 9])
@pytest.mark.parametrize("name", TREES)
def test_pointers_load_what_tensor_descriptors_do(small_tiles, monkeypatch, name, window):
    """The same bits. sm_80 takes pointers, and so do heads whose width is no power of two."""
    by_descriptors = check(layout_of(*TREES[name]), window=window)
    monkeypatch.setattr(kernel, "CONFIG_FP32", tuple((*tile[:-1], False) for tile in kernel.CONFIG_FP32))
    monkeypatch.setattr(kernel, "descriptor", None)  # not called
    by_pointers = check(layout_of(*TREES[name]), window=window)
    assert all(torch.equal(a, b) for a, b in zip(by_descriptors, by_pointers, strict=True))


@pytest.fixture
def special_trunks(small_tiles, monkeypatch):
    """Trunks by the kernel for specialised warps, in tiles unlike those of leaves."""
    monkeypatch.setattr(kernel, "SPECIALISED", True)
    monkeypatch.setattr(kernel, "TRUNKS", {(90, 16): (32, 16, 4, 1)})


@pytest.mark.parametrize("options", [{}, {"window": 9}, {"softcap": 2.0}])
@pytest.mark.parametrize("name", ["around a tile's edge", "two trees and a plain sequence"])
def test_the_forward_of_trunks_with_specialised_warps(special_trunks, name, options):
    with strict():
        check(Layout.build(PLAIN[name]) if name in PLAIN else layout_of(*TREES[name]), **options)


def test_fp16(small_tiles):
    check(layout_of(*TREES["a leaf after the first token"]), dtype=torch.float16)


@pytest.mark.parametrize("width", [64, 128])
def test_the_shipped_tiles(width):
    """At least two tiles of queries and of keys, whole blocks before the diagonal, and a leaf."""
    check(layout_of([270, 140], [0, 0], [131]), 1, 1, width, torch.bfloat16)


def test_the_shipped_tiles_of_the_widest_heads_and_of_fp32():
    check(Layout.build([130]), 1, 1, 256, torch.bfloat16)
    check(Layout.build([70]), 1, 1, 64)


def test_704_tokens():
    """64 past a multiple of 128 with very negative scores: where a library's backward gives NaN."""
    layout = Layout.build([704])
    q, k, v, upstream = draw(layout, 1, 1, 64, torch.float16)
    q[..., 0], k[..., 0] = 31.0, -31.0  # every score near -120
    check(layout, inputs=[q, k, v, upstream])


@pytest.mark.parametrize("shift", [-120.0, 200.0])
def test_extreme_scores(small_tiles, shift):
    layout = layout_of(*TREES["a leaf after the first token"])
    q, k, v, upstream = draw(layout, 2, 1, 16, torch.float32)
    root = (abs(shift) * 4) ** 0.5
    q[..., 0], k[..., 0] = root, root if shift > 0 else -root
    # A score of 200 in fp32 is off by up to 1.5e-5, and so is every probability, relatively.
    check(layout, inputs=[q, k, v, upstream], tolerance=2e-5)


@pytest.mark.parametrize("window", [None, 9])
def test_nothing_is_read_or_written_outside_and_by_one_program_only(small_tiles, window):
    with strict():
        check(layout_of(*TREES["two trees and a plain sequence"]), 2, 1, 24, window=window)


@pytest.mark.parametrize("tiles", ["small_tiles", "special_trunks"])
def test_nan_in_one_segment_reaches_no_other(request, tiles, on_triton):
    request.getfixturevalue(tiles)
    layout = layout_of([5, 3, 40, 2], [0, 0, 2, 2], [2, 39]).to(DEVICE)
    q, k, v, upstream = (x.to(DEVICE).requires_grad_() for x in draw(layout, 2, 1, 16, torch.float32))
    with torch.no_grad():
        for x in (q, k, v):
            x[5:8] = torch.nan  # the leaf of the first tree
    out = attention(q, k, v, layout)
    assert torch.isfinite(out[:5]).all() and torch.isfinite(out[8:]).all() and torch.isnan(out[5:8]).all()
    for gradient in torch.autograd.grad(out, (q, k, v), upstream):
        assert torch.isfinite(gradient[8:]).all()


def test_a_tree_equals_its_paths_one_by_one(small_tiles, on_triton):
    lengths, trunks, prefixes = [37, 18, 20, 33, 5], [0, 0, 0, 3, 3], [0, 9, 37, 0, 32]
    layout = Layout.build(lengths, trunks, prefixes)
    given = [x.to(DEVICE) for x in draw(layout, 1, 1, 16, torch.float32)]
    q, k, v = (x.clone().requires_grad_() for x in given[:3])
    out = attention(q, k, v, layout.to(DEVICE))
    starts = layout.start.tolist()
    paths = [[*range(starts[t], starts[t] + prefix), *range(starts[s], starts[s] + lengths[s])]
             for s, (t, prefix) in enumerate(zip(trunks, prefixes, strict=True))]
    q2, k2, v2 = (x.clone().requires_grad_() for x in given[:3])
    total = 0
    for s, path in enumerate(paths):
        alone = attention(q2[path], k2[path], v2[path], Layout.build([len(path)]).to(DEVICE))[-lengths[s]:]
        torch.testing.assert_close(out[path[-lengths[s]:]], alone, atol=1e-5, rtol=1e-5)
        total = total + (alone * given[3][path[-lengths[s]:]]).sum()
    gradients = torch.autograd.grad(out, (q, k, v), given[3])
    for ours, theirs in zip(gradients, torch.autograd.grad(total, (q2, k2, v2)), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_twice_the_same_bits(small_tiles):
    layout = layout_of(*TREES["a leaf after the first token"])
    first, second = check(layout), check(layout)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_heads_wider_than_any_tile_are_refused(on_triton):
    q = torch.zeros(3, 1, 300, device=DEVICE)
    with pytest.raises(ValueError, match="300 wide"):
        attention(q, q, q, Layout.build([3]).to(DEVICE))


# ------------------------------------------------------------------------------------------ decoding

@pytest.mark.parametrize("window", [None, 1, 40])
@pytest.mark.parametrize(("batch", "heads", "kv_heads", "width", "room", "dtype"), [
    (3, 4, 2, 16, 90, torch.float32), (1, 8, 1, 40, 300, torch.float32), (2, 2, 2, 32, 64, torch.bfloat16),
    (2, 40, 2, 16, 70, torch.float32), (3, 4, 2, 16, 33, torch.float32), (2, 4, 2, 24, 30, torch.bfloat16)])
def test_decoding_equals_pytorch_in_float64(monkeypatch, window, batch, heads, kv_heads, width, room, dtype):
    monkeypatch.setattr(decode, "PART", 32)  # rooms of 33 are cut in two parts, of 30 not at all
    monkeypatch.setattr(decode, "KEYS", 16)
    seen = torch.tensor([room, 1, 33][:batch])
    cache = (batch, kv_heads, room, width)
    q, k, v = (torch.randn(shape).to(dtype) for shape in ((batch, heads, width), cache, cache))
    for row, count in enumerate(seen.tolist()):
        k[row, :, count:], v[row, :, count:] = torch.nan, torch.nan  # what is not seen is not read
    given = [guarded(x.to(DEVICE)) for x in (q, k, v)]
    kernels.use("triton")
    try:
        with strict():
            found = decode_attention(*given, seen.to(DEVICE), window)
    finally:
        kernels.use("auto")
    truth = decode_reference(q.double(), *(x.nan_to_num(0.0).double() for x in (k, v)), seen, window)
    close(found.cpu(), truth, TOLERANCE[dtype])
    assert all(intact(x) for x in given)


@pytest.mark.parametrize(("window", "counts"), [(0, [16, 16, 16, 12]), (30, [16, 14, 0, 0])])
def test_decoding_cuts_what_is_seen_not_the_cache(on_triton, window, counts):
    """60 of 400 tokens, or the last 30, in four parts of 16 or more: with scores 0 a part's l is its number of keys."""
    q, cache = torch.zeros(1, 1, 16, device=DEVICE), torch.zeros(1, 1, 400, 16, device=DEVICE)
    partial = torch.empty(1, 1, 4, 18, device=DEVICE)
    launch(decode._part, (1, 4), q, cache, cache, torch.tensor([60], device=DEVICE), partial, 1.0, *cache.stride()[:3],
           *cache.stride()[:3], K=1, G=1, GROUP=16, E=16, WIDTH=16, WINDOW=window, PARTS=4, PART=16, KEYS=16)
    assert partial[0, 0, :, 17].tolist() == counts


def test_decoding_with_the_shipped_tiles(on_triton):
    seen = torch.tensor([600, 257])
    q, k, v = torch.randn(2, 4, 64), torch.randn(2, 2, 600, 64), torch.randn(2, 2, 600, 64)
    found = decode_attention(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), seen.to(DEVICE))
    close(found.cpu(), decode_reference(q.double(), k.double(), v.double(), seen), 2e-6)
