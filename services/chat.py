"""Language models that are asked in words: as judge (eval.py --judge) and as teacher.

    --judge=http://127.0.0.1:8000/v1#Qwen/Qwen2.5-14B-Instruct    an OpenAI-compatible endpoint;
                                                                  its key in OPENAI_API_KEY
    --judge=FOLDER                                                a Hugging Face folder or hub id,
                                                                  which is decoded here

Without a name after # the endpoint is asked for the model that is the paper's judge. All replies
are kept in out/chat.sqlite. The same model is never asked the same thing twice, so that a run that
was interrupted goes on where it was.
"""

import dataclasses
import re
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import model
from common.errors import OutageError, UserError
from common.files import hash_file_ends
from common.progress import progress_bar
from common.settings import ModelSettings
from data.passages import CONTROL
from data.trajectory import TAGS
from services.cache import Cache

if TYPE_CHECKING:
    from services.endpoint import Endpoint

THOUGHT_OPENING_TOKENS = 8  # of a prompt's end: there some templates open the thought
PAPER_JUDGE = "Qwen/Qwen2.5-14B-Instruct"
FIRST_REFUSALS = 8  # conversations refused before any was answered: then the endpoint is no good

# Turns of {"role": "user" or "assistant", "content": text}.
Conversation = list[dict[str, str]]


@dataclass(frozen=True)
class Sampling:
    """How the replies of one call are drawn."""

    budget: int  # tokens of a reply at most
    stop: list[str]  # texts at which a reply ends; they are left out
    temperature: float  # 0.0 is greedy
    sample: int  # which of several replies at a temperature above 0


@dataclass
class Counts:
    """What was asked, and what it cost."""

    asked: int = 0  # replies of the model
    from_cache: int = 0  # replies that the cache held
    refused: int = 0  # conversations that the endpoint did not take
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Chat:
    """Called with conversations; returns the model's replies in the same order."""

    def __init__(
        self,
        spec: str,
        settings: ModelSettings,
        setting: str,
        path: str | Path = "out/chat.sqlite",
        threads: int = 8,
        batch_rows: int = 256,
    ) -> None:
        """Load a local model, or get ready to ask an endpoint.

        spec: an address with #name, a folder or a hub id, as it was given.
        setting: the name of the setting that gave it, for messages.
        path: file of the cache.
        threads: conversations that an endpoint answers at a time.
        batch_rows: conversations that a local model answers at a time.
        """
        self.setting = f"--{setting}={spec}"
        self.batch_rows = batch_rows
        self.threads = threads
        self.counts = Counts()
        self.cache = Cache(path)
        self._lock = threading.Lock()
        self.endpoint: Endpoint | None = None
        self.local_model: LocalModel | None = None
        # The cache knows by this whose reply it is.
        self._identity: tuple[Any, ...]
        if spec.startswith(("http://", "https://")):
            # Importing the client of endpoints is slow, and few runs have one.
            from services import endpoint

            url, _, name = spec.partition("#")
            self.name = name or PAPER_JUDGE
            self.endpoint = endpoint.Endpoint(url, self.name)
            self._identity = (self.name, url)
        else:
            self.name = spec
            if settings.dtype == "auto":
                settings = dataclasses.replace(settings, dtype=model.fast_dtype(settings))
            self.local_model = LocalModel(spec, settings, self.setting)
            self._identity = (_weights_identity(spec), settings.dtype, settings.bits)

    def __call__(
        self,
        conversations: Sequence[Conversation],
        budget: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        sample: int = 0,
        description: str | None = None,
    ) -> list[str]:
        """Return the reply to each conversation; "" for one that the endpoint refuses.

        budget, stop, temperature, sample: see Sampling.
        description: label of the progress bar; None shows none.
        Raises OutageError for an endpoint that does not answer.
        """
        sampling = Sampling(budget, list(stop), temperature, sample)
        keys = [
            (*self._identity, conversation, budget, sampling.stop, temperature, sample)
            for conversation in conversations
        ]
        replies = {}
        for row, key in enumerate(keys):
            kept_reply = self.cache.get(*key)
            # A row that was damaged counts as if it were not there.
            if isinstance(kept_reply, str):
                replies[row] = kept_reply
        missing = [row for row in range(len(keys)) if row not in replies]
        self.counts.from_cache += len(replies)

        new_replies = self._ask(
            [conversations[row] for row in missing], [keys[row] for row in missing], sampling
        )
        with progress_bar(len(missing), description, "text") as bar:
            for row, reply in zip(missing, new_replies, strict=True):
                replies[row] = reply
                bar.update()
        return [replies[row] for row in range(len(keys))]

    def _ask(
        self, conversations: list[Conversation], keys: list[tuple], sampling: Sampling
    ) -> Iterator[str]:
        """Yield the model's replies in order; each is kept before it is yielded."""
        if self.endpoint is not None:

            def ask_one(conversation: Conversation, key: tuple) -> str:
                # The thread itself keeps its reply: one bad answer must not cost those of others.
                reply = self._ask_endpoint(conversation, sampling)
                if reply is None:
                    return ""
                self._keep(key, reply)
                return reply

            with ThreadPoolExecutor(self.threads) as pool:
                yield from pool.map(ask_one, conversations, keys)
        else:
            for start in range(0, len(conversations), self.batch_rows):
                batch = slice(start, start + self.batch_rows)
                replies = self._ask_local_model(conversations[batch], sampling)
                for key, reply in zip(keys[batch], replies, strict=True):
                    self._keep(key, reply)
                yield from replies

    def _keep(self, key: tuple, reply: str) -> None:
        with self._lock:
            self.counts.asked += 1
        self.cache.put(*key, answer=reply)

    def _ask_endpoint(self, conversation: Conversation, sampling: Sampling) -> str | None:
        """Return a reply; None where the endpoint refuses this conversation but takes others."""
        # Loaded already, by __init__.
        from services.endpoint import EndpointError, RefusedError

        assert self.endpoint is not None
        try:
            reply = self.endpoint.ask(
                conversation,
                sampling.budget,
                sampling.stop,
                sampling.temperature,
                sampling.sample,
            )
        except EndpointError as error:
            if isinstance(error, RefusedError) and self._takes_others():
                return None
            raise OutageError(
                f"{self.setting}: not an endpoint that answers ({error}); its earlier replies are "
                f"in {self.cache.path}"
            ) from None
        with self._lock:
            self.counts.prompt_tokens += reply.prompt_tokens
            self.counts.completion_tokens += reply.completion_tokens
        return cut_at(reply.text, sampling.stop)

    def _takes_others(self) -> bool:
        """Count a refusal; return whether the endpoint may still be one that answers."""
        with self._lock:
            self.counts.refused += 1
            return self.counts.asked > 0 or self.counts.refused < FIRST_REFUSALS

    def _ask_local_model(self, conversations: list[Conversation], sampling: Sampling) -> list[str]:
        assert self.local_model is not None
        written = self.local_model.write(conversations, sampling)
        self.counts.prompt_tokens += written.prompt_tokens
        self.counts.completion_tokens += written.completion_tokens
        return written.texts

    def report(self) -> str:
        """Return one line on what was asked and what it cost."""
        counts = self.counts
        refused = f", {counts.refused:,} refused" if counts.refused else ""
        return (
            f"{self.name}: asked {counts.asked:,} times ({counts.from_cache:,} more from the "
            f"cache{refused}), {counts.prompt_tokens:,} tokens read and "
            f"{counts.completion_tokens:,} written"
        )


@dataclass
class Written:
    """What a local model wrote for some conversations."""

    texts: list[str]
    prompt_tokens: int
    completion_tokens: int


class LocalModel:
    """An instruct model in a folder, decoded by this project."""

    def __init__(self, name: str, settings: ModelSettings, setting: str) -> None:
        """Raise UserError for a model without a chat template."""
        self.lm, _ = model.load_any(name, settings)
        if not self.lm.codec.has_chat_template:
            raise UserError(
                f"{setting}: this model has no chat template, so it can't be asked in words; "
                "take an instruct model"
            )

    def prompt(self, conversation: Conversation) -> list[int]:
        """Return the ids of a conversation.

        The template's own tags are tags; a tag that is spelled in a message is not.
        """
        numbered = [
            {**message, "content": f"MESSAGE{number}."}
            for number, message in enumerate(conversation)
        ]
        template = self.lm.codec.render_chat(numbered)
        # The template's text and the numbers of messages alternate.
        pieces = re.split(r"MESSAGE(\d+)\.", template)
        pieces[1::2] = [conversation[int(number)]["content"] for number in pieces[1::2]]
        return self.lm.codec.encode_template(pieces)

    def write(self, conversations: list[Conversation], sampling: Sampling) -> Written:
        """Decode a reply to each conversation, which ends with its turn or before a stop text."""
        codec = self.lm.codec
        prompts = [self.prompt(conversation) for conversation in conversations]
        # What is drawn for a conversation depends on nothing that is decoded beside it.
        streams = [
            np.random.default_rng([sampling.sample, *prompt]).random(sampling.budget)
            for prompt in prompts
        ]
        replies, _ = self.lm.decoder(prompts).decode(
            codec.eos_ids,
            [sampling.budget] * len(prompts),
            sampling.temperature,
            np.stack(streams),
        )
        texts = []
        for prompt, ids in zip(prompts, replies, strict=True):
            text = codec.decode([token for token in ids if token not in codec.eos_ids])
            if codec.decode(prompt[-THOUGHT_OPENING_TOKENS:]).rstrip().endswith(TAGS["think"]):
                # The template has opened the thought.
                text = TAGS["think"] + text
            texts.append(cut_at(CONTROL.sub("", text), sampling.stop))
        return Written(texts, sum(map(len, prompts)), sum(map(len, replies)))


def _weights_identity(name: str) -> str:
    """Return a hash of the weights of a folder or file; a hub id is itself.

    A folder of the same path may hold other weights tomorrow.
    """
    path = Path(name)
    files = sorted(path.glob("*.safetensors"))
    if not files and path.is_file():
        files = [path]
    return hash_file_ends(files) if files else name


def cut_at(text: str, stop: Sequence[str]) -> str:
    """Return a text up to the first of some others.

    >>> cut_at("I look. </end_search> It was", ["</end_search>", "<search_result>"])
    'I look. '
    """
    if not stop:
        return text
    return re.split("|".join(map(re.escape, stop)), text)[0]
