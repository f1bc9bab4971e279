"""The paper's own recipe on the nano path, where config/nano.py's defaults depart from it.

    bash run.sh config/paper.py

SFT-3 gives an observation's token the weight of the policy's own, over two passes, and RL-1's
environment is the policy's imagination of the world that SFT-3 read about. Counts, steps and
rollouts are the paper's in both recipes.
"""

run = "paper"
sft3_epochs = 2
sft3_observation_coef = 1.0
rl1_environment = "internal"
rl1_pool = "rl1"
rl1_call_cost = 0.0
# What so small a model imagines is a weak teacher.
rl1_scale = 0.03

QUICK = {
    "run": "paper-quick",
    "base_tokens": 1_250_000,
    "pairs": 200,
    "coa": 1200,
    "cot": 200,
    "epochs": 1,
    "sft3_epochs": 1,
    "rl1_steps": 2,
    "rl2_steps": 3,
    "rl_questions": 240,
    "rl_lr": 1e-4,
    "call_cost": 0.0,
    "eval_questions": 20,
}
