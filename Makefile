# make demo      the whole recipe in the tiny world, ends with the table     make test    the tests
# make results   the README's table: the recipe for five seeds               make lint    ruff
# make bench     throughput here, beside the floor its matmuls set           make base    pretrain the tiny base anew
# make bench-peers   the same work by transformers + TRL + PEFT, in turns
#
# Each makes the environment first if there is none, and goes on from where an earlier run stopped.
# make demo SEED=3 is another run; make demo QUICK=1 the same path in a minute, with numbers that mean nothing.

PYTHON ?= .venv/bin/python
SEED ?= 0
SEEDS = 0 1 2 3 4
ifdef QUICK
override SEED = 99
SMALL_DATA = demos=300 prompts=150 more_prompts=50 evals=4
FEW_STEPS = max_steps=8
FEW_PPO = steps=2 batch=8
endif
ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
TOOLS = .venv/tools
endif

.PHONY: demo results test lint bench bench-peers gpu gpu-tests gpu-kernels gpu-training base
.SECONDARY:
.DELETE_ON_ERROR:

demo: $(ENVIRONMENT) recipe-$(SEED)
	@printf '\n== 9/9 judge: every model answers the held-out dialogues\n'
	$(PYTHON) judge.py --config configs/tiny/judge.toml seeds='[$(SEED)]' data=runs/tiny/$(SEED)/data/test.jsonl out=runs/tiny/$(SEED)/judge
	$(PYTHON) -m benchmarks.overoptimisation runs='["PPO=runs/tiny/$(SEED)/ppo"]' start=runs/tiny/$(SEED)/sft/model data=runs/tiny/$(SEED)/data/dev.jsonl out=runs/tiny/$(SEED)/judge/overoptimisation

# From the preferences on two jobs share the cores: sampling gains little from a second thread.
recipe-%: runs/tiny/%/pairs.jsonl
	OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) $(MAKE) --no-print-directory -j2 --output-sync=target \
		runs/tiny/$*/pairs_reward.jsonl $(addprefix runs/tiny/$*/,$(addsuffix /model/config.json,dpo sft_chosen dpo_without_sft))
	$(MAKE) --no-print-directory runs/tiny/$*/ppo/model/config.json

runs/tiny/%/data/test.jsonl: | $(ENVIRONMENT)
	@printf '\n== 1/9 data: demonstrations, prompts, held-out dialogues\n'
	$(PYTHON) -m data.tiny.build part=data seed=$* out=$(@D) $(SMALL_DATA)

runs/tiny/%/sft/model/config.json: runs/tiny/%/data/test.jsonl
	@printf '\n== 2/9 SFT: imitate the demonstrations\n'
	$(PYTHON) sft.py --config configs/tiny/sft.toml seed=$* data=$(<D)/sft.jsonl eval_data=$(<D)/sft_dev.jsonl out=runs/tiny/$*/sft $(FEW_STEPS)

runs/tiny/%/pairs.jsonl: runs/tiny/%/sft/model/config.json
	@printf '\n== 3/9 preferences: the SFT model answers twice, annotators choose\n'
	$(PYTHON) -m data.tiny.pairs seed=$* model=$(<D) prompts=runs/tiny/$*/data/dev.jsonl out=runs/tiny/$*/pairs_dev.jsonl
	$(PYTHON) -m data.tiny.pairs seed=$* model=$(<D) prompts=runs/tiny/$*/data/prompts.jsonl out=$@

runs/tiny/%/dpo/model/config.json: runs/tiny/%/pairs.jsonl
	@printf '\n== 4/9 DPO: from the SFT model, on these preferences\n'
	$(PYTHON) dpo.py --config configs/tiny/dpo.toml seed=$* model=runs/tiny/$*/sft/model data=$< eval_data=$(@:dpo/model/config.json=pairs_dev.jsonl) out=runs/tiny/$*/dpo $(FEW_STEPS)

runs/tiny/%/sft_chosen/model/config.json: runs/tiny/%/pairs.jsonl
	@printf '\n== 5/9 control: more SFT, on the chosen replies\n'
	$(PYTHON) sft.py --config configs/tiny/sft_chosen.toml seed=$* model=runs/tiny/$*/sft/model data=$< out=runs/tiny/$*/sft_chosen $(FEW_STEPS)

runs/tiny/%/dpo_without_sft/model/config.json: runs/tiny/%/pairs.jsonl
	@printf '\n== 6/9 ablation: DPO without SFT\n'
	$(PYTHON) dpo.py --config configs/tiny/dpo_without_sft.toml seed=$* data=$< out=runs/tiny/$*/dpo_without_sft $(FEW_STEPS)

runs/tiny/%/pairs_test.jsonl: runs/tiny/%/pairs.jsonl
	$(PYTHON) -m data.tiny.pairs seed=$* model=runs/tiny/$*/sft/model prompts=runs/tiny/$*/data/test.jsonl out=$@

# Three times the preferences: DPO's alone it learns by heart.
runs/tiny/%/pairs_reward.jsonl: runs/tiny/%/pairs_test.jsonl
	@printf '\n== 7/9 reward model: from the SFT model, on these and more preferences\n'
	$(PYTHON) -m data.tiny.pairs seed=10$* model=runs/tiny/$*/sft/model prompts=runs/tiny/$*/data/more_prompts.jsonl out=runs/tiny/$*/pairs_more.jsonl
	cat runs/tiny/$*/pairs.jsonl runs/tiny/$*/pairs_more.jsonl > $@

runs/tiny/%/reward/model/config.json: runs/tiny/%/pairs_reward.jsonl
	$(PYTHON) reward.py --config configs/tiny/reward.toml seed=$* model=runs/tiny/$*/sft/model data=$< eval_data=runs/tiny/$*/pairs_test.jsonl demos=runs/tiny/$*/data/sft.jsonl out=runs/tiny/$*/reward $(FEW_STEPS)

runs/tiny/%/ppo/model/config.json: runs/tiny/%/reward/model/config.json
	@printf '\n== 8/9 PPO: from the SFT model, against the reward model\n'
	$(PYTHON) ppo.py --config configs/tiny/ppo.toml seed=$* model=runs/tiny/$*/sft/model reward_model=$(<D) data=runs/tiny/$*/pairs.jsonl out=runs/tiny/$*/ppo $(FEW_PPO)

# At KL coefficient 0 nothing holds the policy back: what the reward model is worth then.
runs/tiny/%/ppo_without_kl/model/config.json: runs/tiny/%/reward/model/config.json
	$(PYTHON) ppo.py --config configs/tiny/ppo_without_kl.toml seed=$* model=runs/tiny/$*/sft/model reward_model=$(<D) data=runs/tiny/$*/pairs.jsonl out=runs/tiny/$*/ppo_without_kl

results: $(ENVIRONMENT) $(SEEDS:%=recipe-%) $(SEEDS:%=runs/tiny/%/ppo_without_kl/model/config.json)
	$(PYTHON) judge.py --config configs/tiny/results.toml
	cp runs/tiny/results/report.json runs/tiny/results/samples.txt benchmarks/results/tiny/
	$(PYTHON) -m benchmarks.rlhf
	$(PYTHON) -m benchmarks.overoptimisation runs='["KL coefficient 0.2=runs/tiny/0/ppo", "KL coefficient 0=runs/tiny/0/ppo_without_kl"]' out=benchmarks/results/tiny/overoptimisation
	$(PYTHON) -m benchmarks.readme

test: $(TOOLS)
	$(PYTHON) -m pytest

lint: $(TOOLS)
	$(PYTHON) -m ruff check .

bench: $(ENVIRONMENT)
	$(PYTHON) -m benchmarks.throughput out=benchmarks/results/throughput.json
	$(PYTHON) -m benchmarks.sampling out=benchmarks/results/sampling.json
	$(PYTHON) -m benchmarks.readme

# This code and transformers + TRL + PEFT in turns, about an hour; a quiet machine is asked for.
bench-peers: $(ENVIRONMENT) .venv-peers/installed
	$(PYTHON) -m benchmarks.peers shapes='["15 M", "110 M"]' rounds=4
	$(PYTHON) -m benchmarks.peers shapes='["2 M"]' rounds=6
	$(PYTHON) -m benchmarks.readme

# Everything that waits for a GPU, in ten minutes; PYTHON=python3 where one with torch is installed. What fails does not stop the rest.
gpu: $(TOOLS)
	$(MAKE) --keep-going gpu-tests gpu-kernels gpu-training

gpu-tests:
	timeout --signal=INT 120 $(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null) \
		tests/test_attention*.py tests/test_logprobs*.py tests/test_nf4.py tests/test_fused.py
	timeout --signal=INT 40 $(PYTHON) -m pytest tests/test_model.py -k 'triton or graphs'

gpu-kernels:
	$(PYTHON) -m benchmarks.kernels --budget 270
	$(PYTHON) -m benchmarks.readme

gpu-training:
	timeout 80 $(PYTHON) -m benchmarks.throughput device=cuda out=benchmarks/results/throughput_gpu.json
	timeout 80 $(PYTHON) -m data.tiny.build documents=60000 out=runs/tiny/base_gpu

base: $(ENVIRONMENT)
	$(PYTHON) -m data.tiny.build ship=data/tiny/base

# torch first and by itself: its version decides what the rest may bring.
.venv/installed: pyproject.toml
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11: install a newer one"; exit 2; }
	python3 -m venv .venv
	.venv/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv/bin/pip install --quiet --disable-pip-version-check --editable .
	@touch $@

# What peers.py measures us against, as published in benchmarks/results/peers.json.
.venv-peers/installed:
	python3 -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2
	@touch $@

.venv/tools: .venv/installed
	.venv/bin/pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@touch $@
