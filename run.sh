#!/usr/bin/env bash
# The whole story: install, train a base model, SFT-1 to SFT-3, RL-1 and RL-2, evaluate, draw.
#   bash run.sh            15 to 35 minutes on two cores, after installation
#   bash run.sh --quick    the same story in three to eight minutes, weaker numbers
#   bash run.sh --table    trains and evaluates the other rows of the table too
# Any other argument (a config file, --seed=1, ..) goes to every script.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
table=0; args=()
for a in "$@"; do if [ "$a" = --table ]; then table=1; else args+=("$a"); fi; done
.venv/bin/python train_sft.py ${args[@]+"${args[@]}"}
.venv/bin/python train_rl.py ${args[@]+"${args[@]}"}
if [ $table = 1 ]; then
  .venv/bin/python train_sft.py ${args[@]+"${args[@]}"} --stage=sft2 --start=base --out=sft2_alone
  .venv/bin/python train_rl.py ${args[@]+"${args[@]}"} --stage=rl2 --start=base --out=rl2_alone --rl2_steps=96
  .venv/bin/python train_rl.py ${args[@]+"${args[@]}"} --stage=rl2 --start=sft2 --out=rl2_from_sft2 --rl2_steps=96
fi
.venv/bin/python eval.py ${args[@]+"${args[@]}"}
.venv/bin/python plot.py ${args[@]+"${args[@]}"}
