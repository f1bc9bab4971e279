"""The nano path: everything is made here, from a seed. The values are the defaults of common.Settings."""
QUICK = dict(run="quick", base_tokens=600_000, pairs=300, coa=800, cot=160, epochs=1, rl1_steps=8, rl2_steps=4,
             rl_questions=600, eval_questions=30)
