"""A checkpoint that AutoCoA's own code trained, judged as its authors judge it.

    python eval.py config/autocoa.py --model=FOLDER --data=test.parquet --corpus=passages.jsonl.gz

FOLDER is a Hugging Face folder, as their model_merger.py leaves it. Their prompt asks it, its tags
are text, tokens are drawn at their temperature, and the answer is read by their rules. The score of
their code is `overlap` in eval.json. test.parquet is theirs too; it holds seven sets.
"""

run = "autocoa"
authors_prompt = True
rows = ["agent"]
dtype = "bfloat16"
# Their 2,048 tokens for the prompt and 12,288 for the response.
max_len = 14_336
max_actions = 10
top_k = 3
# They show three passages whole.
max_observation = 1024
# All of each set.
eval_questions = 500
batch_rows = 32
