"""R1-Distill-Qwen-1.5B, the smallest reasoning model that the paper begins with.

An adapter on a base of 4 bits, for a Mac with 16 GB or one GPU:

    python train_sft.py config/r1-distill-1.5b.py --train_data=.. --eval_data=.. --corpus=..

The arguments are those of config/smollm2.py, and --dry-run says what it takes. It has not been
trained yet: loading it was measured, and the recipe is the authors'.
"""

run = "r1-distill-1.5b"
model = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
dtype = "bfloat16"
bits = 4
lora_rank = 16
checkpointing = True
muon = False
# An adapter bears ten times the rate of all weights.
lr = 1e-4
sft1_scale = 0.1
sft2_scale = 1.0
sft3_scale = 1.0
batch_tokens = 12_000
micro_tokens = 1024
# The paper's own world model: SFT-3 at full weight, and a policy that imagines in RL-1.
sft3_epochs = 2
sft3_observation_coef = 1.0
rl1_environment = "internal"
rl1_pool = "rl1"
rl1_call_cost = 0.0
rl1_scale = 1.0
rl_lr = 1e-5
temperature = 0.6
call_cost = 0.0
kl = 0.001
questions = 16
top_k = 3
max_actions = 4
max_len = 1024
max_answer = 24
max_observation = 400
# A reasoning model thinks longer than an instruct model.
max_thought = 512
batch_rows = 32
