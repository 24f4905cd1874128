#!/bin/sh
# The speedrun's shipped recipe: SFT, preferences between the model's own replies, DPO. Called with DATA OUT SECONDS SEED.
set -e
data=$1 out=$2 seed=$4
export OMP_NUM_THREADS=1   # a second thread makes such small models faster, but takes more CPU time in all

python sft.py --config configs/tiny/sft.toml data=$data/sft.jsonl eval_data= epochs=2 samples=0 seed=$seed out=$out/sft
head -n 3000 $data/prompts.jsonl > $out/prompts.jsonl
python -m data.tiny.pairs model=$out/sft/model prompts=$out/prompts.jsonl seed=$seed out=$out/pairs.jsonl
python dpo.py --config configs/tiny/dpo.toml model=$out/sft/model data=$out/pairs.jsonl eval_data= samples=0 \
    seed=$seed out=$out/dpo
mv $out/dpo/model $out/model
