import gzip
import hashlib
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
from conftest import BASE, exits, small_model, write_jsonl

from data.tokenizer import load_tokenizer
from judging import choices
from judging.choices import (
    TASKS,
    Question,
    encode_choices,
    grade,
    likelihoods,
    measure,
    plant,
    read_exam,
    read_questions,
    with_contexts,
)

real = pytest.mark.skipif("REAL_DATA" not in os.environ, reason="REAL_DATA does not name the real data sets")


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)  # these models are too small for two to help


def fixture(name: str) -> Path:
    return Path(os.environ["REAL_DATA"]) / "judge" / "multiple_choice" / name


def mock(asked) -> list[list[float]]:
    """The harness's stand-in for a model: log-likelihoods drawn in the order of the requests."""
    rng = random.Random(42)
    return [[-rng.random() for _ in question.choices] for question, _ in asked]


@torch.no_grad()
def one_by_one(model, context, continuation) -> float:
    """The plain way: the whole text in one row, log-softmax, sum over the continuation."""
    logits = model(torch.tensor([context + continuation[:-1]]))[0, len(context) - 1 :]
    return logits.log_softmax(-1).gather(1, torch.tensor(continuation)[:, None]).double().sum().item()


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BASE)


# ---------------------------------------------------------------------------------------- questions

ARC = {"question": "Why?", "choices": {"text": ["x", "y", "z"], "label": ["1", "2", "3"]}, "answerKey": "3"}
SWAG = {"activity_label": "Cooking", "ctx_a": "A man stirs.", "ctx_b": "the Soup",
        "endings": ["boils", "[step] is  cold"], "label": "1"}
MMLU = {"subject": "high_school_physics", "question": " Mass? ", "choices": ["a", "b", "c", "d"], "answer": 2}
TRUTH = {"question": "Is it?", "mc1_targets": {"Yes.": 1, "No.": 0}, "mc2_targets": {"Yes.": 1, "No.": 0, "It is.": 1}}


def test_three_forms_of_arc_are_one_question_and_numeric_labels_count_from_1():
    flat = {"question": "Why?", "choices": ["x", "y", "z"], "labels": ["A", "B", "C"], "answerKey": "C", "gold": 2}
    items = [{"text": t, "label": k} for t, k in zip("xyz", "ABC", strict=True)]
    nested = {"question": {"stem": "Why?", "choices": items}, "answerKey": "C"}
    expected = Question("Question: Why?\nAnswer:", ("x", "y", "z"), 2)
    assert [choices.arc_question(r) for r in (ARC, flat, nested)] == [expected] * 3
    five = ARC | {"choices": {"text": list("vwxyz"), "label": list("12345")}, "answerKey": "5"}
    assert choices.arc_question(five).gold == 4


def test_two_forms_of_piqa_are_one_question():
    """As the harness writes it: "Question: ", the goal, a line "Answer:"."""
    made = {"query": "Question: Open a jar.\n", "choices": ["Twist it.", "Eat it."], "gold": 0}
    expected = Question("Question: Open a jar.\nAnswer:", ("Twist it.", "Eat it."), 0)
    original = {"goal": "Open a jar.", "sol1": "Twist it.", "sol2": "Eat it.", "label": 0}
    assert [choices.piqa_question(record) for record in (original, made)] == [expected] * 2


def test_hellaswag_by_hand():
    """strip; " [title]" to ". "; brackets deleted; one pass over double spaces leaves two of three. ctx_b: first letter
    up, others down."""
    assert choices.hellaswag_text(" How to [title] Sit [step] well   now ") == "How to. Sit well  now"
    question = choices.hellaswag_question(SWAG)
    assert question == Question("Cooking: A man stirs. The soup", ("boils", " is cold"), 1)
    assert choices.hellaswag_question({"query": "Q", "choices": ["a", "b"], "gold": 1}) == Question("Q", ("a", "b"), 1)


def test_mmlu_by_hand():
    lines = "A. a\nB. b\nC. c\nD. d\nAnswer:"
    header = "The following are multiple choice questions (with answers) about high school physics.\n\n"
    assert choices.mmlu_question(MMLU) == Question(f"Mass?\n{lines}", ("A", "B", "C", "D"), 2, (),
                                                   "high_school_physics", header)
    assert choices.mmlu_v0_question(MMLU) == Question(f"Question:  Mass? \nChoices:\n{lines}", tuple("abcd"), 2, (),
                                                      "high_school_physics")
    for answer in ("C", "2", 2.0, "2.0"):
        assert choices.mmlu_question(MMLU | {"answer": answer}).gold == 2


def test_truthfulqa_asks_mc1_then_mc2_after_six_questions():
    question = choices.truthfulqa_question(TRUTH)
    assert question.choices == ("Yes.", "No.", "Yes.", "No.", "It is.") and question.truths == (1, 0, 1)
    assert question.query.count("Q: ") == 7 and question.query.endswith("\n\nQ: Is it?\nA:")
    listed = {k: {"choices": list(v), "labels": list(v.values())} if isinstance(v, dict) else v
              for k, v in TRUTH.items()}
    assert choices.truthfulqa_question(listed) == question


@pytest.mark.parametrize("task, record, reason", [
    ("arc", ARC | {"answerKey": "4"}, "'answerKey' is '4'"),
    ("arc", ARC | {"answerKey": "A"}, "expected one of A-E or 1-5 in order"),       # labelled 1-3
    ("arc", ARC | {"answerKey": ""}, "answerKey"),
    ("arc", ARC | {"choices": {"text": ["x"], "label": ["1"]}}, "two texts or more"),
    ("arc", {"question": {"stem": "Why?", "choices": ["x"]}, "answerKey": "A"}, "cannot be read as ARC"),
    ("hellaswag", SWAG | {"label": ""}, "the right choice is ''"),
    ("hellaswag", SWAG | {"label": True}, "the right choice is True"),
    ("hellaswag", SWAG | {"ctx_a": None}, "'ctx_a' is null"),
    ("mmlu", MMLU | {"choices": ["a", "b", "c"]}, "expected four texts"),
    ("mmlu", MMLU | {"answer": 4}, "expected a number from 0 to 3"),
    ("mmlu", MMLU | {"question": "\ud800"}, "half a surrogate pair"),
    ("truthfulqa", TRUTH | {"mc2_targets": {"Yes.": 1, "No.": 1}}, "a false one"),
    ("truthfulqa", TRUTH | {"mc1_targets": {"No.": 0, "Yes.": 1}}, "a true choice first"),
    ("truthfulqa", TRUTH | {"mc1_targets": None}, "two texts or more"),
])
def test_a_bad_record_is_a_reject_with_its_line_and_reason(tmp_path, task, record, reason):
    good = {"arc": ARC, "hellaswag": SWAG, "mmlu": MMLU, "truthfulqa": TRUTH}[task]
    file = tmp_path / "data.jsonl"
    file.write_text(f"{json.dumps(good)}\n\n{json.dumps(record)}\n{{\n[1]\n")
    questions, rejects = read_questions(task, file)
    assert len(questions) == 1 and [line for line, _ in rejects] == [3, 4, 5] and reason in rejects[0][1]
    assert "is not JSON" in rejects[1][1] and "expected an object" in rejects[2][1]


def test_no_value_in_a_record_gives_a_traceback(tmp_path):
    """Every field of every form replaced by something of another kind."""
    for task, record in (("arc", ARC), ("hellaswag", SWAG), ("mmlu", MMLU), ("mmlu_v0", MMLU), ("truthfulqa", TRUTH)):
        for key in record:
            for value in (None, 3, "", "x", [], [None], [[]], {}, {"text": 1}, [{"text": "x"}] * 4,
                          {"choices": [1], "labels": 2}, 1e400):
                file = tmp_path / "data.jsonl"
                file.write_text(json.dumps(record) + "\n" + json.dumps(record | {key: value}) + "\n")
                questions, rejects = read_questions(task, file)
                assert len(questions) + len(rejects) == 2


def test_lists_gzip_and_csv_files_are_read(tmp_path):
    (tmp_path / "list.json.gz").write_bytes(gzip.compress(json.dumps([TRUTH, 5]).encode()))
    questions, rejects = read_questions("truthfulqa", tmp_path / "list.json.gz")
    assert len(questions) == 1 and rejects == [(2, "is a JSON int, expected an object")]
    folder = tmp_path / "test"
    folder.mkdir()
    (folder / "anatomy_test.csv").write_text('"Two\nlines",a,b,"c, '
                                             'd",e,C\nshort,a,B\n\nWhich?,1,2,3,4,A\nlong,1,2,3,4,5,A\n')
    (folder / "world_religions_test.csv").write_text("Who?,1,2,3,4,D\n")
    questions, rejects = read_questions("mmlu", folder)
    assert [(q.subject, q.gold) for q in questions] == [("anatomy", 2), ("anatomy", 0), ("world_religions", 3)]
    assert questions[0].query == "Two\nlines\nA. a\nB. b\nC. c, d\nD. e\nAnswer:"
    assert [line for line, _ in rejects] == [3, 6] and rejects[0][1].startswith("anatomy_test.csv: 'choices' is")


def test_what_the_user_got_wrong_is_one_line(tmp_path, capsys):
    file = write_jsonl(tmp_path / "arc.jsonl", [ARC] * 3)
    exits(capsys, lambda: read_exam("arc-c", file), "'arc-c' is unknown", "arc, hellaswag")
    exits(capsys, lambda: read_exam("arc", file), "25 shots need examples", "shots=0")
    exits(capsys, lambda: read_exam("arc", file, file), "holds 3 examples", "shots=25")
    exits(capsys, lambda: read_exam("arc", file, shots=-1), "shots is -1")
    exits(capsys, lambda: read_exam("arc", tmp_path / "none.jsonl"), "none.jsonl: no such file")
    exits(capsys, lambda: read_exam("mmlu", file), "holds no question of MMLU", "line 1")
    exits(capsys, lambda: read_exam("truthfulqa", write_jsonl(tmp_path / "t.jsonl", [TRUTH]), shots=5), "expected 0")


# ----------------------------------------------------------------------------------------- contexts

def test_shots_are_drawn_document_by_document_from_the_generator_that_shuffled():
    questions = [Question(f"q{i}", ("a", "b"), 0) for i in range(6)]
    examples = [Question(f"e{i}", ("x", "y"), i % 2) for i in range(9)]
    asked = with_contexts(questions, examples, 2)
    rng = random.Random(42)
    order = list(range(6))
    rng.shuffle(order)
    for i, (question, context) in zip(order, asked, strict=True):
        first, second = rng.sample(range(9), 2)
        assert question is questions[i]
        assert context == f"e{first} {'xy'[first % 2]}\n\ne{second} {'xy'[second % 2]}\n\nq{i}"
    assert with_contexts(questions, examples, 2, limit=3) == asked[:3]
    assert [c for _, c in with_contexts(questions, [], 0)] == [f"q{i}" for i in order]


def test_a_rejected_question_changes_the_prompts_after_it():
    questions = [Question(f"q{i}", ("a", "b"), 0) for i in range(20)]
    whole = {q.query: context for q, context in with_contexts(questions, questions, 3)}
    fewer = {q.query: context for q, context in with_contexts(questions[:-1], questions, 3)}
    assert any(whole[query] != context for query, context in fewer.items())


def test_mmlu_takes_the_first_examples_of_its_subject_in_their_order(tmp_path):
    tests = [MMLU | {"subject": s, "question": f"{s}{i}"} for s in ("law", "art") for i in range(3)]
    dev = [MMLU | {"subject": s, "question": f"dev {s}{i}", "answer": i} for i in range(4) for s in ("art", "law")]
    exam = read_exam("mmlu", write_jsonl(tmp_path / "test.jsonl", tests), write_jsonl(tmp_path / "dev.jsonl", dev),
                     shots=2, limit=2)
    assert list(exam.asked) == ["law", "art"] and [len(a) for a in exam.asked.values()] == [2, 2]
    rest = "A. a\nB. b\nC. c\nD. d\nAnswer:"
    for subject, asked in exam.asked.items():
        for question, context in asked:
            assert context == (f"The following are multiple choice questions (with answers) about {subject}.\n\n"
                               f"dev {subject}0\n{rest} A\n\ndev {subject}1\n{rest} B\n\n{question.query}")


def test_request_hash_is_that_of_all_requests_as_json():
    asked = [(Question("q", ("é", "b"), 0), "one\nq"), (Question("r", ("c", "d"), 0), "r")]
    requests = [["one\nq", " é"], ["one\nq", " b"], ["r", " c"], ["r", " d"]]
    assert choices.request_hash(asked) == hashlib.sha256(json.dumps(requests, sort_keys=True).encode()).hexdigest()


@real
def test_truthfulqa_requests_and_mock_scores_are_the_harness_ones():
    exam = read_exam("truthfulqa", fixture("truthfulqa_mc_task_v0.json.gz"))
    harness = json.loads(fixture("harness_fixtures.json").read_text())
    known = harness["truthfulqa_mc-v1 (data file truthfulqa_mc_task_v0.json.gz)"]
    result = measure(exam, {"": mock(exam.asked[""])})
    assert result["request_sha256"] == known["request_sha256"] and result["n"] == 817
    for key, value in known["results"].items():
        assert result[key] == pytest.approx(value, abs=1e-12)
    assert result["mc2_mask"] == pytest.approx(0.44658704, abs=5e-9)
    assert result["value"] == result["mc2"]


@real
def test_mmlu_requests_and_mock_scores_are_the_harness_ones():
    known = json.loads(fixture("mmlu_harness_fixtures.json").read_text())
    exam = read_exam("mmlu_v0", fixture("mmlu_test.jsonl.gz"), shots=0)
    result = measure(exam, {subject: mock(asked) for subject, asked in exam.asked.items()})
    letters = read_exam("mmlu", fixture("mmlu_test.jsonl.gz"), fixture("mmlu_dev.jsonl.gz"))
    by_letter = measure(letters, {subject: mock(asked) for subject, asked in letters.asked.items()})
    assert sorted(result["subjects"]) == sorted(known)
    for subject, numbers in known.items():
        found = result["subjects"][subject]
        assert found["request_sha256"] == numbers["harness_v0_request_sha256"] and found["n"] == numbers["n_test"]
        for key in ("acc", "acc_norm", "acc_stderr", "acc_norm_stderr"):
            assert found[key] == pytest.approx(numbers[key], abs=1e-12)
        for key in ("acc", "acc_norm"):  # letters are one character each
            assert by_letter["subjects"][subject][key] == pytest.approx(numbers["acc"], abs=1e-12)
    assert result["acc"] == pytest.approx(sum(n["acc"] for n in known.values()) / 6)
    assert by_letter["shots"] == 5
    assert by_letter["rejects"] == {str(fixture(f"mmlu_{part}.jsonl.gz")): [] for part in ("test", "dev")}


@real
def test_arc_and_hellaswag_files_are_read_whole():
    arc, rejects = read_questions("arc", fixture("arc_challenge_dev.jsonl"))
    lines = [json.loads(line) for line in fixture("arc_challenge_dev.jsonl").read_text().splitlines()]
    assert [q.gold for q in arc] == [line["gold"] for line in lines] and len(arc) == 294 and not rejects
    swag, rejects = read_questions("hellaswag", fixture("hellaswag_small_preprocessed.jsonl"))
    assert [q.gold for q in swag] == [3] * 4 and not rejects
    exam = read_exam("arc", fixture("arc_challenge_dev.jsonl"), fixture("arc_challenge_dev.jsonl"), limit=3)
    assert exam.shots == 25 and all(context.count("\nAnswer:") == 26 for _, context in exam.asked[""])


# ------------------------------------------------------------------------------------------- tokens

class Letters:
    """A tokenizer of characters that merges, from the left: ": a" across a boundary, "b!" after it, and a newline into
    an X."""

    bos_id, eos_id = 1, 2
    merges = (": a", "b!", "\nX", "X:")

    def encode(self, text, continues=False):
        ids, i = [], 0
        while i < len(text):
            merged = next((m for m in self.merges if text.startswith(m, i)), None)
            ids.append(1000 + self.merges.index(merged) if merged else ord(text[i]))
            i += len(merged or "x")
        return ids


def test_the_continuation_is_what_follows_as_many_ids_as_the_context_has():
    """"Q:" is 2 ids; "Q: ab" is "Q", ": a", "b": what follows 2 ids is "b" alone. "Q: b!" is Q : blank b!, so blank and
    b! follow."""
    assert encode_choices(Letters(), "Q:", ["ab", "b!"], bos=False) == ([81, 58], [[98], [32, 1001]])


def test_blanks_that_end_the_context_go_to_the_choice():
    """"Q \\n" + " b" is encoded as "Q" and " \\n b"."""
    assert encode_choices(Letters(), "Q \n", ["b"], bos=True) == ([1, 81], [[32, 10, 32, 98]])


def test_an_empty_context_is_one_bos_or_end_of_text():
    assert encode_choices(Letters(), "", ["b"], bos=True) == ([1], [[32, 98]])
    assert encode_choices(Letters(), "", ["b"], bos=False) == ([2], [[32, 98]])


def test_a_line_that_is_other_tokens_in_its_context_is_not_encoded_alone():
    """"k\\nX:" is k, "\\nX", ":"; with " a" it is k, "\\nX", ": a": nothing follows 3 ids. Alone the line would be
    "X:", then " ", "a"."""
    assert encode_choices(Letters(), "k\nX:", ["a", "b"], bos=False) == ([107, 1002, 58], [[], [32, 98]])


def plain_rule(tokenizer, context, options):
    ids = tokenizer.encode(context)
    return [tokenizer.encode(f"{context} {option}")[len(ids) :] for option in options]


def test_the_last_line_alone_gives_the_same_continuations(tokenizer):
    for context in ("One line:", "Question: a b\nAnswer:", "x\n\nQ: why?\nA:", "a\n  indented", "\nA:", "é\n✓:"):
        for option in ("B", "the answer is 7.", "é", "</s> x", "<|user|>", " two", "\nnew"):
            plain = plain_rule(tokenizer, context, [option])
            assert encode_choices(tokenizer, context, [option], bos=False)[1] == plain


@real
def test_the_last_line_alone_gives_the_same_continuations_of_every_fixture(tokenizer):
    exams = [read_exam("truthfulqa", fixture("truthfulqa_mc_task_v0.json.gz"), limit=150),
             read_exam("arc", fixture("arc_challenge_dev.jsonl"), fixture("arc_challenge_dev.jsonl"), shots=2),
             read_exam("mmlu", fixture("mmlu_test.jsonl.gz"), fixture("mmlu_dev.jsonl.gz"), shots=1),
             read_exam("hellaswag", fixture("hellaswag_small_preprocessed.jsonl"), shots=0)]
    for exam in exams:
        for asked in exam.asked.values():
            for question, context in asked:
                start, found = encode_choices(tokenizer, context, question.choices, bos=True)
                assert start == [tokenizer.bos_id, *tokenizer.encode(context)]
                assert found == plain_rule(tokenizer, context, question.choices)


def test_a_context_too_long_is_cut_from_the_left_and_counted(capsys):
    """Context BOS Q u : (4 ids), continuations " b" (2) and " bcd" (4): 5 and 7 tokens of input. To 5: none and 2 cut;
    to 4: 1 and 3."""
    asked = [(Question("", ("b", "bcd"), 0), "Qu:")]
    whole = (1, 81, 117, 58)
    for limit, first, second, cut in ((7, 0, 0, 0), (5, 0, 2, 1), (4, 1, 3, 2)):
        requests, count = choices.to_requests(Letters(), asked, limit, bos=True)
        assert requests == [[(whole[first:], (32, 98)), (whole[second:], (32, 98, 99, 100))]] and count == cut
    exits(capsys, lambda: choices.to_requests(Letters(), asked, 3, bos=True), "'bcd' adds 4 tokens", "expected 1 to 3")
    swallowed = [(Question("", ("a", "c"), 0), "Q:")]  # ": a" is one id, nothing is left to score
    exits(capsys, lambda: choices.to_requests(Letters(), swallowed, 9, bos=True), "'a' adds 0 tokens")


# -------------------------------------------------------------------------------------- likelihoods

def random_requests(rng: random.Random) -> list:
    """Families of contexts that begin alike, choices of 1 to 5 tokens, some of which begin others, some twice."""
    found = []
    for _ in range(rng.randint(1, 3)):
        stem = tuple(rng.randrange(40) for _ in range(rng.randint(1, 20)))
        for _ in range(rng.randint(1, 5)):
            context = stem + tuple(rng.randrange(40) for _ in range(rng.randint(0, 8)))
            for _ in range(rng.randint(1, 4)):
                continuation = tuple(rng.randrange(3) for _ in range(rng.choice([1, 1, 2, 5])))
                found += [(context, continuation)] * rng.randint(1, 2)
    return found


@pytest.mark.parametrize("fields", [{}, {"window": 7}, {"rotary": 0.0, "norm": "layer"}],
                         ids=["llama", "window", "positions"])
def test_likelihoods_are_those_of_one_request_at_a_time_for_any_batch(fields):
    model = small_model(**fields)
    rng = random.Random(0)
    for _ in range(10):
        requests = random_requests(rng)
        alone = {request: one_by_one(model, *request) for request in set(requests)}
        for micro_tokens in (1, 30, 100, 10_000):
            assert likelihoods(model, requests, micro_tokens) == pytest.approx(alone, abs=1e-9)


def test_every_request_is_in_one_tree_whose_paths_are_its_tokens():
    rng = random.Random(1)
    joined = 0
    for _ in range(30):
        requests = random_requests(rng)
        for micro_tokens in (1, 40, 10_000):
            trees = plant(requests, micro_tokens)
            assert sorted(r for tree in trees for r, _ in tree.requests) == sorted(set(requests))
            for tree in trees:
                assert tree.trunk and all(tree.leaves)
                for (context, continuation), leaf in tree.requests:
                    assert tree.trunk + (tree.leaves[leaf] if leaf >= 0 else ()) == context + continuation[:-1]
                contexts = {context for (context, _), _ in tree.requests}
                joined += len(contexts) > 1
                assert tree.tokens <= micro_tokens or len(contexts) == 1
    assert joined > 10


def test_tokens_of_a_tree_by_hand():
    """Four letters after contexts of 20 and 22 tokens that share 18: trunk 18, leaves of 2 and 4, instead of 20 + 22
    tokens; one by one 4 x (20 + 22). Two choices of 3 tokens after 10: 10 + 2 + 2. Contexts that share 5 of 10 with 3
    choices of 3 tokens each stay apart: 2 x (10 + 6) = 32 tokens, together
    5 + 6 x (5 + 2) = 47; with one letter after the first 10 + 16, together 5 + 5 + 3 x (5 + 2) = 31."""
    letters = [((*range(18), *rest), (x,)) for rest in ((30, 31), (32, 33, 34, 35)) for x in range(4)]
    (tree,) = plant(letters, 100)
    assert tree.trunk == tuple(range(18)) and sorted(map(len, tree.leaves)) == [2, 4] and len(tree.requests) == 8
    (tree,) = plant([(tuple(range(10)), (1, 2, 3)), (tuple(range(10)), (1, 3, 4))], 100)
    assert tree.tokens == 14 and len(tree.trunk) == 10
    apart = [((*range(5), *[x] * 5), (c, c, c)) for x in (8, 9) for c in range(3)]
    assert [tree.tokens for tree in plant(apart, 100)] == [16, 16]
    one_and_three = [((*range(5), *[8] * 5), (1,)), *apart[3:]]
    assert [tree.tokens for tree in plant(one_and_three, 100)] == [10, 16]


def test_the_tiny_model_gives_the_same_in_any_batch_and_one_by_one(tokenizer):
    """fp32, as it is used: 1e-5 of a token's log-probability at most."""
    from checkpoints import load_model

    model = load_model(BASE, torch.float32)
    rng = random.Random(0)
    words = "the cat sat on a red mat and saw five big dogs in the green town".split()
    asked = []
    for _ in range(6):
        said = tuple(" ".join(rng.choices(words, k=rng.randint(1, 9))) for _ in range(4))
        asked.append((Question("", said, 0), "Q: is it?\nA: no\n\nQ: " + " ".join(rng.choices(words, k=12)) + "?\nA:"))
    rows, cut = choices.to_requests(tokenizer, asked, 512, bos=True)
    requests = [request for row in rows for request in row]
    found = [likelihoods(model, requests, micro_tokens) for micro_tokens in (1, 64, 300, 5000)]
    assert cut == 0
    longest = max(len(c) + len(d) - 1 for c, d in requests)
    rows = torch.zeros(len(requests), longest, dtype=torch.long)
    mask = torch.zeros(len(requests), longest, dtype=torch.bool)
    for i, (c, d) in enumerate(requests):  # padded on the left
        rows[i, longest - len(c) - len(d) + 1 :] = torch.tensor(c + d[:-1])
        mask[i, longest - len(c) - len(d) + 1 :] = True
    padded = model(rows, mask).log_softmax(-1)
    for i, (c, d) in enumerate(requests):
        alone = padded[i, longest - len(d) :].gather(1, torch.tensor(d)[:, None]).double().sum().item()
        for value in (one_by_one(model, c, d), *(f[c, d] for f in found)):
            assert abs(value - alone) < 1e-5 * len(d)


def test_a_likelihood_that_is_not_finite_is_refused(capsys):
    model = small_model()
    model.norm.weight.data.fill_(math.nan)
    exits(capsys, lambda: likelihoods(model, [((1, 2), (3,))]), "not finite")


# ------------------------------------------------------------------------------------------ metrics

def test_acc_takes_the_likeliest_and_acc_norm_the_likeliest_per_character():
    """-4, -5, -12 over lengths 2, 5, 10: -2, -1, -1.2 per character. With the blank before each it would be 3, 6, 11:
    -1.33, -0.83, -1.09.
    Lengths 1 and 5, values -2 and -8: -2 < -1.6 bare; -1 > -1.33 with the blank counted."""
    question = Question("", ("ab", "abcde", "abcdefghij"), 1)
    assert grade(question, [-4, -5, -12]) == {"acc": 0, "acc_norm": 1}
    assert grade(Question("", ("a", "abcde"), 1), [-2, -8]) == {"acc": 0, "acc_norm": 1}
    assert grade(Question("", ("a", "b", "c"), 0), [-1, -1, -1]) == {"acc": 1, "acc_norm": 1}  # the first of equals
    assert grade(Question("", ("a", "b", "c"), 1), [-1, -1, -1]) == {"acc": 0, "acc_norm": 0}


def test_acc_norm_counts_characters_not_bytes():
    """"éé" is 2 characters, 4 bytes; "abc" 3 of both. -3 / 2 < -4 / 3, but -3 / 4 > -4 / 3."""
    assert grade(Question("", ("éé", "abc"), 1), [-3, -4])["acc_norm"] == 1


def test_mc1_and_both_mc2_by_hand():
    """mc1 over -1, -2: the first is likelier. mc2 of e^ll = 0.1, 0.2, 0.4 with truths 1, 0, 1: 0.1 / 0.7 before the
    first false one,
    0.5 / 0.7 by label."""
    question = Question("", ("y", "n", "y", "n", "z"), 0, (1, 0, 1))
    found = grade(question, [-1, -2, math.log(0.1), math.log(0.2), math.log(0.4)])
    assert found == {"mc1": 1, "mc2": pytest.approx(1 / 7), "mc2_mask": pytest.approx(5 / 7)}
    assert grade(question, [-2, -1, -3, -2, -1])["mc1"] == 0
    far = grade(question, [-2, -1, -1000 + math.log(0.1), -1000 + math.log(0.2), -1000 + math.log(0.4)])
    assert far["mc2"] == pytest.approx(1 / 7)


def exam_of(subjects: dict[str, int]) -> choices.Exam:
    asked = {s: [(Question(f"{s}{i}", ("a", "b"), 0, subject=s), f"{s}{i}") for i in range(n)]
             for s, n in subjects.items()}
    return choices.Exam("mmlu" if "" not in subjects else "arc", 0, 0, asked, {})


def test_standard_error_by_hand():
    """3 of 4 right: sqrt(0.75 * 0.25 / 3) = 0.25."""
    result = measure(exam_of({"": 4}), {"": [[0, -1], [0, -1], [-1, 0], [0, -1]]})
    assert result["value"] == 0.75 and result["stderr"] == pytest.approx(0.25) and result["n"] == 4
    assert math.isnan(measure(exam_of({"": 1}), {"": [[0, -1]]})["stderr"])


def test_mmlu_is_the_plain_mean_over_subjects_not_over_questions():
    """law 1 of 2 and art 4 of 4: (0.5 + 1) / 2 = 0.75, pooled 5 / 6. Standard errors 0.5 and 0: 0.5 / 2 = 0.25."""
    result = measure(exam_of({"law": 2, "art": 4}), {"law": [[0, -1], [-1, 0]], "art": [[0, -1]] * 4})
    assert result["value"] == 0.75 and result["stderr"] == pytest.approx(0.25) and result["n"] == 6
    assert result["subjects"]["law"]["acc"] == 0.5 and result["subjects"]["art"]["acc_stderr"] == 0


def test_evaluate_counts_what_it_asked_cut_and_rejected(tmp_path, tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, width=32, dtype=torch.float32, scale=1.0)  # 256 positions
    records = [ARC | {"question": f"Why {i}?" + " and why" * i * i} for i in range(12)]
    file = tmp_path / "arc.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in records) + "{}\n")
    exam = read_exam("arc", file, shots=0)
    result = choices.evaluate(model, tokenizer, exam, micro_tokens=50)
    assert result["n"] == 12 and result["requests"] == 36 and [line for line, _ in result["rejects"][str(file)]] == [13]
    whole = [1 + len(tokenizer.encode(context)) for _, context in exam.asked[""]]
    assert result["cut"] == 3 * sum(n > 256 for n in whole) > 0 and result["bos"]
    again = choices.evaluate(model, tokenizer, exam, micro_tokens=10_000)
    assert result == again
    without = [len(tokenizer.encode(context)) for _, context in exam.asked[""]]
    assert choices.evaluate(model, tokenizer, exam, bos=False)["cut"] == 3 * sum(n > 256 for n in without)


def test_learned_positions_are_not_exceeded(tokenizer):
    model = small_model(vocab_size=tokenizer.vocab_size, rotary=0.0)  # 256 positions
    exam = choices.Exam("arc", 0, 0, {"": [(Question("", ("a", "b"), 0), "word " * 300)]}, {})
    assert choices.evaluate(model, tokenizer, exam)["cut"] == 2


def test_without_bos_the_context_is_shorter_by_one(tokenizer):
    asked = [(Question("", ("a", "b"), 0), "Q:")]
    (with_bos,), _ = choices.to_requests(tokenizer, asked, 64, bos=True)
    (without,), _ = choices.to_requests(tokenizer, asked, 64, bos=False)
    assert with_bos[0][0] == (tokenizer.bos_id, *without[0][0])


# ------------------------------------------------------------------------------------------- report

def result_of(task: str, value: float, **more) -> dict:
    metric = TASKS[task].metric
    return {"task": task, "name": TASKS[task].name, "shots": TASKS[task].shots, "limit": 0, "metric": metric,
            "value": value, "n": 10,
            "stderr": 0.1, metric: value, f"{metric}_stderr": 0.1, "request_sha256": "x", "rejects": {"f": []},
            "cut": 2, **more}


def test_the_section_has_a_row_for_each_model_and_their_spread(capsys):
    truth = {"mc1": 0.4, "mc1_stderr": 0.05, "mc2_mask": 0.6, "mc2_mask_stderr": math.nan}
    results = {"a": {"arc": result_of("arc", 0.2), "truthfulqa": result_of("truthfulqa", 0.5, **truth)},
               "b": {"arc": result_of("arc", 0.5, rejects={"f": [(3, "why")]})}}
    section = choices.choices_section(results)
    assert section["columns"] == ["model", "ARC-Challenge, 25 shots, acc_norm, %",
                                  *(f"TruthfulQA, 0 shots, {m}, %" for m in ("mc2", "mc1", "mc2_mask")),
                                  "average of the four, %", "requests cut"]
    assert all(len(row) == len(section["columns"]) for row in section["rows"])
    # 0.2 with standard error 0.1 is 3.2 of 16: (0.2 + 0.12005 -+ 1.96 sqrt(0.01 + 0.0037515)) / 1.24009
    assert section["rows"][0][1] == {"value": 20, "low": pytest.approx(7.27, abs=0.01),
                                     "high": pytest.approx(44.34, abs=0.01)}
    assert section["rows"][0][3]["value"] == 40 and section["rows"][0][4] == 60 and section["rows"][0][-1] == 4
    assert section["rows"][1][2] is None and section["rows"][2][:2] == ["largest - smallest", pytest.approx(30)]
    assert "10 of ARC-Challenge" in section["text"] and "rejected: 0" in section["text"]
    json.dumps(section, allow_nan=False)
    # (0.2 + 0.4 + 0.3 + 0.5) / 4 = 0.35
    four = {task: result_of(task, v, **truth) for task, v in zip(choices.LEADERBOARD, (0.2, 0.4, 0.3, 0.5),
                                                                 strict=True)}
    assert choices.choices_section({"a": four})["rows"][0][-2] == pytest.approx(35)
    other = {"a": {"arc": result_of("arc", 0.2)}, "b": {"arc": result_of("arc", 0.5, request_sha256="y")}}
    exits(capsys, lambda: choices.choices_section(other), "b was asked other questions of arc")
