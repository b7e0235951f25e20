#!/usr/bin/env bash
# Trains a small byte model at 512 tokens on a CPU, extends it to 2048, exports it, and says what each step gains.
# Takes some minutes on two cores; docs/extending-context.md explains it. Needs lighthouse, and transformers for the end.
#
#     bash recipes/extend_demo.sh [FOLDER]      all that it makes is in FOLDER, which is new; extend-demo by default
set -euo pipefail
folder=${1:-extend-demo}
recipe=$(cd "$(dirname "$0")" && pwd)/extend_2048.toml
mkdir "$folder"
cd "$folder"

# Held-out text: the loss beyond 512 tokens, given all tokens before, and given no more than 512.
measure() {
  printf '%-33s ' "$1" >>gains.txt
  lighthouse eval "${@:2}" --only context --context 512 --sequences 16 --quiet | tee -a gains.txt
}

lighthouse pretrain quickstart --name short --set training.seq_len=512 --set training.global_batch_size=8 \
  --set training.local_batch_size=8 --set training.steps=200 --set checkpoint.interval=200 --set metrics.every=40 \
  --set lighthouse.enabled=false --set 'data.packing="documents"'
measure "trained at 512:" short --tokens 2048 --extrapolate

lighthouse pretrain "$recipe" --from short --name long --set 'checkpoint.also=[0]'
measure "the same, with the new rotation:" long/checkpoints/step-0 --attention dense
lighthouse recover long
measure "extended to 2048:" long

lighthouse strip long model
measure "exported, run by transformers:" model --recipe runs/long/recipe.toml

echo
cat gains.txt
