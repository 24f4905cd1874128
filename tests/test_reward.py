import json
import math
import random

import pytest
import torch
from conftest import FIXTURES, exits, metrics_of, reference, small_model, step_gradients, write_jsonl
from safetensors.torch import load_file
from test_dpo import pairs_file
from test_pack import random_tree

import reward
from checkpoints import load_model, save_model
from data.pack import collate, pack
from data.scores import all_scores
from data.tokenizer import adopt_template, load_tokenizer
from data.trees import CHOSEN, REJECTED, Response, Tree, tree_from_ranking
from model import add_score_head
from reward import MARGINS, Config, comparisons, pairwise_loss, report, response_scores, train_step


def scored(seed=0, **fields):
    return add_score_head(small_model(seed=seed, **fields), seed)


# ---------------------------------------------------------------------------------------- the loss

def test_values_by_hand():
    """Difference 1: margin 1 leaves log 2, margin 3 leaves log(1 + e^2) = 2.126928.

    A difference of -700 stays finite.
    """
    one = torch.tensor([1.0], dtype=torch.float64)
    assert pairwise_loss(one, one * 0, one)[0].item() == pytest.approx(math.log(2), abs=1e-9)
    assert pairwise_loss(one, one * 0, 3 * one)[0].item() == pytest.approx(2.126928, abs=1e-6)
    low = torch.tensor([-700.0], requires_grad=True)
    loss, _ = pairwise_loss(low, torch.zeros(1))
    loss.backward()
    assert loss.item() == 700 and low.grad.item() == -1


def test_equal_scores_cost_log_2_and_are_no_hit():
    loss, metrics = pairwise_loss(torch.ones(3), torch.ones(3))
    assert loss.item() == pytest.approx(math.log(2)) and metrics["accuracy"] == 0


@pytest.mark.parametrize("centering", [0.0, 0.01])
@pytest.mark.parametrize("kind", ["none", "raw_rating", "llama2_small", "llama2_large"])
def test_losses_and_gradients_equal_trl(kind, centering):
    numbers, case = reference("reward/pairwise")
    chosen, rejected = (case[f"{side}_rewards"].clone().requires_grad_() for side in ("chosen", "rejected"))
    margins = torch.tensor(MARGINS[kind.removesuffix("_rating")], dtype=torch.float64)[case["rating_1_to_4"] - 1]
    loss, metrics = pairwise_loss(chosen, rejected, margins, centering)
    loss.backward()
    name = kind + ("+center" if centering else "")
    assert loss.item() == pytest.approx(numbers["cases"][name]["loss"], abs=1e-6)
    assert metrics["accuracy"].item() == pytest.approx(numbers["cases"][name]["accuracy"])
    assert metrics["margin"].item() == pytest.approx(numbers["cases"][name]["mean_margin"], abs=1e-6)
    torch.testing.assert_close(chosen.grad, case[f"{name}.grad_chosen"], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(rejected.grad, case[f"{name}.grad_rejected"], atol=1e-6, rtol=1e-6)


def ranked_tree(ranks, seed=0):
    rng = random.Random(seed)
    tree = Tree(torch.randint(3, 40, (5,), generator=torch.Generator().manual_seed(seed)).int().numpy())
    for i, rank in enumerate(ranks):
        leaf = torch.tensor([rng.randint(3, 39) for _ in range(rng.randint(1, 6))]).int().numpy()
        tree.leaves.append((5, leaf))
        tree.responses.append(Response(i + 1, 0, len(leaf), 0, rank))
    return tree


def test_rankings_weigh_prompts_alike_as_in_trl():
    """4 answers make 6 comparisons, 6 make 15, each prompt weighs the same."""
    numbers, case = reference("reward/groups")
    prompts = [f"prompt{i}" for i in range(2)]
    batch = collate([ranked_tree(case[f"{p}.rank"].tolist(), i) for i, p in enumerate(prompts)])
    scores = torch.cat([case[f"{p}.rewards"] for p in prompts]).requires_grad_()
    better, worse, weights = comparisons(batch)
    assert len(better) == 6 + 15 and weights.sum().item() == pytest.approx(2)
    loss, _ = pairwise_loss(scores[better], scores[worse], weights=weights.double() / 2)
    loss.backward()
    assert loss.item() == pytest.approx(numbers["loss"], abs=1e-6)
    torch.testing.assert_close(scores.grad, torch.cat([case[f"{p}.grad"] for p in prompts]), atol=1e-6, rtol=1e-6)


def test_nine_answers_make_36_comparisons_and_ties_none():
    assert len(comparisons(collate([ranked_tree(range(9))]))[0]) == 36
    better, worse, _ = comparisons(collate([ranked_tree([0, 1, 1])]))
    assert sorted(zip(better.tolist(), worse.tolist(), strict=True)) == [(0, 1), (0, 2)]


def test_a_pair_is_a_ranking_of_two():
    batch = collate([random_tree(random.Random(s)) for s in range(5)])
    scores = torch.randn(len(batch.pair))
    better, worse, weights = comparisons(batch)
    chosen, rejected = batch.sides(scores)
    order = batch.pair[better].argsort()
    assert torch.equal(scores[better][order], chosen) and torch.equal(scores[worse][order], rejected)
    assert (weights == 1).all()


# --------------------------------------------------------------------------------------- the score

@pytest.mark.parametrize("side", ["left", "right"])
def test_scores_equal_transformers_whatever_the_padding(side):
    """An end of sequence in the middle of a prompt is not its end."""
    case = load_file(FIXTURES / "reference/tiny/llama_rm/expected.safetensors")
    model = load_model(FIXTURES / "reference/tiny/llama_rm", dtype=torch.float32)
    scores = model.score(case[f"{side}.input_ids"], case[f"{side}.attention_mask"])
    torch.testing.assert_close(scores, case["rewards"], atol=1e-5, rtol=1e-5)


def test_scores_are_the_same_alone_in_any_batch_and_in_a_tree():
    model = scored(dtype=torch.float64)
    trees = [random_tree(random.Random(s)) for s in range(6)]
    together = [part.double() for part in all_scores(model, trees, 10**6, torch.device("cpu"))]
    for tree, found in zip(trees, together, strict=True):
        for response, score in zip(tree.responses, found, strict=True):
            if response.segment:
                prefix, leaf = tree.leaves[response.segment - 1]
                path = [*tree.trunk[:prefix], *leaf[: response.end]]
            else:
                path = tree.trunk[: response.end]
            alone = model.score(torch.tensor([[int(i) for i in path]]))
            assert alone.item() == pytest.approx(score.item(), abs=1e-5)


def test_one_micro_batch_or_eight_give_the_same_gradient():
    trees = [random_tree(random.Random(s)) for s in range(8)]
    groups = sum(tree.pairs for tree in trees)
    grads = []
    for budget in (10**6, 1):
        model = scored(dtype=torch.float64)
        _, found = step_gradients(model, trees, budget,
                                  lambda m, b, _: train_step(m, b, Config(margin="llama2_small"), groups))
        grads.append(found)
    for one, eight in zip(*grads, strict=True):
        torch.testing.assert_close(one, eight, atol=1e-9, rtol=1e-6)


def test_the_head_starts_with_std_1_over_sqrt_of_width_plus_1():
    weights = torch.cat([scored(seed=s, width=64, heads=4).score_head.weight[0].detach() for s in range(40)])
    assert weights.std().item() == pytest.approx(65**-0.5, rel=0.05)


def test_a_reward_model_is_saved_for_sequence_classification_and_keeps_its_zero(tmp_path):
    from dataclasses import replace

    model = scored(dtype=torch.float32)
    model.config = replace(model.config, score_mean=0.25, score_std=2.0)
    save_model(model, tmp_path / "m")
    told = json.loads((tmp_path / "m" / "config.json").read_text())
    assert told["architectures"] == ["LlamaForSequenceClassification"] and told["num_labels"] == 1
    again = load_model(tmp_path / "m")
    ids = torch.randint(3, 40, (3, 7))
    torch.testing.assert_close(again.score(ids), model.score(ids))
    assert torch.equal(again.score_head.weight, model.score_head.weight) and again.config.score_std == 2
    (tmp_path / "m" / "config.json").write_text(json.dumps(told | {"score_mean": 0.0}))
    torch.testing.assert_close(load_model(tmp_path / "m").score(ids), model.score(ids) + 0.25)


def test_a_missing_head_is_an_error_and_an_lm_head_is_not_invented(tmp_path, capsys):
    save_model(small_model(dtype=torch.float32), tmp_path / "m")
    told = json.loads((tmp_path / "m" / "config.json").read_text())
    told["architectures"] = ["LlamaForSequenceClassification"]
    (tmp_path / "m" / "config.json").write_text(json.dumps(told))
    exits(capsys, lambda: load_model(tmp_path / "m"), "score.weight is in none of its weight files")
    with pytest.raises(ValueError, match="no LM head"):
        scored()(torch.tensor([[3, 4]]))


# --------------------------------------------------------------------------------- data, evaluation

def test_a_ranking_becomes_a_trunk_with_a_leaf_for_each_answer(checkpoint):
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.adopt("zephyr")
    record = {"prompt": [{"role": "user", "content": "Name two cities."}],
              "answers": ["Rome, Oslo.", "Rome.", "No."], "ranks": [0, 1, 1]}
    tree = tree_from_ranking(record, tokenizer)
    assert tree.trunk.tolist() == tokenizer.render(record["prompt"], add_generation_prompt=True)[0]
    assert [prefix for prefix, _ in tree.leaves] == [len(tree.trunk)] * 3
    assert all(leaf[-1] == tokenizer.eos_id for _, leaf in tree.leaves)


def test_the_report_by_hand():
    """Differences 1, -1, 0: one hit in three, a tie is none; by margin 1: hit and miss, by margin 4: the tie."""
    def pair(margin, record):
        trunk, leaf = torch.tensor([3, 4, 5]).int().numpy(), torch.tensor([6]).int().numpy()
        responses = [Response(0, 1, 3, 0, CHOSEN, 1, margin), Response(1, 0, 1, 0, REJECTED, 1, margin)]
        return Tree(trunk, [(1, leaf)], responses, record)

    trees = [pair(1.0, 0), pair(1.0, 1), pair(4.0, 2)]
    scores = [torch.tensor(s) for s in ([1.0, 0.0], [0.0, 1.0], [0.5, 0.5])]
    found = report(trees, scores, ["chat", "chat", "coding"])
    assert found["accuracy"] == pytest.approx(1 / 3) and found["ties"] == 1
    assert found["by_margin"] == {"1": [0.5, 2], "4": [0.0, 1]}
    assert found["by_category"] == {"chat": [0.5, 2], "coding": [0.0, 1]}
    assert found["calibration"] == [[0.5, 0.0, 1], [pytest.approx(0.7310586), 0.5, 2]]


# -------------------------------------------------------------------------------------- the script

def config(checkpoint, folder, **changes):
    data = changes.pop("data", None) or str(pairs_file(folder / "pairs.jsonl", 8))
    return Config(**{"model": str(checkpoint), "data": data, "out": str(folder / "run"), "batch": 8, "epochs": 1,
                     "lr": 3e-3, "seed": 1, "warmup_ratio": 0.0, "schedule": "constant", "device": "cpu",
                     "dtype": "float32"} | changes)


def test_eight_pairs_are_learnt_and_demonstrations_score_0(checkpoint, tmp_path, capsys):
    pairs = pairs_file(tmp_path / "p.jsonl", 8)
    reward.main(config(checkpoint, tmp_path, data=str(pairs), eval_data=str(pairs), epochs=40))
    last = metrics_of(tmp_path / "run")[-1]
    assert last["accuracy"] == 1.0 and last["eval_accuracy"] == 1.0
    told = json.loads((tmp_path / "run" / "report.json").read_text())
    assert told["reward_model"]["accuracy"] == 1.0 and 0 <= told["baseline"]["accuracy"] <= 1
    said = capsys.readouterr().out
    assert "score 0 on average" in said and "correlation of score and length" in said

    records = [json.loads(line) for line in pairs.open()]
    dialogues = [{"messages": [*r["prompt"], {"role": "assistant", "content": r["chosen"]}]} for r in records]
    file = write_jsonl(tmp_path / "d.jsonl", dialogues)
    reward.score_file(["--score", str(file), "--model", str(tmp_path / "run" / "model"),
                       "--out", str(tmp_path / "scored.jsonl")])
    scores = [json.loads(line)["score"] for line in (tmp_path / "scored.jsonl").open()]
    assert sum(scores) / len(scores) == pytest.approx(0, abs=1e-2)


def test_rankings_are_learnt(checkpoint, tmp_path):
    made = [{"prompt": f"Name {n} cities.", "answers": ["No.", "Rome.", "Rome and Oslo."], "ranks": [2, 1, 0]}
            for n in range(4)]
    file = write_jsonl(tmp_path / "r.jsonl", made)
    reward.main(config(checkpoint, tmp_path, data=str(file), epochs=40))
    assert metrics_of(tmp_path / "run")[-1]["accuracy"] == pytest.approx(1.0)


def test_stopped_and_continued_equals_undisturbed_bit_for_bit(checkpoint, tmp_path, monkeypatch):
    from runtime import StopRequest

    data = str(pairs_file(tmp_path / "p.jsonl", 8))
    ask = {"data": data, "batch": 2, "max_steps": 4}
    reward.main(config(checkpoint, tmp_path, out=str(tmp_path / "whole"), **ask))
    monkeypatch.setattr(StopRequest, "__bool__", lambda self: len(metrics_of(tmp_path / "parts")) == 2)
    reward.main(config(checkpoint, tmp_path, out=str(tmp_path / "parts"), **ask))
    assert not (tmp_path / "parts" / "model").exists()
    monkeypatch.undo()
    reward.main(config(checkpoint, tmp_path, out=str(tmp_path / "parts"), **ask))
    assert metrics_of(tmp_path / "whole") == metrics_of(tmp_path / "parts")
    one, two = (load_file(tmp_path / run / "model" / "model.safetensors") for run in ("whole", "parts"))
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("changes, said", [
    ({"centering": -1.0}, ["centering is -1, expected at least 0"]),
    ({"data": "none.jsonl"}, ["none.jsonl: no such file"]),
    ({"max_length": 2}, ["every prompt is longer than max_length=2"]),
])
def test_what_the_user_wrote_wrong_is_one_line(changes, said, checkpoint, tmp_path, capsys):
    exits(capsys, lambda: reward.main(config(checkpoint, tmp_path, **changes)), *said)


def test_data_without_preferences_and_models_without_score_are_one_line(checkpoint, tmp_path, capsys):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hi."}]
    demos = write_jsonl(tmp_path / "d.jsonl", [{"messages": said}])
    exits(capsys, lambda: reward.main(config(checkpoint, tmp_path, data=str(demos))), "holds no preference")
    tokenizer, model = load_tokenizer(checkpoint), load_model(checkpoint)
    adopt_template(model, tokenizer, "zephyr")
    exits(capsys, lambda: reward.score_file(["--score", str(demos), "--model", str(checkpoint)]), "has no score head")


def test_packed_batches_know_where_replies_end():
    batch = pack([random_tree(random.Random(1)), random_tree(random.Random(2))], 10**6)[0]
    rows, mask = batch.rows(batch.targets.float())
    assert torch.equal(rows[mask], batch.targets.float()) and torch.equal(mask.sum(1), batch.lengths)
    assert torch.equal(rows[torch.arange(len(mask)), batch.lengths - 1], batch.tokens[batch.ends].float())
    assert torch.equal(response_scores(scored(), batch).isfinite(), torch.ones(len(mask), dtype=torch.bool))


# ----------------------------------------------------------------------------------------- the edges

@pytest.mark.parametrize("edge", ["one pair", "one demonstration"])
def test_one_reply_has_no_standard_deviation_and_leaves_scores_as_they_are(edge, checkpoint, tmp_path):
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    demos = str(write_jsonl(tmp_path / "d.jsonl", [{"messages": said}])) if edge == "one demonstration" else ""
    data = str(pairs_file(tmp_path / "p.jsonl", 8 if demos else 1))
    reward.main(config(checkpoint, tmp_path, data=data, demos=demos))
    told = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert told["score_std"] == 1.0 and math.isfinite(told["score_mean"])


def test_demonstrations_that_are_all_too_long_are_one_line_before_the_run(checkpoint, tmp_path, capsys):
    said = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "Hello!"}]
    file = write_jsonl(tmp_path / "d.jsonl", [{"messages": said}])
    exits(capsys, lambda: reward.main(config(checkpoint, tmp_path, demos=str(file), max_length=100)),
          "d.jsonl: holds no reply within max_length=100")
    assert not (tmp_path / "run").exists()


def test_rankings_that_count_from_1_train_as_those_that_count_from_0(checkpoint, tmp_path):
    """They were compared the same; the best reply of each, which scores 0 on average, was not found."""
    found = []
    for first in (0, 1):
        made = [{"prompt": f"Name {n} cities.", "answers": ["No.", "Rome.", "Rome and Oslo."],
                 "ranks": [first + 2, first + 1, first]} for n in range(4)]
        file, folder = write_jsonl(tmp_path / "r.jsonl", made), tmp_path / str(first)
        reward.main(config(checkpoint, tmp_path, data=str(file), out=str(folder), epochs=3))
        told = json.loads((folder / "model" / "config.json").read_text())
        found.append((metrics_of(folder), told["score_mean"], told["score_std"]))
    assert found[0] == found[1] and math.isfinite(found[0][1]) and found[0][2] > 0
