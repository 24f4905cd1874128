"""benchmarks/peers.py compares like with like: our steps and the one written by hand compute the same losses."""
import math

import pytest

from benchmarks import peers_ours, peers_work
from checkpoints import load_model, save_model
from data.trees import Response, Tree

SHAPE = peers_work.Shape(width=32, layers=2, heads=2, mlp_width=48, vocab=64, longest=48, prompt=8, reply=10, batch=4,
                         micro_tokens=64)
GROUPED = SHAPE._replace(heads=4, kv_heads=2)


def sft_trees():
    return [peers_ours.sft_tree(pair) for pair in peers_work.pairs(SHAPE)]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    model = peers_ours.random_model(GROUPED._replace(longest=64))
    for parameter in model.parameters():
        parameter.data.mul_(4)
    folder = tmp_path_factory.mktemp("peers") / "model"
    save_model(model, folder)
    return str(folder)


def test_three_steps_of_sft_are_those_of_the_step_written_by_hand(path, monkeypatch):
    monkeypatch.setattr(peers_work, "LR", 1e-3)
    ours = peers_ours.sft_step(load_model(path), SHAPE, sft_trees())
    by_hand = peers_ours.floor_step(load_model(path), GROUPED, "sft")
    for _ in range(3):
        a, b = ours(), by_hand()
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5) and (a["units"], a["items"]) == (b["units"], b["items"])


def test_dpo_begins_at_log_2_whether_the_reference_is_cached_or_not_and_the_tree_holds_every_turn_once(path):
    dialogues = peers_work.dialogues(SHAPE)
    trees = [peers_ours.pair_tree(turns) for turns in dialogues]
    for cached in (True, False):
        found = peers_ours.dpo_step(load_model(path), SHAPE, trees, path, cached)()
        assert found["loss"] == pytest.approx(math.log(2), abs=1e-6) and found["items"] == 4
    for tree, turns in zip(trees, dialogues, strict=True):
        assert tree.pairs == peers_work.TURNS
        assert tree.tokens == len(turns[-1].prompt + turns[-1].chosen) + sum(len(turn.rejected) for turn in turns)
        assert max(len(turn.prompt + reply) for turn in turns for reply in turn[1:]) <= SHAPE.longest


def test_a_rollout_counts_its_replies(path):
    found = peers_ours.rloo_step(load_model(path), SHAPE, path)()
    assert found["units"] == peers_work.RL_PROMPTS * peers_work.RL_REPLIES and found["updating_s"] > 0


def test_sampling_makes_the_tokens_it_counts(path, monkeypatch):
    monkeypatch.setattr(peers_work, "MIXED", 12)
    for words, tokens in (("3 top_p", 3 * peers_work.NEW), ("3 greedy", 3 * peers_work.NEW),
                          ("mixed", sum(peers_work.reply_lengths()))):
        prompts, limits, slots, settings = peers_work.sampling(SHAPE, *words.split())
        step = peers_ours.sampling_step(load_model(path), prompts, limits, slots, **settings)
        assert step()["units"] == sum(limits) == tokens


def test_operations_are_those_counted_by_hand():
    shape = SHAPE._replace(layers=1, kv_heads=1)  # 32 wide, 2 heads of 16, one of keys, MLP 48, 64 tokens
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48
    assert shape.operations(tokens=10, targets=4, seen=30) == 3 * (2 * 10 * block + 2 * 4 * 32 * 64 + 2 * 2 * 30 * 32)
    tree = Tree(list(range(5)), [(3, [7, 8])], [Response(0, 3, 5), Response(1, 0, 2)])
    assert peers_ours.seen(tree) == (1 + 2 + 3 + 4 + 5) + (4 + 5)  # each leaf token sees the first 3 of the trunk


def test_a_step_as_a_gpu_does_it_is_the_same_work(path):
    """bf16 activations and checkpointing, on the CPU."""
    as_gpu = SHAPE._replace(dtype="bfloat16", checkpointing=True)
    trees = [peers_ours.pair_tree([pair]) for pair in peers_work.pairs(SHAPE)]
    for make in (lambda shape: peers_ours.sft_step(peers_ours.load(path, shape), shape, sft_trees()),
                 lambda shape: peers_ours.dpo_step(peers_ours.load(path, shape), shape, trees, path, True)):
        plain, other = make(SHAPE)(), make(as_gpu)()
        assert other["loss"] == pytest.approx(plain["loss"], rel=0.02)
        assert other["operations"] == plain["operations"] > 0
