#!/usr/bin/env bash
# The whole story: install, train a base model, SFT-1 to SFT-3, RL-1 and RL-2, evaluate, draw.
#   bash run.sh            15 to 35 minutes on two cores, after installation
#   bash run.sh --quick    the same story in three to ten minutes, weaker numbers
#   bash run.sh --table    trains and evaluates the other rows of the table too
#   bash run.sh --world-models    trains and evaluates the rows of the cost curve too (some hours)
# Any other argument (a config file, --seed=1, ..) goes to every script.
set -euo pipefail
. "$(dirname "$0")/setup.sh"

table=0
world_models=0
arguments=()
for argument in "$@"; do
  case "$argument" in
    --table) table=1 ;;
    --world-models) world_models=1 ;;
    *) arguments+=("$argument") ;;
  esac
done

# An empty array under `set -u` needs this form in bash 3, which macOS has.
run() {
  .venv/bin/python "$@" ${arguments[@]+"${arguments[@]}"}
}

# A row of the cost curve (environments/cost_curve.py). One that is finished is not trained again.
practise() {
  run train_rl.py --resume --eval_every=16 "$@"
}
# All rows but internal_sft ask the same 96 steps' questions. RL-2 begins after those of RL-1's steps.
first_80="--stage=rl1 --rl1_steps=80"
last_16="--stage=rl2 --rl1_steps=80 --rl2_steps=16"
all_96="--stage=rl2 --rl1_steps=0 --rl2_steps=96"

run train_sft.py
if [ $world_models = 1 ]; then
  # Practice in a world model of the calls of the first 16 steps.
  in_logs="--world_model=world_model_logs --sources=logs --logs_of=real_16"
  practise $last_16 --start=sft2 --out=real_16
  practise $first_80 --start=real_16 --out=logs_80 $in_logs
  practise $first_80 --start=real_16 --out=logs_confident_80 --rl1_environment=mixed $in_logs
fi
run train_rl.py
if [ $table = 1 ]; then
  run train_sft.py --stage=sft2 --start=base --out=sft2_alone
  run train_rl.py --stage=rl2 --start=base --out=rl2_alone --rl1_steps=0 --rl2_steps=96
  run train_rl.py --stage=rl2 --start=sft2 --out=rl2_from_sft2 --rl1_steps=0 --rl2_steps=96
fi
if [ $world_models = 1 ]; then
  practise $all_96 --start=sft2 --out=real_96
  practise $all_96 --start=sft3 --out=auxiliary_96 --observation_coef=0.1

  # The paper's: the policy imagines, which SFT-3 taught it; then the same about SFT's world.
  run train_sft.py --stage=sft3 --resume --out=sft3_paper --sft3_epochs=2 --sft3_observation_coef=1
  practise $first_80 --start=sft3_paper --out=internal_80 --rl1_environment=internal --rl1_scale=1
  practise $last_16 --start=internal_80 --out=internal_80_real_16
  practise $first_80 --start=sft3_paper --out=internal_sft_80 --rl1_environment=internal \
    --rl1_pool=rl1 --rl1_call_cost=0 --rl1_scale=0.03
  practise $last_16 --start=internal_sft_80 --out=internal_sft_80_real_16

  practise $first_80 --start=sft2 --out=distilled_80
  practise $last_16 --start=distilled_80 --out=distilled_80_real_16
  practise $last_16 --start=distilled_80 --out=distilled_96 --rl2_environment=distilled \
    --rl_lr=1.5e-4
  practise $all_96 --start=sft2 --out=scheduled_96 --rl2_environment=mixed --mixed_by=schedule
  practise $all_96 --start=sft2 --out=confident_96 --rl2_environment=mixed --mixed_by=confidence

  # A simulator that is told the gold facts.
  told="--world_model=world_model_told --gold_facts --world_model_epochs=1"
  practise $first_80 --start=sft2 --out=told_80 $told
  practise $last_16 --start=told_80 --out=told_80_real_16

  # World models that have seen a part of the titles.
  half="--world_model=world_model_half --sweep_share=0.5"
  practise $first_80 --start=sft2 --out=half_80 $half
  practise $last_16 --start=half_80 --out=half_80_real_16
  practise $all_96 --start=sft2 --out=half_confident_96 --rl2_environment=mixed $half
  practise $all_96 --start=sft2 --out=half_confident_half_96 --rl2_environment=mixed $half \
    --real_share=0.5
  quarter="--world_model=world_model_quarter --sweep_share=0.25"
  practise $first_80 --start=sft2 --out=quarter_80 $quarter
  practise $last_16 --start=quarter_80 --out=quarter_80_real_16
  practise $all_96 --start=sft2 --out=quarter_confident_96 --rl2_environment=mixed $quarter

  # The lines of the trade-offs (environments/trade_offs.py): SFT-3, and the price of a call.
  for weight in 0.3 1; do
    run train_sft.py --stage=sft3 --resume --out=sft3_1_$weight \
      --sft3_epochs=1 --sft3_observation_coef=$weight
  done
  for weight in 0.1 0.3; do
    run train_sft.py --stage=sft3 --resume --out=sft3_2_$weight \
      --sft3_epochs=2 --sft3_observation_coef=$weight
  done
  for price in 0 0.2 0.3; do
    practise $first_80 --start=sft2 --out=cost_$price --rl1_call_cost=$price
  done
fi
run eval.py
if [ $world_models = 1 ]; then
  sft3_rows=sft3,sft3_1_0.3,sft3_1_1,sft3_2_0.1,sft3_2_0.3,sft3_paper
  run world_model.py fidelity \
    --rows=sft2,$sft3_rows,world_model,world_model_half,world_model_quarter
  run -m environments.cost_curve
  run -m environments.trade_offs
fi
run plot.py
