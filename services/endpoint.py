"""An OpenAI-compatible endpoint, by the `openai` client: one conversation in, one reply out.

The client does the HTTP, the waiting and the trying again (408, 409, 429, 5xx and broken
connections; it obeys a Retry-After of up to two minutes, and gives up at once for a longer one).
Three things stay ours. Its waits end at eight seconds, so a number of tries that is right for an
endpoint that is not there at all is too small for one that is busy: that one gets more. A success
whose body was cut, or is no JSON, is asked for again, which the client does not do. And its typed
answers are not validated, so what came back is read here as plain JSON, where each fault of an
endpoint can be named.

This file is a part of services/chat.py that is imported for an endpoint alone, since importing
`openai` takes a second.
"""

import json
import os
import time
from typing import Any, NamedTuple

import openai

TIMEOUT = 300.0  # seconds without a byte of the reply
RETRIES = 3  # 4 seconds in all
BUSY_RETRIES = 12  # 70 seconds in all: limits of hosted endpoints pass in a minute or two
BODY_RETRIES = 3  # of an answer that is no JSON
FIRST_WAIT = 0.5  # seconds before the first of them; each further wait is twice as long
REFUSALS = (400, 413, 422)  # HTTP status: this conversation is refused, the endpoint is fine


class EndpointError(Exception):
    """What an endpoint did instead of answering, in one line."""


class RefusedError(EndpointError):
    """The endpoint does not take this conversation: it is too long, or was filtered."""


class Reply(NamedTuple):
    """What an endpoint answers, and what it counted."""

    text: str
    prompt_tokens: int
    completion_tokens: int


class Endpoint:
    """One model of one endpoint; several threads may ask at the same time."""

    def __init__(self, url: str, model_name: str) -> None:
        self.model_name = model_name
        # The client wants a key, also for a server that has none.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        self._client = openai.OpenAI(
            base_url=url, api_key=key, timeout=TIMEOUT, max_retries=RETRIES
        )
        self._patient_client = self._client.with_options(max_retries=BUSY_RETRIES)
        self._limit_name = "max_tokens"

    def ask(
        self,
        conversation: list[dict[str, str]],
        budget: int,
        stop: list[str],
        temperature: float,
        seed: int,
    ) -> Reply:
        """Return the reply to a conversation.

        budget: tokens of the reply at most.
        stop: texts before which the reply ends; some endpoints take no notice of them.
        Raises RefusedError for this conversation alone, EndpointError for all else.
        """
        limit_name = self._limit_name
        request: dict[str, Any] = {
            "model": self.model_name,
            "messages": conversation,
            limit_name: budget,
            "temperature": temperature,
        }
        if temperature:
            request["seed"] = seed
        if stop:
            request["stop"] = stop
        try:
            return _read_reply(self._fetch_json(request))
        except openai.APIStatusError as error:
            # Reasoning models of OpenAI know the budget by another name alone.
            if limit_name == "max_tokens" and "max_completion_tokens" in error.response.text:
                self._limit_name = "max_completion_tokens"
                return self.ask(conversation, budget, stop, temperature, seed)
            if error.status_code in REFUSALS:
                raise RefusedError(_describe_status(error)) from None
            raise EndpointError(_describe_status(error)) from None
        except openai.OpenAIError as error:
            # The client says "Connection error."; its cause says which.
            cause = error.__cause__ or ""
            raise EndpointError(f"{type(error).__name__}: {error} {cause}".rstrip()) from None
        except (ValueError, KeyError, IndexError, TypeError) as error:
            raise EndpointError(f"{type(error).__name__}: {error}") from None

    def _fetch_json(self, request: dict[str, Any]) -> Any:
        """Return the answer; raise ValueError where its body is no JSON time after time."""
        for retry in range(BODY_RETRIES):
            try:
                return json.loads(self._send(request))
            except ValueError:
                time.sleep(FIRST_WAIT * 2**retry)
        return json.loads(self._send(request))

    def _send(self, request: dict[str, Any]) -> str:
        """Return the body of the answer."""
        try:
            return self._client.chat.completions.with_raw_response.create(**request).text
        except (openai.RateLimitError, openai.InternalServerError):
            # It is there, but busy.
            return self._patient_client.chat.completions.with_raw_response.create(**request).text


def _read_reply(answer: Any) -> Reply:
    """Read an answer; raise ValueError, KeyError, IndexError or TypeError."""
    text = answer["choices"][0]["message"]["content"]
    if text is None:
        # A reasoning model thought to the end of its budget, or would not speak.
        text = ""
    if not isinstance(text, str):
        raise ValueError("no text")
    usage = answer.get("usage")
    return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _count(usage: Any, kind: str) -> int:
    """Return a number of tokens; what is no count is 0, since the reply was paid for anyway."""
    if not isinstance(usage, dict):
        return 0
    count = usage.get(kind)
    return count if isinstance(count, int) else 0


def _describe_status(error: openai.APIStatusError) -> str:
    """Return what a status that is no success says, in one line."""
    text = f"{type(error).__name__}: status {error.status_code}"
    wait = error.response.headers.get("retry-after")
    if wait:
        text += f", try again after {wait}"
    first_line = error.response.text[:200].partition("\n")[0]
    return f"{text}: {first_line}" if first_line else text
