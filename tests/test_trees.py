import random
from collections import Counter

import numpy as np
import pytest
from conftest import BASE, FIXTURES, small_model
from test_pack import drawn_tree, ids, paths, preference_trees, random_tree, rated

from data.pack import pack
from data.store import Trees, flatten
from data.tokenizer import adopt_template, load_tokenizer
from data.trees import (
    CHOSEN,
    REJECTED,
    Response,
    Tree,
    drop_equal_pairs,
    grouped,
    tree_from_ranking,
    tree_numbers,
    trees_from_messages,
    trees_of,
    truncate,
)

# ------------------------------------------------------------------------------------- truncation

def test_truncation_cuts_ends_and_counts_what_it_took():
    """At 8 tokens: w2 = 7..9 keeps one token, l2 after 7 keeps one.

    At 7 the second pair has nothing left; at 2 neither.
    """
    (tree,), counts = truncate([drawn_tree()], 8)
    spans = [(r.start, r.end, r.cut) for r in tree.responses]
    assert len(tree.trunk) == 8 and spans == [(2, 5, False), (0, 3, False), (7, 8, True), (0, 1, True)]
    assert counts == {"trees": 1, "responses_cut": 2, "responses_dropped": 0, "trees_dropped": 0}
    (tree,), counts = truncate([drawn_tree()], 7)
    assert len(tree.leaves) == 1 and len(tree.trunk) == 5 and tree.pairs == 1 and counts["responses_dropped"] == 2
    trees, counts = truncate([drawn_tree()], 2)
    assert trees == [] and counts["trees_dropped"] == 1
    assert truncate([drawn_tree()], 10)[0][0].trunk.tolist() == list(range(10))


def test_truncated_trees_can_be_packed():
    rng = random.Random(2)
    for limit in (3, 6, 11, 17):
        trees, _ = truncate([random_tree(rng, i) for i in range(30)], limit)
        for batch in pack(trees, 60):
            assert batch.positions.max() < limit
            chosen, rejected = (batch.pair[batch.side == side].tolist() for side in (CHOSEN, REJECTED))
            assert sorted(chosen) == sorted(rejected)


def test_a_cut_reply_has_no_end_of_sequence_and_a_whole_one_has():
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "one two three four five"}]
    (tree,) = trees_from_messages(messages, tokenizer)
    end = tree.responses[0].end
    assert tree.trunk[end - 1] == tokenizer.eos_id
    (cut,), _ = truncate([tree], end - 1)
    assert cut.responses[0].cut and tokenizer.eos_id not in cut.trunk[cut.responses[0].start :]


# -------------------------------------------------------------------------------- records to trees

@pytest.mark.parametrize("template", ["zephyr", "llama-2", "mistral", "chatml", "alpaca", "plain"])
def test_a_rated_dialogue_becomes_one_tree_in_every_template(template):
    tokenizer = load_tokenizer(BASE)
    adopt_template(small_model(vocab_size=tokenizer.vocab_size), tokenizer, template)
    records = rated(3)
    unrelated = {"prompt": [{"role": "user", "content": "Name 1 fruits."}], "chosen": "x.", "rejected": "y."}
    tree, other = preference_trees([records[0], unrelated, *records[1:]], tokenizer, template)
    assert tree.pairs == 3 and other.pairs == 1 and [r.turn for r in tree.responses] == [1, 1, 2, 2, 3, 3]
    assert [r.margin for r in tree.responses] == [1, 1, 2, 2, 3, 3]
    for tokens, begin, side in paths(tree):
        said = tokenizer.decode(tokens[begin:].tolist()).strip()
        assert said.startswith("Good" if side == CHOSEN else "Bad")
    separate = [t for record in records for t in preference_trees([record], tokenizer, template)]
    for (tokens, begin, _), (same, start, _) in zip(paths(tree), [p for t in separate for p in paths(t)], strict=True):
        assert np.array_equal(tokens, same) and begin == start
    assert tree.tokens < sum(t.tokens for t in separate)


def test_a_turn_without_a_pair_does_not_break_the_tree():
    """Turn 2 was a tie: turn 3 still goes on from turn 1, in one tree of two pairs, and turn 2 is not trained."""
    records = rated(3)
    (tree,) = preference_trees([records[0], records[2]], load_tokenizer(BASE), "zephyr")
    assert tree.pairs == 2 and [r.turn for r in tree.responses] == [1, 1, 3, 3]


def test_the_digest_sees_data_template_and_truncation():
    tokenizer = load_tokenizer(BASE)
    records = rated(2)
    trees = preference_trees(records, tokenizer, "zephyr")

    def digest(trees):
        return Trees(*flatten(trees), {}).digest

    assert digest(trees) == digest(preference_trees(records, tokenizer, "zephyr"))
    assert digest(trees) != digest(preference_trees(records, tokenizer, "plain"))
    assert digest(trees) != digest(truncate(trees, 20)[0])
    changed = [records[0], records[1] | {"margin": 4}]
    assert digest(trees) != digest(preference_trees(changed, tokenizer, "zephyr"))


def test_duplicates_stay_pairs_of_their_own():
    """Three pairs to one prompt and a line that occurs twice: four trees, none merged."""
    records = [{"prompt": [{"role": "user", "content": "Pick a colour."}], "chosen": "Blue.", "rejected": text}
               for text in ("No.", "Why?", "Seven.", "Seven.")]
    trees = preference_trees(records, load_tokenizer(BASE), "zephyr")
    assert [tree.pairs for tree in trees] == [1, 1, 1, 1] and [tree.record for tree in trees] == [0, 1, 2, 3]


def test_pairs_are_grouped_by_the_dialogue_they_continue():
    """Two dialogues of three and two turns, shuffled into each other, and a prompt that only looks like the first."""
    first, second = rated(3), [r | {"prompt": [{"role": "system", "content": "Be brief."}, *r["prompt"]]}
                               for r in rated(2)]
    alike = {"prompt": first[0]["prompt"], "chosen": "x.", "rejected": "y."}
    records = [first[0], second[0], alike, first[1], second[1], first[2]]
    numbers = tree_numbers(records, "preference")
    assert numbers.tolist() == [0, 1, 2, 0, 1, 0]
    found = [(number, [i for i, _ in group]) for number, group in grouped(records, numbers)]
    assert found == [(2, [2]), (1, [1, 4]), (0, [0, 3, 5])]  # each as soon as it is whole
    assert tree_numbers(records, "messages").tolist() == [0, 1, 2, 3, 4, 5]


def test_a_template_that_rewrites_what_was_said_gives_pairs_one_by_one(monkeypatch):
    """Rendered another way once the dialogue goes on, the turns share no prefix: three trees, all that was said in
    each."""
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    plain = tokenizer.paths
    monkeypatch.setattr(tokenizer, "paths", lambda messages, *rest: plain(
        [{"role": "system", "content": "x" * len(messages)}, *messages], *rest))
    trees = trees_of(rated(3), "preference", tokenizer)
    assert [tree.pairs for tree in trees] == [1, 1, 1] and [tree.record for tree in trees] == [0, 1, 2]


@pytest.mark.parametrize("ranks", [[0, 1, 2], [1, 2, 3], [7, 40, 900], [-1, 0, 5]])
def test_ranks_may_count_from_any_number(ranks):
    record = {"prompt": [{"role": "user", "content": "Hi"}], "answers": ["Hello!", "Hm.", "No."], "ranks": ranks}
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    tree = tree_from_ranking(record, tokenizer)
    assert [r.side for r in tree.responses] == [0, 1, 2] and tree.responses[0].side == CHOSEN


def test_every_reply_of_a_dialogue_is_learnt_with_its_end_and_nothing_else():
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    said = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"),
            ("assistant", "See you.")]
    (tree,) = trees_from_messages([{"role": role, "content": text} for role, text in said], tokenizer)
    learnt = [tree.reply(r).tolist() for r in tree.responses]
    assert [tokenizer.decode(ids).strip() for ids in learnt] == ["Hello!", "See you."]
    assert all(ids[-1] == tokenizer.eos_id for ids in learnt)
    assert (tree.trunk == tokenizer.bos_id).sum() == 1 and tree.learnt == sum(map(len, learnt))


def test_a_reply_that_a_template_writes_otherwise_later_is_a_tree_of_its_own(tmp_path):
    """By Qwen3's template the thoughts of all but the last reply go; each is learnt as it is made."""
    text = ("{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' + (m.content if loop.last else "
            "m.content.split('|')[-1]) + '<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}")
    (tmp_path / "thoughts.jinja").write_text(text)
    tokenizer = load_tokenizer(FIXTURES / "models" / "qwen2")
    tokenizer.adopt(str(tmp_path / "thoughts.jinja"))
    dialogue = [{"role": role, "content": said} for role, said in (
        ("user", "x"), ("assistant", "hm|yes"), ("user", "y"), ("assistant", "no"), ("user", "z"),
        ("assistant", "oh|so"))]
    trees = trees_from_messages(dialogue, tokenizer)
    assert [[tokenizer.decode(tree.reply(r).tolist()) for r in tree.responses] for tree in trees] == [
        ["hm|yes"], ["no", "oh|so"]]
    assert [[r.turn for r in tree.responses] for tree in trees] == [[1], [2, 3]]
    assert "hm" not in tokenizer.decode(trees[1].trunk.tolist())
    pair = {"prompt": dialogue[:3], "chosen": "no", "rejected": "hm|no"}
    (tree,) = trees_of([pair], "preference", tokenizer)
    assert [tokenizer.decode(tree.reply(r).tolist()) for r in tree.responses] == ["no", "hm|no"]


# -------------------------------------------------------------------------------------- equal pairs

def test_pairs_of_equal_replies_are_dropped_and_counted():
    """Turn 1 has equal replies (trunk 2..4 and leaf A), turn 2 has not; of two equal pairs nothing is left."""
    tree, counts = drawn_tree(), Counter()
    tree.leaves[0] = (2, ids(2, 3, 4))
    kept = drop_equal_pairs(tree, counts)
    assert counts == {"pairs_equal": 1, "responses_cut": 0} and kept.pairs == 1 and kept.tokens == 10 + 2
    assert [(r.segment, r.start, r.end, r.pair, r.side, r.turn) for r in kept.responses] == [
        (0, 7, 10, 0, CHOSEN, 2), (1, 0, 2, 0, REJECTED, 2)]
    tree.leaves[1] = (7, ids(7, 8, 9))
    tree.responses[3] = Response(2, 0, 3, 1, REJECTED, 2)
    assert drop_equal_pairs(tree, counts) is None and counts["pairs_equal"] == 3 and counts["trees_dropped"] == 1
    untouched = drawn_tree()
    assert drop_equal_pairs(untouched, counts) is untouched


def test_of_a_ranking_only_one_whose_replies_are_all_equal_is_dropped():
    def ranking(*leaves):
        return Tree(ids(1, 2), [(2, ids(*leaf)) for leaf in leaves],
                    [Response(k + 1, 0, len(leaf), 0, k) for k, leaf in enumerate(leaves)])

    assert drop_equal_pairs(ranking([3], [3], [4]), Counter()).tokens == 5
    assert drop_equal_pairs(ranking([3], [3], [3]), Counter()) is None


def test_a_reply_cut_on_both_sides_keeps_its_prompt_and_has_no_end():
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    long = {"prompt": [{"role": "user", "content": "Tell me."}], "chosen": "Short.", "rejected": "very " * 300}
    for limit in (12, 14, 20, 100):
        (tree,), counts = truncate(trees_of([long], "preference", tokenizer), limit)
        (chosen, _, _), (rejected, begin, _) = paths(tree)
        assert len(chosen) <= limit and len(rejected) == limit and counts["responses_cut"] >= 1
        assert np.array_equal(chosen[:begin], rejected[:begin]) and tree.responses[1].cut
        assert tokenizer.eos_id not in rejected[begin:]
        assert (tokenizer.eos_id in chosen[begin:]) == (not tree.responses[0].cut)


def test_a_reply_that_is_not_to_be_learnt_is_context():
    tokenizer = load_tokenizer(BASE)
    tokenizer.adopt("zephyr")
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hm.", "loss": False},
                {"role": "user", "content": "Bye"}, {"role": "assistant", "content": "See you."}]
    (tree,) = trees_from_messages(messages, tokenizer)
    assert [tokenizer.decode(tree.reply(r).tolist()).strip() for r in tree.responses] == ["See you."]
    (whole,) = trees_from_messages([{key: m[key] for key in ("role", "content")} for m in messages], tokenizer)
    assert tree.trunk.tolist() == whole.trunk.tolist() and len(whole.responses) == 2
    assert trees_from_messages(messages[:2], tokenizer) == []
