"""Scores of replies: in any batches and any order what they are one by one."""
import random

import pytest
import torch
from conftest import small_model
from test_pack import random_tree

from data.pack import collate, pack
from data.scores import all_scores, mean_logprobs, response_logprob_sums, response_scores
from model import add_score_head

DEVICE = torch.device("cpu")


@pytest.fixture(scope="module")
def trees():
    return [random_tree(random.Random(seed)) for seed in range(9)]


@pytest.fixture(scope="module")
def model():
    return small_model(dtype=torch.float32)


@pytest.mark.parametrize("score", [response_logprob_sums, mean_logprobs, response_scores])
def test_scores_come_back_in_the_order_given_whatever_the_batches(model, trees, score):
    model = add_score_head(small_model(dtype=torch.float32), 0) if score is response_scores else model
    with torch.no_grad():
        alone = [score(model, collate([tree])) for tree in trees]
    for micro_tokens in (1, 60, 10**6):
        found = all_scores(model, trees, micro_tokens, DEVICE, score)
        for one, many in zip(alone, found, strict=True):
            torch.testing.assert_close(many, one, atol=1e-4, rtol=1e-4)
    assert all_scores(model, [], 10, DEVICE, score) == []


def test_the_same_tree_twice_is_scored_twice(model, trees):
    first, second = all_scores(model, [trees[0], trees[0]], 10**6, DEVICE, mean_logprobs)
    torch.testing.assert_close(first, second)


def test_a_response_id_counts_the_responses_before_it(trees):
    count = sum(len(tree.responses) for tree in trees)
    for max_tokens in (1, 60, 10**6):
        batches = pack(trees, max_tokens)
        assert sorted(int(i) for batch in batches for i in batch.response_ids) == list(range(count))
        for batch in batches:
            sides = torch.tensor([r.side for tree in trees for r in tree.responses])
            assert torch.equal(batch.side, sides[batch.response_ids])
    assert collate(trees).response_ids.tolist() == list(range(count))


def test_a_mean_is_a_sum_by_length(model, trees):
    batch = collate(trees)
    with torch.no_grad():
        sums, means = response_logprob_sums(model, batch), mean_logprobs(model, batch)
    torch.testing.assert_close(means * batch.lengths, sums)
