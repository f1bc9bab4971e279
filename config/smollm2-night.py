"""SmolLM2-135M-Instruct in a night on two cores: docs/real-models.md has its table.

    python train_sft.py config/smollm2-night.py --model=PATH/SmolLM2-135M-Instruct.Q4_1.gguf \
        --train_data=.. --eval_data=.. --corpus=passages.jsonl.gz
    python train_rl.py --run=smollm2-night
    python eval.py --run=smollm2-night

Each row is asked 100 questions of each set. ReAct and Reflexion take long for those;
--eval_questions=20 --rows="ReAct workflow,Reflexion workflow" asks them the first 20 alone.
"""

run = "smollm2-night"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
muon = False
# All questions that fall to SFT.
coa = 1200
cot = 60
pairs = 100
# The chains are few, so the rate is four times that of config/smollm2.py.
lr = 2e-4
sft1_scale = 0.1
sft2_scale = 1.0
sft3_scale = 1.0
epochs = 1
sft3_epochs = 1
sft3_observation_coef = 1.0
batch_tokens = 3000
micro_tokens = 1000
# Two steps in what the policy imagines, the rest with the tool.
rl1_environment = "internal"
rl1_pool = "rl1"
rl1_steps = 2
rl2_steps = 30
questions = 5
rollouts = 6
rl1_call_cost = 0.0
call_cost = 0.0
rl1_scale = 1.0
rl_lr = 2e-5
temperature = 0.6
kl = 0.0
top_k = 2
max_actions = 4
max_len = 1000
max_answer = 24
max_observation = 300
max_thought = 48
batch_rows = 64
eval_questions = 100
