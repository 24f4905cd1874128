"""The peers' side of benchmarks/peers.py: transformers, TRL and PEFT on the same token ids, in their own environment.

Every task has modes, of which the table takes the fastest: a padded batch of the whole step, four of a quarter, rows
one by one, and TRL's packing. Trainers are the library's, with the data tokenised beforehand and in the order given.
"""
import tempfile

import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, RLOOConfig, RLOOTrainer, SFTConfig, SFTTrainer

from benchmarks import peers_work as work


def whole_numbers(vocab: int) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer whose text is the token ids, separated by spaces."""
    found = Tokenizer(models.WordLevel({str(i): i for i in range(vocab)}, unk_token="0"))
    found.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=found, eos_token="2", pad_token="0", unk_token="0")


class InTurn(transformers.TrainerCallback):
    """Lets the trainer do a step whenever it is this worker's turn."""

    def __init__(self, turns: work.Turns, units: list[int], items: list[int]):
        self.turns, self.units, self.items, self.losses = turns, units, items, []

    def on_train_begin(self, *_, **__):
        self.turns.wait()

    def on_step_end(self, args, state, control, **_):
        at = state.global_step - 1
        loss = self.losses[-1] if self.losses else None
        self.turns.done({"units": self.units[at], "items": self.items[at], "loss": loss})
        self.turns.wait()


def in_order(trainer: type, prepared: bool = True) -> type:
    """The trainer without shuffling, its losses kept; `prepared`: the data is tokenised, leave it alone."""
    class InOrder(trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *inputs, **options):
            found = super().compute_loss(*inputs, **options)
            self.turn.losses.append((found[0] if isinstance(found, tuple) else found).item())
            return found

    if prepared:
        InOrder._prepare_dataset = lambda self, dataset, *_, **__: dataset
    return InOrder


def options(mode: str, shape: work.Shape, rows: int = 0) -> dict:
    """The settings of all trainers, for steps of `rows` rows, 0: as many as the batch has items."""
    micro = {"micro": shape.batch // 4, "single": 1}.get(mode, shape.batch)
    return dict(
        output_dir=tempfile.mkdtemp(), report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True,
        per_device_train_batch_size=micro, gradient_accumulation_steps=(rows or shape.batch) // micro,
        max_steps=work.STEPS,
        learning_rate=work.LR, lr_scheduler_type="constant", max_grad_norm=work.CLIP, weight_decay=0.0,
        optim="adamw_torch_fused", use_cpu=shape.device == "cpu", bf16=shape.dtype == "bfloat16", fp16=False,
        gradient_checkpointing=shape.checkpointing, dataloader_pin_memory=False)


def run(trainer, turns: work.Turns, sizes: list[int], items: int = 0) -> None:
    """Step i takes rows i * batch onwards, of these sizes; they are `items` pairs or dialogues, 0: as many as rows."""
    rows = trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps
    groups = [sizes[at : at + rows] for at in range(0, len(sizes), rows)]
    trainer.turn = InTurn(turns, [sum(group) for group in groups], [items or len(group) for group in groups])
    trainer.add_callback(trainer.turn)
    trainer.train()


def load(path: str, kind=transformers.AutoModelForCausalLM, dtype=torch.float32, **more):
    return kind.from_pretrained(path, dtype=dtype, **more)


def sft(turns: work.Turns, shape: work.Shape, path: str, mode: str, model=None) -> None:
    rows = [{"input_ids": p.prompt + p.chosen, "labels": [-100] * len(p.prompt) + p.chosen} for p in work.pairs(shape)]
    settings = options(mode, shape)
    if mode == "packed":  # rows of max_length tokens, as many as hold about a batch
        mean = sum(len(row["input_ids"]) for row in rows) / len(rows)
        settings["per_device_train_batch_size"] = max(1, round(shape.batch * mean / shape.longest))
    args = SFTConfig(**settings, max_length=shape.longest, packing=mode == "packed")
    trainer = in_order(SFTTrainer, prepared=False)(
        model=model or load(path), args=args, train_dataset=Dataset.from_list(rows),
        processing_class=whole_numbers(shape.vocab))
    run(trainer, turns, [len(row["input_ids"]) for row in trainer.train_dataset])


def qlora(turns: work.Turns, shape: work.Shape, path: str, mode: str) -> None:
    four_bits = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=getattr(torch, shape.dtype))
    model = prepare_model_for_kbit_training(load(path, quantization_config=four_bits),
                                            use_gradient_checkpointing=shape.checkpointing)
    sft(turns, shape, path, mode, get_peft_model(model, adapter()))


def adapter() -> LoraConfig:
    return LoraConfig(r=work.RANK, lora_alpha=work.ALPHA, target_modules="all-linear", task_type="CAUSAL_LM")


def scorer(path: str):
    """A model with a score head."""
    model = load(path, transformers.AutoModelForSequenceClassification, num_labels=1)
    model.config.pad_token_id = 0
    return model


def preferences(turns: work.Turns, shape: work.Shape, path: str, mode: str, task: str) -> None:
    """DPO or a reward model; a row for each pair, so that a dialogue of four rated turns is four rows."""
    pairs = [turn for dialogue in work.rated(shape, task) for turn in dialogue]
    settings = options(mode, shape, len(pairs) // work.STEPS) | {"max_length": None}
    if task.startswith("dpo"):
        trainer = DPOTrainer
        more = {"peft_config": adapter()} if "lora" in task else {
            "ref_model": load(path, dtype=getattr(torch, shape.dtype))}
        model, args = load(path), DPOConfig(**settings, beta=work.BETA, precompute_ref_log_probs="online" not in task)
        columns = {"prompt_ids": [p.prompt for p in pairs], "chosen_ids": [p.chosen for p in pairs],
                   "rejected_ids": [p.rejected for p in pairs]}
    else:
        trainer, model, args, more = RewardTrainer, scorer(path), RewardConfig(**settings), {}
        columns = {"chosen_ids": [p.prompt + p.chosen for p in pairs],
                   "rejected_ids": [p.prompt + p.rejected for p in pairs]}
    made = in_order(trainer)(model=model, args=args, train_dataset=Dataset.from_dict(columns),
                             processing_class=whole_numbers(shape.vocab), **more)
    run(made, turns, [len(p.prompt) * 2 + len(p.chosen) + len(p.rejected) for p in pairs], shape.batch)


def rloo(turns: work.Turns, shape: work.Shape, path: str) -> None:
    prompts = [" ".join(map(str, prompt)) for prompt in work.prompts(shape, work.RL_PROMPTS * work.STEPS)]
    rows = work.RL_PROMPTS * work.RL_REPLIES
    settings = options("", shape) | {"per_device_train_batch_size": rows, "gradient_accumulation_steps": 1}
    args = RLOOConfig(**settings, num_generations=work.RL_REPLIES, max_completion_length=work.NEW, beta=0.05,
                      temperature=1.0, shuffle_dataset=False)
    model = load(path)
    model.generation_config.eos_token_id = None
    trainer = RLOOTrainer(model=model, reward_funcs=scorer(path), args=args,
                          train_dataset=Dataset.from_dict({"prompt": prompts}),
                          processing_class=whole_numbers(shape.vocab),
                          reward_processing_classes=whole_numbers(shape.vocab))
    run(trainer, turns, [1] * (rows * work.STEPS))


class Limits(transformers.StoppingCriteria):
    """Row i ends after limits[i] new tokens."""

    def __init__(self, start: int, limits: list[int]):
        self.ends = start + torch.tensor(limits)

    def __call__(self, ids, scores, **_):
        return ids.shape[1] >= self.ends.to(ids.device)


def sample(turns: work.Turns, shape: work.Shape, path: str, size: str, how: str = "top_p") -> None:
    model = load(path, dtype=getattr(torch, shape.dtype)).to(shape.device).eval()
    prompts, limits, batch, settings = work.sampling(shape, size, how)
    settings = settings | {"do_sample": True, "top_k": 0} if "top_p" in settings else {"do_sample": False}

    def generate(prompts: list[list[int]], limits: list[int]) -> None:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=shape.device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=shape.device)
        stop = transformers.StoppingCriteriaList([Limits(longest, limits)]) if len(set(limits)) > 1 else None
        model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=max(limits), eos_token_id=None,
                       pad_token_id=0, stopping_criteria=stop, **settings)

    while True:
        turns.wait()
        with torch.no_grad():
            for at in range(0, len(prompts), batch):
                generate(prompts[at : at + batch], limits[at : at + batch])
        turns.done({"units": sum(limits)})


def main() -> None:
    turns = work.Turns()
    task, shape, path = work.arguments()
    task, _, mode = task.partition(", ")
    kind, *rest = task.split()
    if kind in ("sft", "qlora"):
        {"sft": sft, "qlora": qlora}[kind](turns, shape, path, mode)
    elif kind in ("dpo", "reward"):
        preferences(turns, shape, path, mode, task)
    elif kind == "sample":
        sample(turns, shape, path, *rest)
    else:
        rloo(turns, shape, path)


if __name__ == "__main__":
    main()
