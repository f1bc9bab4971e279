#!/usr/bin/env bash
# The whole story: install, train a base model, SFT-1 to SFT-3, RL-1 and RL-2, evaluate, draw.
#   bash run.sh            15 to 35 minutes on two cores, after installation
#   bash run.sh --quick    the same story in three to ten minutes, weaker numbers
#   bash run.sh --table    trains and evaluates the other rows of the table too
# Any other argument (a config file, --seed=1, ..) goes to every script.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

table=0
arguments=()
for argument in "$@"; do
  if [ "$argument" = --table ]; then
    table=1
  else
    arguments+=("$argument")
  fi
done

# An empty array under `set -u` needs this form in bash 3, which macOS has.
run() {
  .venv/bin/python "$@" ${arguments[@]+"${arguments[@]}"}
}

run train_sft.py
run train_rl.py
if [ $table = 1 ]; then
  run train_sft.py --stage=sft2 --start=base --out=sft2_alone
  run train_rl.py --stage=rl2 --start=base --out=rl2_alone --rl2_steps=96
  run train_rl.py --stage=rl2 --start=sft2 --out=rl2_from_sft2 --rl2_steps=96
fi
run eval.py
run plot.py
