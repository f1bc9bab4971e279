"""An OpenAI-compatible endpoint, by the `openai` client: one conversation in, one reply out.

The client does the HTTP, the waiting and the trying again (408, 409, 429, 5xx and broken
connections; it obeys a Retry-After of up to two minutes, and gives up at once for a longer one).
Four things stay ours. Its waits end at eight seconds, so a number of tries that is right for an
endpoint that is not there at all is too small for one that is busy: that one gets more. A success
whose body was cut, is no JSON or holds an error is asked for again, which the client does not do.
An option that an endpoint refuses is left out. And its typed answers are not validated, so what
came back is read here as plain JSON, where each fault of an endpoint can be named.

This file is a part of services/chat.py that is imported for an endpoint alone, since importing
`openai` takes a second.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import httpx2
import openai

from common.errors import UserError
from common.files import parse_json
from common.progress import tqdm
from data.passages import CONTROL
from data.trajectory import TAGS
from services.http import call_within, one_line

TIMEOUT = 300.0  # seconds without a byte of the reply
LARGEST_BODY = 2**24  # bytes of an answer
LONGEST_REQUEST = 3600.0  # seconds of a request with all its tries, even if bytes come
RETRIES = 3  # 4 seconds in all
BUSY_RETRIES = 12  # 70 seconds in all: limits of hosted endpoints pass in a minute or two
BODY_RETRIES = 3  # of an answer that can't be read
FIRST_WAIT = 0.5  # seconds before the first of them; each further wait is twice as long, up to
LONGEST_WAIT = 8.0
PASSING_STATUSES = (408, 409, 425, 429)  # below 500
REFUSALS = (400, 413, 422)  # HTTP status: this conversation is refused, the endpoint is fine
# Options that some models refuse. They go without these, and have another name for the last.
OMISSIBLE = ("temperature", "stop", "seed")
OTHER_NAME = {"max_tokens": "max_completion_tokens"}


class EndpointError(Exception):
    """What an endpoint did instead of answering, in one line."""


class RefusedError(EndpointError):
    """The endpoint does not take this conversation: it is too long, or was filtered."""


class StatusError(Exception):
    """A status that is no success, of the answer or inside it."""

    def __init__(self, status: int, body: str, retry_after: str = "") -> None:
        super().__init__(status)
        self.status = status
        self.body = body
        self.retry_after = retry_after  # the header, as it is

    @property
    def passes(self) -> bool:
        """Whether the endpoint may answer a little later."""
        return self.status >= 500 or self.status in PASSING_STATUSES


class Reply(NamedTuple):
    """What an endpoint answers, and what it counted."""

    text: str  # a thought before it stands between <think> and </think>
    prompt_tokens: int
    completion_tokens: int


class BoundedBody(httpx2.SyncByteStream):
    """The body of an answer, which breaks off where it is too long."""

    def __init__(self, body: httpx2.SyncByteStream) -> None:
        self.body = body

    def __iter__(self) -> Iterator[bytes]:
        """Yield the pieces of the body. Raises ValueError after LARGEST_BODY bytes."""
        size = 0
        for piece in self.body:
            size += len(piece)
            if size > LARGEST_BODY:
                raise ValueError(f"an answer of more than {LARGEST_BODY:,} bytes")
            yield piece

    def close(self) -> None:
        """Close the connection."""
        self.body.close()


def bound_body(response: httpx2.Response) -> None:
    """Give an answer a bound, an error too: the client reads both whole.

    Raises ValueError for one that is packed.
    """
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("an answer that is packed, which was not asked for")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = BoundedBody(response.stream)


class Endpoint:
    """One model of one endpoint; several threads may ask at the same time."""

    def __init__(self, url: str, model_name: str) -> None:
        """Raise UserError for an address that is none."""
        self.model_name = model_name
        # The client wants a key, also for a server that has none.
        key = os.environ.get("OPENAI_API_KEY") or "none"
        try:
            self._client = openai.OpenAI(
                base_url=url,
                api_key=key,
                timeout=TIMEOUT,
                max_retries=RETRIES,
                # What is packed has no size before it is unpacked, which is too late.
                default_headers={"Accept-Encoding": "identity"},
                http_client=openai.DefaultHttpxClient(event_hooks={"response": [bound_body]}),
            )
        except Exception as error:
            # The client lets through what its own HTTP library raises.
            raise UserError(f"{url}: not an address: {one_line(str(error))}") from None
        self._patient_client = self._client.with_options(max_retries=BUSY_RETRIES)
        self._refused_options: frozenset[str] = frozenset()

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
        options: dict[str, Any] = {"max_tokens": budget, "temperature": temperature}
        if temperature:
            options["seed"] = seed
        if stop:
            options["stop"] = stop
        refused = self._refused_options
        while True:
            try:
                reply = self._fetch_reply(conversation, _without_options(options, refused))
            except StatusError as error:
                option = _find_refused_option(error, set(options) - refused)
                if option:
                    refused |= {option}
                elif error.status in REFUSALS:
                    raise RefusedError(_describe_status(error)) from None
                else:
                    raise EndpointError(_describe_status(error)) from None
            except openai.OpenAIError as error:
                # The client says "Connection error."; its cause says which.
                text = f"{type(error).__name__}: {error} {error.__cause__ or ''}"
                raise EndpointError(one_line(text)) from None
            except (ValueError, TimeoutError) as error:
                raise EndpointError(one_line(f"{type(error).__name__}: {error}")) from None
            else:
                self._remember(refused)
                return reply

    def _remember(self, refused: frozenset[str]) -> None:
        """Leave options out from now on: the endpoint has answered without them."""
        new = refused - self._refused_options
        self._refused_options |= refused
        for option in sorted(new & set(OMISSIBLE)):
            tqdm.write(f"{self.model_name} takes no {option}: it is asked without")

    def _fetch_reply(self, conversation: list[dict[str, str]], options: dict[str, Any]) -> Reply:
        """Return the reply; what can't be read, or holds an error that passes, is asked for again.

        Raises StatusError, ValueError for what can't be read time after time, or an OpenAIError.
        """
        request = {"model": self.model_name, "messages": conversation, **options}
        retry = 0
        while True:
            body = call_within(LONGEST_REQUEST, lambda: self._send(request))
            try:
                return _read_reply(body)
            except StatusError as error:
                if not error.passes or retry >= BUSY_RETRIES:
                    raise
            except ValueError:
                if retry >= BODY_RETRIES:
                    raise
            time.sleep(min(FIRST_WAIT * 2**retry, LONGEST_WAIT))
            retry += 1

    def _send(self, request: dict[str, Any]) -> bytes:
        """Return the body of the answer; raise StatusError, or another OpenAIError."""
        try:
            try:
                response = self._client.chat.completions.with_raw_response.create(**request)
            except (openai.RateLimitError, openai.InternalServerError):
                # It is there, but busy.
                patient = self._patient_client.chat.completions.with_raw_response
                response = patient.create(**request)
        except openai.APIStatusError as error:
            wait = error.response.headers.get("retry-after", "")
            raise StatusError(error.status_code, error.response.text, wait) from None
        return response.content


# ---- options -------------------------------------------------------------------------------------
def _without_options(options: dict[str, Any], refused: frozenset[str]) -> dict[str, Any]:
    """Return options without those that are refused, or by the names that they have instead."""
    kept = {name: value for name, value in options.items() if name not in refused}
    for name in refused & set(OTHER_NAME):
        kept[OTHER_NAME[name]] = options[name]
    return kept


def _find_refused_option(error: StatusError, sent: set[str]) -> str:
    """Return the option that an error is about, "" where it is about none."""
    if error.status not in REFUSALS:
        return ""
    for option in OTHER_NAME:
        if option in sent and OTHER_NAME[option] in error.body:
            return option
    for option in OMISSIBLE:
        if option in sent and re.search(rf"\b{option}\b", error.body):
            return option
    return ""


# ---- answers -------------------------------------------------------------------------------------
def _read_reply(body: bytes) -> Reply:
    """Read an answer; raise ValueError for what is none, and StatusError for an error in it."""
    answer = parse_json(body)
    if not isinstance(answer, dict):
        raise ValueError("the answer is no object")
    choices = answer.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices else None
    if not isinstance(choice, dict):
        choice = {}
    for part in (answer, choice):
        if part.get("error"):
            _raise_error(part["error"], body)
    message = choice.get("message")
    if not isinstance(message, dict):
        raise ValueError("the answer has no choices[0].message")
    text = CONTROL.sub("", _read_text(message))
    if not text and choice.get("finish_reason") == "length":
        # All of the budget went into a thought that is not shown.
        text = TAGS["think"]
    usage = answer.get("usage")
    return Reply(text, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _raise_error(error: Any, body: bytes) -> None:
    """Raise StatusError where an error has the number of a status, ValueError otherwise."""
    text = body.decode(errors="replace")
    code = str(error.get("code")) if isinstance(error, dict) else ""
    if re.fullmatch("[45][0-9][0-9]", code):
        raise StatusError(int(code), text)
    raise ValueError(_error_message(text))


def _read_text(message: dict[str, Any]) -> str:
    """Return the text of a message, after the thought where one is shown."""
    thought = message.get("reasoning_content") or message.get("reasoning") or ""
    content = message.get("content")
    if isinstance(content, list):
        # Parts: {"type": "text", "text": ..}, or {"type": "thinking", "thinking": ..}.
        thought = thought or _join_parts(content, "thinking")
        content = _join_parts(content, "text")
    if content is None:
        # A reasoning model thought to the end of its budget, or would not speak.
        content = ""
    if not isinstance(content, str):
        raise ValueError("the reply is no text")
    if not isinstance(thought, str) or not thought.strip():
        return content
    if not content.strip():
        return TAGS["think"] + thought
    return TAGS["think"] + thought + TAGS["end_think"] + content


def _join_parts(parts: list[Any], kind: str) -> str:
    """Return the texts of the parts of one kind, which may have parts themselves."""
    texts = []
    for part in parts:
        value = part.get(kind) if isinstance(part, dict) else None
        if isinstance(value, list):
            value = _join_parts(value, "text")
        if isinstance(value, str):
            texts.append(value)
    return "".join(texts)


def _count(usage: Any, kind: str) -> int:
    """Return a number of tokens; what is no count is 0, since the reply was paid for anyway."""
    if not isinstance(usage, dict):
        return 0
    count = usage.get(kind)
    return count if isinstance(count, int) else 0


def _describe_status(error: StatusError) -> str:
    """Return what a status that is no success says, in one line."""
    text = f"status {error.status}"
    if error.retry_after:
        text += f", try again after {one_line(error.retry_after)}"
    message = _error_message(error.body)
    return f"{text}: {message}" if message else text


def _error_message(body: str) -> str:
    """Return what the body of an error says, in one line.

    >>> _error_message('{"error": {"message": "no such model"}}')
    'no such model'
    """
    try:
        error = parse_json(body.encode(errors="replace"))
    except ValueError:
        return one_line(body)
    if isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, dict):
        error = error.get("error") or error
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or error
    return one_line(error if isinstance(error, str) else json.dumps(error))
