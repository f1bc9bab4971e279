"""Language models that are asked in words: as judge of answers (eval.py --judge) and as teacher (teacher.py).

    --judge=http://127.0.0.1:8000/v1#Qwen/Qwen2.5-14B-Instruct      any OpenAI-compatible endpoint; its key,
                                                                    where it wants one, in OPENAI_API_KEY
    --judge=FOLDER                                                  a Hugging Face folder or hub id, decoded here

Without a name behind # it is that of the paper's judge. All that a model said is kept in out/chat.sqlite: the same
question of the same model is never asked twice, so a run that was interrupted goes on where it was.
"""
import os
import re
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import requests

from common import Problem, place, progress
from live import Cache, Polite

PAPER = "Qwen/Qwen2.5-14B-Instruct"
REFUSED = (400, 413, 422)               # HTTP's: this conversation, not the endpoint
JUDGE = """Question: {question}
Accepted answers: {golden}
Given answer: {answer}

Does the given answer mean the same as one of the accepted answers? Other words are fine; another or a missing fact is not. Reply with one word, yes or no."""


class Chat:
    """Called with a list of conversations, [{"role", "content"} ..] each -> what the model says to each, in order."""

    def __init__(self, spec, s, setting, path="out/chat.sqlite", threads=8):
        self.setting, self.s, self.threads, self.counts, self.cache = f"--{setting}={spec}", s, threads, Counter(), Cache(path)
        self.url, _, self.name = spec.partition("#") if spec.startswith(("http://", "https://")) else ("", "", spec)
        self.name, self.lock, self.limit = self.name or PAPER, threading.Lock(), "max_tokens"
        self.who = self.name, self.url          # whose answers the cache holds
        if self.url:
            self.http = Polite(gap=0.0, timeout=300.0, longest=120.0, tries=8)      # limits of hosted endpoints pass in a minute or two
        else:
            import model
            self.lm, _ = model.load_any(spec, **place(s))
            files = sorted(Path(spec).glob("*.safetensors")) or [f for f in [Path(spec)] if f.is_file()]
            # a folder of one path may hold other weights tomorrow
            self.who = model.tail_hash(files) if files else spec, s.dtype, s.bits
            if not self.lm.codec.tok.chat_template:
                raise Problem(f"{self.setting}: this model has no chat template, so it can't be asked in words; take an instruct model")

    def __call__(self, conversations, budget, stop=(), temperature=0.0, sample=0, desc=None):
        """budget: tokens; stop: texts at which it ends, left out; sample: which of several answers at a temperature above 0.
        Raises Problem for an endpoint that does not answer."""
        keys = [(*self.who, conversation, budget, list(stop), temperature, sample) for conversation in conversations]
        said = [self.cache.get(*key) for key in keys]
        missing = [i for i, text in enumerate(said) if text is None]
        self.counts["from the cache"] += len(said) - len(missing)
        with progress(len(missing), desc, "text") as bar:
            if self.url:
                def ask(i):         # keeps what it was told itself: one bad answer must not cost those of other threads
                    text = self.fetch(conversations[i], budget, list(stop), temperature, sample)
                    if text is not None:
                        self.keep(keys[i], text)
                    return text or ""
                with ThreadPoolExecutor(self.threads) as pool:
                    for i, text in zip(missing, pool.map(ask, missing)):
                        said[i] = text
                        bar.update()
            for at in range(0, 0 if self.url else len(missing), self.s.batch_rows):
                rows = missing[at:at + self.s.batch_rows]
                for i, text in zip(rows, self.write([conversations[i] for i in rows], budget, stop, temperature, sample)):
                    self.keep(keys[i], text)
                    said[i] = text
                bar.update(len(rows))
        return said

    def keep(self, key, text):
        with self.lock:
            self.counts["asked"] += 1
        self.cache.put(*key, said=text)

    def fetch(self, conversation, budget, stop, temperature, sample):
        """What an endpoint says; None where it takes no such conversation (too long, filtered): that one is lost, the others are not."""
        ask = {"model": self.name, "messages": conversation, self.limit: budget, "temperature": temperature,
               **({"seed": sample} if temperature else {}), **({"stop": stop} if stop else {})}
        key = os.environ.get("OPENAI_API_KEY")
        try:
            answer = self.http.send("POST", self.url.rstrip("/") + "/chat/completions", json=ask,
                                    headers={"Authorization": f"Bearer {key}"} if key else {}).json()
            text = answer["choices"][0]["message"]["content"]
            if text is None:            # it thought to the end of its budget, or would not speak
                text = ""
            if not isinstance(text, str):
                raise ValueError("no text")
            text = cut(text, stop)      # some endpoints take no notice of it
        except (requests.RequestException, ValueError, KeyError, IndexError, TypeError) as e:
            response = getattr(e, "response", None)                         # a refusal is false as a truth value
            said = "" if response is None else response.text[:200].partition("\n")[0]
            # OpenAI's reasoning models know it by this name alone
            if response is not None and "max_completion_tokens" in response.text and "max_tokens" in ask:
                self.limit = "max_completion_tokens"
                return self.fetch(conversation, budget, stop, temperature, sample)
            if response is not None and response.status_code in REFUSED:
                with self.lock:
                    self.counts["refused"] += 1
                    if self.counts["asked"] or self.counts["refused"] < 8:
                        return None
            raise Problem(f"{self.setting}: not an endpoint that answers ({type(e).__name__}: {e} {said}); "
                          f"what it said before is in {self.cache.path}, so the same command goes on from there") from None
        usage = answer.get("usage")
        with self.lock:
            for kind in ("prompt_tokens", "completion_tokens"):
                count = usage.get(kind) if isinstance(usage, dict) else 0
                self.counts[kind] += count if isinstance(count, int) else 0
        return text

    def prompt(self, conversation):
        """A conversation's ids. The template's own tags are tags, one spelled in a message is not, as in `Codec.prompt`."""
        codec, out = self.lm.codec, []
        numbered = [dict(message, content=f"MESSAGE{i}.") for i, message in enumerate(conversation)]
        text = codec.tok.apply_chat_template(numbered, tokenize=False, add_generation_prompt=True)
        for i, piece in enumerate(re.split(r"MESSAGE(\d+)\.", text)):      # in turns the template's and a message's number
            out += (codec.plain.encode(conversation[int(piece)]["content"], add_special_tokens=False).ids if i % 2
                    else codec.tok.encode(piece, add_special_tokens=False))
        return out

    def write(self, conversations, budget, stop, temperature, sample):
        """By this project's decoder. It stops at the end of the turn; a text of `stop` cuts what was written."""
        codec = self.lm.codec
        prompts = [self.prompt(c) for c in conversations]
        ids, _ = self.lm.decoder(prompts).decode([codec.eos], [budget] * len(prompts), temperature, np.random.default_rng(sample))
        self.counts["prompt_tokens"] += sum(map(len, prompts))
        self.counts["completion_tokens"] += sum(map(len, ids))
        texts = [codec.decode([i for i in row if i != codec.eos]) for row in ids]
        return [cut(text, stop) for text in texts]

    def report(self):
        c = self.counts
        refused = f", {c['refused']:,} refused" if c["refused"] else ""
        return (f"{self.name}: asked {c['asked']:,} times ({c['from the cache']:,} more from the cache{refused}), "
                f"{c['prompt_tokens']:,} tokens read and {c['completion_tokens']:,} written")


def cut(text, stop):
    """A text up to the first of some others."""
    return re.split("|".join(map(re.escape, stop)), text)[0] if stop else text


def judge(chat, records):
    """LLM judge: 1.0 or 0.0 for each record with question, golden_answers and answer; None where the verdict can't be read.
    An empty answer is wrong."""
    ask = [r for r in records if r["answer"].strip()]
    texts = chat([[{"role": "user", "content": JUDGE.format(question=r["question"], golden="; ".join(r["golden_answers"]),
                                                            answer=" ".join(r["answer"].split())[:300])}]
                  for r in ask], 8, desc="judging")
    verdicts = iter(re.match(r"\W*(yes|no)\b", text, re.I) for text in texts)
    return [(None if (v := next(verdicts)) is None else float(v[1].lower() == "yes")) if r["answer"].strip() else 0.0 for r in records]
