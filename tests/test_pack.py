import json
import random

import numpy as np
import pytest
import torch
from conftest import BASE, small_model

from data.pack import collate, main, pack, show, shuffled, step_trees
from data.tokenizer import load_tokenizer
from data.trees import CHOSEN, REJECTED, Response, Tree, trees_of
from kernels.logprobs import linear_logprobs


def ids(*values):
    return np.array(values, np.int32)


def preference_trees(records, tokenizer, template):
    tokenizer.adopt(template)
    return trees_of(records, "preference", tokenizer)


def drawn_tree() -> Tree:
    """The tree in the module's drawing: u1 u1 w1 w1 e u2 u2 w2 w2 e, l1 l1 e after 2 tokens, l2 e after 7."""
    responses = [Response(0, 2, 5, 0, CHOSEN, 1), Response(1, 0, 3, 0, REJECTED, 1),
                 Response(0, 7, 10, 1, CHOSEN, 2), Response(2, 0, 2, 1, REJECTED, 2)]
    return Tree(ids(*range(10)), [(2, ids(10, 11, 12)), (7, ids(13, 14))], responses)


def random_tree(rng, record=0) -> Tree:
    """A dialogue of one to four turns, each rated or not."""
    trunk, leaves, responses = [], [], []
    for turn in range(1, rng.randint(1, 4) + 1):
        trunk += [rng.randrange(40) for _ in range(rng.randint(1, 6))]
        begin = len(trunk)
        trunk += [rng.randrange(40) for _ in range(rng.randint(1, 8))]
        if turn == 1 or rng.random() < 0.7:
            pair = len(leaves)
            leaves.append((begin, ids(*(rng.randrange(40) for _ in range(rng.randint(1, 8))))))
            responses.append(Response(0, begin, len(trunk), pair, CHOSEN, turn, 1.0 + turn))
            responses.append(Response(len(leaves), 0, len(leaves[-1][1]), pair, REJECTED, turn, 1.0 + turn))
    return Tree(ids(*trunk), leaves, responses, record)


def paths(tree: Tree) -> list[tuple[np.ndarray, int, int]]:
    """Each response on its own: (tokens from the first to its last, where it begins, its side)."""
    for r in tree.responses:
        prefix, leaf = (0, tree.trunk) if r.segment == 0 else tree.leaves[r.segment - 1]
        yield np.concatenate([tree.trunk[:prefix], leaf[: r.end]]), prefix + r.start, r.side


def rated(turns: int) -> list[dict]:
    """A dialogue rated at every turn, as the records a rating page writes."""
    history, records = [], []
    for i in range(turns):
        history = [*history, {"role": "user", "content": f"Name {i} fruits."}]
        records.append({"prompt": history, "chosen": f"Good reply {i}.", "rejected": f"Bad reply {i}, sorry.",
                        "margin": i + 1})
        history = [*history, {"role": "assistant", "content": records[-1]["chosen"]}]
    return records


def sums_alone(model, tree: Tree) -> torch.Tensor:
    alone = [Tree(tokens, [], [Response(0, begin, len(tokens))]) for tokens, begin, _ in paths(tree)]
    return torch.cat([sums_of(model, [t]) for t in alone])


def sums_of(model, trees) -> torch.Tensor:
    batch = collate(trees)
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)
    return batch.sums(linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)[0])


# ------------------------------------------------------------------------------------- the layout

def test_the_drawn_tree_has_the_drawn_layout():
    batch = collate([drawn_tree()])
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 2, 3, 4, 7, 8]
    assert batch.previous.tolist() == [-1, 0, 1, 2, 3, 4, 5, 6, 7, 8, 1, 10, 11, 6, 13]
    assert batch.layout.prefix.tolist() == [0, 2, 7] and batch.layout.start.tolist() == [0, 10, 13]
    spans = [batch.response_index[batch.owner == r].tolist() for r in range(4)]
    assert spans == [[2, 3, 4], [10, 11, 12], [7, 8, 9], [13, 14]]
    assert batch.pairs == 2 and batch.side.tolist() == [CHOSEN, REJECTED, CHOSEN, REJECTED]
    assert batch.turn.tolist() == [1, 1, 2, 2]
    chosen, rejected = batch.sides(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    assert chosen.tolist() == [1, 3] and rejected.tolist() == [2, 4]


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("window", [None, 5])
def test_a_tree_equals_its_paths_one_by_one(seed, window):
    """Log-probability sums and their gradients, in fp32 to 1e-5 of the largest."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    trees = [random_tree(rng) for _ in range(3)]
    model = small_model(window=window, dtype=torch.float32, scale=5.0)
    upstream = torch.randn(sum(len(t.responses) for t in trees))
    together = sums_of(model, trees)
    alone = torch.cat([sums_alone(model, t) for t in trees])
    assert torch.allclose(together, alone, rtol=1e-5, atol=1e-5)
    grads = (torch.autograd.grad((s * upstream).sum(), list(model.parameters())) for s in (together, alone))
    for a, b in zip(*grads, strict=True):
        assert (a - b).abs().max() <= 1e-5 * max(1, b.abs().max())


def test_changing_one_leaf_changes_no_other_response_at_all():
    model = small_model(dtype=torch.float32)
    tree, other = drawn_tree(), drawn_tree()
    other.leaves[0] = (2, ids(30, 31, 32))
    with torch.no_grad():
        before, after = sums_of(model, [tree]), sums_of(model, [other])
    assert torch.equal(before[[0, 2, 3]], after[[0, 2, 3]]) and before[1] != after[1]


# ---------------------------------------------------------------------------------------- packing

def test_packing_loses_no_token_and_keeps_the_budget():
    rng = random.Random(0)
    trees = [random_tree(rng, i) for i in range(200)]
    batches = pack(trees, 150)
    assert all(len(b.tokens) <= 150 for b in batches)
    assert sorted(t.record for b in batches for t in b.trees) == list(range(200))
    everything = np.concatenate([x for t in trees for x in (t.trunk, *(leaf for _, leaf in t.leaves))])
    assert sorted(torch.cat([b.tokens for b in batches]).tolist()) == sorted(everything.tolist())
    assert sum(len(b.owner) for b in batches) == sum(r.end - r.start for t in trees for r in t.responses)


def test_a_tree_larger_than_the_budget_travels_alone():
    assert [len(b.trees) for b in pack([drawn_tree(), drawn_tree()], 5)] == [1, 1]


def test_packed_equals_unpacked():
    rng = random.Random(1)
    trees = [random_tree(rng, i) for i in range(20)]
    model = small_model()
    for batch in pack(trees, 120):
        together = sums_of(model, batch.trees).split([len(t.responses) for t in batch.trees])
        for tree, packed in zip(batch.trees, together, strict=True):
            assert torch.allclose(packed, sums_of(model, [tree]), atol=1e-10)


def test_the_order_is_a_function_of_seed_and_epoch():
    assert np.array_equal(shuffled(100, 1, 0), shuffled(100, 1, 0))
    assert not np.array_equal(shuffled(100, 1, 0), shuffled(100, 1, 1))
    assert not np.array_equal(shuffled(100, 1, 0), shuffled(100, 2, 0))
    trees = [drawn_tree() for _ in range(10)]
    seen = [id(t) for step in range(4) for t in step_trees(trees, 3, step, seed=0)]
    assert sorted(seen) == sorted(map(id, trees))
    assert seen != [id(t) for step in range(4, 8) for t in step_trees(trees, 3, step, seed=0)]


# -------------------------------------------------------------------------------------- the viewer

def test_the_viewer_prints_every_token_with_loss_and_branch(tmp_path, capsys, monkeypatch):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rated(2)))
    monkeypatch.setattr("sys.argv", ["pack", str(file), "--show", "1", "--tokenizer", str(BASE)])
    main()
    said = capsys.readouterr().out
    assert "1 trees, 2 leaves" in said and "leaf 1, branches after" in said and "rejected, turn 2, margin 2" in said
    tree = preference_trees(rated(2), load_tokenizer(BASE), "zephyr")[0]
    rows = [line for line in show(tree, load_tokenizer(BASE)).splitlines() if line.split()[0].isdigit()]
    assert len(rows) == tree.tokens
    monkeypatch.setattr("sys.argv", ["pack", str(file), "--tokenizer", str(BASE), "--template", "chatml",
                                     "--max-length", "26"])
    main()
    assert "chosen, turn 1, margin 1, cut" in capsys.readouterr().out


def test_the_viewer_names_every_rank(tmp_path, capsys, monkeypatch):
    file = tmp_path / "ranking.jsonl"
    ranking = {"prompt": "Hi", "answers": ["Hello!", "Hm.", "What."], "ranks": [0, 1, 2]}
    file.write_text(json.dumps(ranking) + "\n")
    monkeypatch.setattr("sys.argv", ["pack", str(file), "--tokenizer", str(BASE)])
    main()
    said = capsys.readouterr().out
    assert all(f"rank {rank}, turn 1" in said for rank in (0, 1, 2))
