"""Direct preference optimization: learn from pairs of replies, with no reward model and no sampling.

    r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))      implicit reward, nats
    loss    = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l))

log pi(y|x) is the sum over the tokens of the reply, its end-of-sequence token included. The reference is
the model training starts from; its log-probabilities never change, so they are computed once and cached.
A dialogue rated at several turns is one tree (`data/trees.py`): all its pairs in one forward pass.

    python dpo.py --config configs/tiny/dpo.toml            loss 0.693 at the first step, accuracy 0.8 at the end

Other losses put another function of the margin in place of -log sigmoid, and SimPO and ORPO another score of a reply
in place of its log-probability against the reference's: RELATIVES, where yours goes, too.

Rafailov et al. 2023 (arXiv:2305.18290), Eq. 7; Tunstall et al. 2023 (arXiv:2310.16944), dDPO.
"""
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import lora
import runtime
from data.dry_run import dry_run
from data.pack import Batch, check_positions, micro_batches, sample_replies, step_trees, steps_per_epoch
from data.store import Trees, fit, load_trees
from data.tokenizer import OWN, Tokenizer, adopt_template, check_template, load_tokenizer
from data.trees import CHOSEN, Tree
from kernels.logprobs import linear_logprobs
from model import Transformer
from runtime import distributed, fail


@dataclass(frozen=True)
class Config(runtime.DataSettings):
    model: str = "runs/tiny/0/sft/model"  # Hugging Face directory to start from, usually the result of sft.py
    ref_model: str = ""              # the reference, for losses that have one; "": the same as model
    data: str = "runs/tiny/0/pairs.jsonl"  # JSONL of preferences (data/formats.py)
    out: str = "runs/dpo"            # folder of the run
    ref_cache: str = ""              # file of reference log-probabilities, to share; "": in the run's folder

    loss: str = "dpo"                # or a relative: cdpo, robust, hinge, ipo, ipo_mean, simpo, orpo (RELATIVES)
    beta: float = 0.3                # pull towards the reference, 0.01-0.5; IPO's tau; SimPO's 2-2.5, ORPO's lambda 0.1
    label_smoothing: float = 0.1     # share of labels taken to be wrong (cdpo and robust only), 0-0.4
    gamma: float = 1.0               # lead that the chosen reply should have (simpo only), 0.3-1.6
    sft_coef: float = 0.0            # weight of the chosen replies' SFT loss per token: 0 or 0.1-1; ORPO's is 1
    lr: float = 2e-4                 # peak learning rate, 2e-4 for the tiny model, 5e-7 for 7B
    samples: int = 3                 # replies to show at the end

    def __post_init__(self):
        super().__post_init__()
        check_template(self.template)
        runtime.check_ranges(self, beta=(1e-6, inf), label_smoothing=(0, 0.499), gamma=(0, inf), sft_coef=(0, inf),
                             samples=(0, inf))
        if self.loss not in RELATIVES:
            fail(f"loss is {self.loss!r}, expected {' or '.join(map(repr, RELATIVES))}")
        if self.ref_model and not RELATIVES[self.loss].reference:
            fail(f"ref_model is {self.ref_model}, but loss={self.loss} has no reference: leave ref_model out")
        if self.loss == "orpo" and not self.sft_coef:
            fail("sft_coef is 0, but ORPO is the SFT loss with a term for the rejected reply: set sft_coef=1")


# -------------------------------------------------------------------------------------- the losses

def dpo_loss(
    policy_chosen_logprobs: Tensor,    # [B] log pi(y_w | x), summed over response tokens, nats
    policy_rejected_logprobs: Tensor,  # [B] log pi(y_l | x)
    ref_chosen_logprobs: Tensor,       # [B] log pi_ref(y_w | x), no gradient
    ref_rejected_logprobs: Tensor,     # [B] log pi_ref(y_l | x), no gradient
    beta: float,                       # strength of the pull towards the reference, no unit
    relative: Callable[[Tensor, float, float], Tensor] | None = None,  # a function below, for another loss
    setting: float = 0.0,              # of the relative: label_smoothing or gamma
) -> tuple[Tensor, dict[str, Tensor]]:
    """DPO loss (Rafailov et al. 2023, arXiv:2305.18290, Eq. 7) and its metrics.

        r(x, y) = beta * (log pi(y|x) - log pi_ref(y|x))      implicit reward, nats
        loss    = mean over pairs of -log sigmoid(r(x, y_w) - r(x, y_l))

    Returns the loss [] and detached metrics []. A policy equal to its reference scores
    log 2 = 0.6931 with accuracy 0 (a tie is not a win): every run must start there.
    With `relative` the mean of its losses is returned, with the same metrics; what is given as log pi may then be
    another score of a reply (RELATIVES).
    Raises ValueError if beta is not positive: at 0 the loss ignores the policy.
    """
    if beta <= 0:
        raise ValueError(f"beta is {beta}, expected a positive number: set e.g. beta=0.1")
    chosen_rewards = beta * (policy_chosen_logprobs - ref_chosen_logprobs)        # [B]
    rejected_rewards = beta * (policy_rejected_logprobs - ref_rejected_logprobs)  # [B]
    margins = chosen_rewards - rejected_rewards                                   # [B]
    # logsigmoid, not sigmoid().log(): in fp32 the latter is -inf from a margin of -89 down.
    loss = -F.logsigmoid(margins).mean()
    if relative is not None:
        loss = relative(margins, beta, setting).mean()
    metrics = {"loss": loss, "margin": margins, "accuracy": (margins > 0).float(),
               "rewards_chosen": chosen_rewards, "rewards_rejected": rejected_rewards,
               "logprobs_chosen": policy_chosen_logprobs, "logprobs_rejected": policy_rejected_logprobs}
    return loss, {name: value.detach().mean() for name, value in metrics.items()}


# The relatives put another function of the margins m [B] in place of -log sigmoid(m); each returns losses [B].
def cdpo_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Conservative DPO (Mitchell 2023): cross-entropy if a share e of labels is flipped, least at sigmoid(m) = 1 - e"""
    return -(1 - label_smoothing) * F.logsigmoid(margins) - label_smoothing * F.logsigmoid(-margins)


def robust_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO (Chowdhury et al. 2024, arXiv:2403.00409): unbiased for DPO's loss if a share e < 1/2 is flipped."""
    if label_smoothing >= 0.5:
        raise ValueError(f"label_smoothing is {label_smoothing}, expected below 0.5")
    losses = -(1 - label_smoothing) * F.logsigmoid(margins) + label_smoothing * F.logsigmoid(-margins)
    return losses / (1 - 2 * label_smoothing)


def hinge_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """A hinge (SLiC-HF, Zhao et al. 2023, arXiv:2305.10425)."""
    return F.relu(1 - margins)


def ipo_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """IPO (Azar et al. 2023, arXiv:2310.12036, Eq. 17; beta is their tau): m / beta is to be 1 / (2 beta) nats."""
    return (margins / beta - 1 / (2 * beta)).square()


def simpo_loss(margins: Tensor, beta: float, gamma: float) -> Tensor:
    """SimPO (Meng et al. 2024, arXiv:2405.14734, Eq. 6), on mean_logprobs: the chosen reply is to lead by gamma."""
    return -F.logsigmoid(margins - gamma)


def orpo_loss(margins: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """ORPO's second term (Hong et al. 2024, arXiv:2403.07691, Eq. 6 and 7), on log_odds; beta is their lambda.

    The first is the SFT loss of the chosen replies, sft_coef=1. m / beta is the log of the odds' ratio.
    """
    return -beta * F.logsigmoid(margins / beta)


# What stands for log pi(y|x): scores [B] of replies, from the sums of their log-probabilities [B] and their tokens [B].
def sum_logprobs(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums


def mean_logprobs(sums: Tensor, lengths: Tensor) -> Tensor:
    return sums / lengths


def log_odds(sums: Tensor, lengths: Tensor) -> Tensor:
    """log p / (1 - p), where log p is the mean over the tokens."""
    logprobs = (sums / lengths).clamp(max=-1e-6)  # a reply that is certain has infinite odds
    return logprobs - torch.log(-torch.expm1(logprobs))


class Relative(NamedTuple):
    """A loss that the config can name."""

    loss: Callable[[Tensor, float, float], Tensor] | None = None    # of the margins; None: DPO's own
    score: Callable[[Tensor, Tensor], Tensor] = sum_logprobs        # of a reply
    reference: bool = True                                          # whether the reference's score is taken off
    setting: str = "label_smoothing"                                # which setting the loss gets beside beta


RELATIVES = {
    "dpo": Relative(),
    "cdpo": Relative(cdpo_loss),
    "robust": Relative(robust_loss),
    "hinge": Relative(hinge_loss),
    "ipo": Relative(ipo_loss),
    "ipo_mean": Relative(ipo_loss, mean_logprobs),  # the form TRL uses
    "simpo": Relative(simpo_loss, mean_logprobs, reference=False, setting="gamma"),
    "orpo": Relative(orpo_loss, log_odds, reference=False),
}


# ---------------------------------------------------------------------------------------- the data

def load_data(path: str, tokenizer: Tokenizer, config: Config, name: str) -> Trees:
    """The file as trees; the chosen responses of a dialogue lie in the trunk, each rejected one is a leaf:

        BOS <|user|> \\n  Hi  EOS \\n <|assistant|> \\n  Hello !  EOS | leaf: Go away EOS
        trunk        no loss                           |  chosen        | rejected, branches after the prompt
    """
    trees = load_trees(path, tokenizer, config.max_length, cache=config.cache, columns=config.columns)
    if not trees.counts["preferences"] or trees.counts["ranked"]:
        fail(f"{path}: holds no preference pairs, expected records with 'prompt', 'chosen' and 'rejected'")
    return fit(trees, config.max_length, path, name)


def response_sums(model: Transformer, batch: Batch) -> Tensor:
    """Log-probability of every response given its prompt, summed over its tokens, [B] nats."""
    hidden = model.hidden(batch.tokens, batch.positions, batch.layout)                           # [N, D]
    logprobs, _ = linear_logprobs(hidden[batch.predictors], model.head_weight, batch.targets)    # [M]
    return batch.sums(logprobs)


# ----------------------------------------------------------------------------------- the reference

def load_reference(policy: Transformer, template: str, config: Config, device: torch.device) -> Transformer:
    """The policy as it is before its first update, or the model the config names."""
    if not config.ref_model:
        return policy
    whole = replace(config, lora_rank=0, quantize="none")
    ref = lora.load_base(config.ref_model, whole, device, scored=False)
    check_positions(ref.config, "max_length", config.max_length)
    adopt_template(ref, load_tokenizer(config.ref_model), "" if template == OWN else template)
    return lora.shard(ref, whole, device)


@torch.no_grad()
def compute_reference(ref: Transformer, trees: Sequence[Tree], micro_tokens: int, device: torch.device) -> Tensor:
    """Log-probability sums of all responses under the reference, [responses of all trees] nats, on the CPU."""
    sums = torch.zeros(sum(len(tree.responses) for tree in trees))
    for batch in micro_batches(trees, micro_tokens):
        sums[batch.response_ids] += batch.weight * response_sums(ref, batch.to(device)).float().cpu()
    return distributed.all_reduce(sums)


def set_reference(policy: Transformer, template: str, sets: list[Trees], run: Path, config: Config, device) -> None:
    """Give all trees the log-probability sums of their responses under the reference; computed once, kept in a file."""
    file = Path(config.ref_cache) if config.ref_cache else run / "ref_logprobs.safetensors"
    made_from = {"reference": runtime.file_hash(config.ref_model or config.model),
                 "precision": str(policy.compute_dtype),
                 "quantize": "none" if config.ref_model else config.quantize,  # the policy's own base, or a whole model
                 "data, template or max_length": " ".join(trees.digest for trees in sets)}
    remedy = "delete it, or set ref_cache= to another file"
    if distributed.any_rank(file.is_file()):
        sums = runtime.read_cache(file, "reference log-probabilities", made_from, remedy)
    else:
        ref = load_reference(policy, template, config, device)
        sums = torch.cat([compute_reference(ref, trees, config.micro_tokens, device) for trees in sets])
        runtime.write_cache(file, sums, made_from, run)
        print(f"reference log-probabilities of {len(sums)} responses written to {file}")
    for trees, part in zip(sets, sums.split([len(trees.responses) for trees in sets]), strict=True):
        trees.ref_sums = part


def reference_sums(batch: Batch) -> Tensor:
    """The same of a batch's responses, [B] nats, as set_reference has left them with their trees."""
    return torch.cat([tree.ref_sums for tree in batch.trees])


# ------------------------------------------------------------------------------------------ training

def chosen_tokens(trees: Sequence[Tree]) -> int:
    """Tokens of the chosen replies, which the SFT term is a mean over."""
    return sum(r.end - r.start for tree in trees for r in tree.responses if r.side == CHOSEN)


def train_step(policy: Transformer, batch: Batch, config: Config, pairs: int,
               tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's part of the step's loss and metrics, means over the step's `pairs`.

    With sft_coef the chosen replies' SFT loss is added (RPO), a mean over the step's `tokens` of them as in sft.py. So
    does Pang et al. 2024 (arXiv:2404.19733, Eq. 1) divide by length; in Liu et al. 2024 (arXiv:2405.16436, Alg. 2) it
    is a sum, whose weight against DPO's loss grows with the replies.
    """
    relative = RELATIVES[config.loss]
    sums = response_sums(policy, batch)                                          # [B]
    scores = relative.score(sums, batch.lengths)                                 # [B]
    ref_scores = torch.zeros_like(scores)
    if relative.reference:
        ref_scores = relative.score(reference_sums(batch).to(sums), batch.lengths)
    logprobs = (*batch.sides(scores), *batch.sides(ref_scores))                  # chosen, rejected, twice: four [pairs]
    loss, metrics = dpo_loss(*logprobs, config.beta, relative.loss, getattr(config, relative.setting))
    weight = batch.weight * batch.pairs / pairs
    loss, metrics = weight * loss, {name: weight * value for name, value in metrics.items()}
    if config.sft_coef:
        sft_loss = -batch.weight * batch.sides(sums)[0].sum() / tokens
        loss = loss + config.sft_coef * sft_loss
        metrics |= {"loss": loss.detach(), "sft_loss": sft_loss.detach()}
    return loss, metrics


@torch.no_grad()
def evaluate(policy: Transformer, trees: Trees, config: Config, device: torch.device) -> dict[str, float]:
    """Loss, margin and accuracy over held-out pairs."""
    pairs, tokens, sums = sum(tree.pairs for tree in trees), chosen_tokens(trees), runtime.Sums()
    for batch in micro_batches(trees, config.micro_tokens):
        sums.add(train_step(policy, batch.to(device), config, pairs, tokens)[1])
    return distributed.all_reduce_metrics({f"eval_{name}": sums[name] for name in ("loss", "margin", "accuracy")})


def main(config: Config) -> None:
    if config.dry_run:
        return dry_run(config, load_data)
    device = runtime.setup(config.device, config.seed, config.threads, config.kernels, config.dtype)
    tokenizer = load_tokenizer(config.model)
    policy = lora.load_base(config.model, config, device, scored=False)
    check_positions(policy.config, "max_length", config.max_length)
    print(adopt_template(policy, tokenizer, config.template))
    trees = load_data(config.data, tokenizer, config, "data")
    eval_trees = load_data(config.eval_data, tokenizer, config, "eval_data") if config.eval_data else []
    lora.shard(lora.adapt(policy, config), config, device)

    run = runtime.Run(config, {"data": config.data, "model": config.model, "code": __file__})
    sets, template = [trees, eval_trees] if eval_trees else [trees], config.template or tokenizer.template
    if RELATIVES[config.loss].reference:
        set_reference(policy, template, sets, run.folder, config, device)
    optimizer = runtime.adamw(policy, config.lr, config.weight_decay, config.beta2, config.lora_plus, config.adam_eps)
    steps = config.max_steps or config.epochs * steps_per_epoch(len(trees), config.batch)
    run.resume(policy, optimizer, steps, shown=("loss", "margin", "accuracy", "pairs_per_s"))

    for step in run.steps_left():
        began = time.perf_counter()
        lr = runtime.set_learning_rate(optimizer, step, steps, config)
        drawn = step_trees(trees, config.batch, step, config.seed)
        pairs, tokens = sum(tree.pairs for tree in drawn), chosen_tokens(drawn)
        metrics = runtime.Sums()
        for batch in micro_batches(drawn, config.micro_tokens):
            loss, parts = train_step(policy, batch.to(device), config, pairs, tokens)
            loss.backward()
            metrics.add(parts)
        metrics = distributed.all_reduce_metrics(metrics)
        metrics["grad_norm"] = distributed.clip_grad_norm(policy, config.max_grad_norm)
        runtime.check_finite(metrics["loss"], metrics["grad_norm"], step, [tree.record for tree in drawn])
        optimizer.step()
        optimizer.zero_grad()
        metrics |= {"lr": lr, "pairs": pairs, "tokens": sum(tree.tokens for tree in drawn),
                    "pairs_per_s": pairs / (time.perf_counter() - began)}
        if eval_trees and run.due(config.eval_every, step + 1):
            metrics |= evaluate(policy, eval_trees, config, device)
        run.end_step(metrics, policy, optimizer)

    if run.finished:
        policy = lora.save_result(policy, run.folder, tokenizer, config, probe=trees[0].trunk[:64].tolist())
        run.note(sample_replies(policy, tokenizer, eval_trees or trees, config.samples, config.seed))
    run.close()


if __name__ == "__main__":
    main(runtime.load_config(Config, __doc__))
