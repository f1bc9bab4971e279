"""The nano path: everything is made from a seed.

Its values are the defaults of the settings in the scripts. QUICK is the short form, --quick: the
same story with weaker numbers.
"""

QUICK = {
    "run": "quick",
    "base_tokens": 1_250_000,
    "pairs": 200,
    "coa": 1200,
    "cot": 200,
    "epochs": 1,
    "sweep_share": 0.5,
    "world_model_epochs": 6,
    "rl1_steps": 2,
    "rl2_steps": 3,
    "rl_questions": 240,
    "rl_lr": 1e-4,
    "rl1_scale": 1.0,
    "call_cost": 0.0,
    "rl1_call_cost": 0.0,
    "eval_questions": 20,
}
