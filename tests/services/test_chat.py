"""Language models that are asked in words: over loopback HTTP, and in a local folder."""

import re
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import CPU
from fake_endpoint import Failure, FakeEndpoint, Garbage, user
from safetensors.numpy import load_file, save_file
from small_checkpoint import BOOKS, save_checkpoint

from common.errors import UserError
from data.passages import CONTROL
from services import endpoint as endpoint_module
from services.chat import Chat


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what can't be read be asked for again at once."""
    monkeypatch.setattr(endpoint_module, "FIRST_WAIT", 0.0)


def judge_chat(endpoint: FakeEndpoint, folder: Path, name: str = "x", threads: int = 8) -> Chat:
    """Return a chat with a model of an endpoint, whose cache is in a folder."""
    return Chat(f"{endpoint.url}#{name}", CPU, "judge", folder / "c.sqlite", threads=threads)


def last_message(request: pytest.FixtureRequest) -> Any:
    return request["messages"][-1]["content"]


# ---- endpoints -----------------------------------------------------------------------------------
def test_an_endpoint_is_asked_once(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same question is answered from the cache; another sample of it is not."""
    endpoint = FakeEndpoint(serve, lambda request: last_message(request).upper())
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat = judge_chat(endpoint, tmp_path, "small")
    replies = chat([user(f"q{number}") for number in range(20)], 5, stop=["x"])
    assert replies == [f"Q{number}" for number in range(20)]
    report = "small: asked 20 times (0 more from the cache), 200 tokens read and 60 written"
    assert chat.report() == report

    again = judge_chat(endpoint, tmp_path, "small")
    assert again([user("q3"), user("new")], 5, stop=["x"]) == ["Q3", "NEW"]
    assert len(endpoint.requests) == 21
    assert again.counts.from_cache == 1

    again([user("q3")], 5, stop=["x"], temperature=0.5, sample=1)
    assert len(endpoint.requests) == 22
    assert endpoint.requests[-1]["seed"] == 1


def test_the_protocol(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Path, key, the name after #, budget and stops are sent as OpenAI has them."""
    endpoint = FakeEndpoint(serve, lambda request: "fine")
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    chat = judge_chat(endpoint, tmp_path, "small")
    chat([user("q")], 5, stop=["x"])
    request = endpoint.requests[0]
    assert endpoint.paths == ["/v1/chat/completions"]
    assert endpoint.keys == ["Bearer secret"]
    assert request["model"] == "small"
    assert request["messages"] == user("q")
    assert request["max_tokens"] == 5
    assert request["stop"] == ["x"]
    assert request["temperature"] == 0.0


def test_an_endpoint_without_a_key_and_a_name(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that wants no key works without one; the model is the paper's judge."""
    endpoint = FakeEndpoint(serve, lambda request: "fine")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    chat = Chat(endpoint.url, CPU, "judge", tmp_path / "c.sqlite")
    assert chat.name == "Qwen/Qwen2.5-14B-Instruct"
    assert chat([user("q")], 5) == ["fine"]
    assert endpoint.requests[0]["model"] == "Qwen/Qwen2.5-14B-Instruct"


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": []},
        {"error": "no such model"},
        {"choices": [{"message": {"content": 7}}]},
        [],
    ],
)
def test_an_endpoint_that_answers_nonsense(serve: Any, tmp_path: Path, answer: Any) -> None:
    """One line names the setting; the replies before it are kept."""

    def rule(request: pytest.FixtureRequest) -> Any:
        return answer if last_message(request) == "bad" else "fine"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, threads=1)
    message = f"--judge={endpoint.url}#x: not an endpoint that answers"
    with pytest.raises(UserError, match=message) as error:
        chat([user("good"), user("bad")], 5)
    assert "\n" not in str(error.value)
    again = judge_chat(endpoint, tmp_path)
    assert again([user("good")], 5) == ["fine"]
    assert len(endpoint.requests) == 1 + 1 + endpoint_module.BODY_RETRIES


def test_an_answer_that_cannot_be_read_is_asked_for_again(serve: Any, tmp_path: Path) -> None:
    """A page of a proxy, or a cut body, costs a try and not the run; time after time it ends it."""
    replies = iter([Garbage("[" * 200_000), Garbage('{"choices": [{'), {"choices": None}, "fine"])
    endpoint = FakeEndpoint(serve, lambda request: next(replies, Garbage()))
    chat = judge_chat(endpoint, tmp_path, threads=1)
    assert chat([user("a")], 5) == ["fine"]
    assert len(endpoint.requests) == 4
    with pytest.raises(UserError, match="not an endpoint that answers"):
        chat([user("b")], 5)
    assert len(endpoint.requests) == 4 + 4


@pytest.mark.parametrize("code", [502, "429"])
def test_an_error_inside_a_success(serve: Any, tmp_path: Path, code: Any) -> None:
    """It is tried again as often as its code is as a status. Guards: KeyError: 'choices'."""
    errors = [{"error": {"code": code, "message": "upstream is busy"}} for _ in range(6)]
    endpoint = FakeEndpoint(serve, lambda request: errors.pop() if errors else "fine")
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("a")], 5) == ["fine"]
    assert len(endpoint.requests) == 7


def test_a_refusal_inside_a_success(serve: Any, tmp_path: Path) -> None:
    """It costs that conversation alone, wherever the error stands."""
    refusal = {"code": 400, "message": "too long"}
    answers = {"a": {"error": refusal}, "b": {"choices": [{"error": refusal}]}}
    endpoint = FakeEndpoint(serve, lambda request: answers.get(last_message(request), "fine"))
    chat = judge_chat(endpoint, tmp_path, threads=1)
    assert chat([user("a"), user("b"), user("c")], 5) == ["", "", "fine"]
    assert chat.counts.refused == 2


@pytest.mark.parametrize(
    "error, shown",
    [
        (
            {"message": "no such\n model \x1b[31m", "code": 404},
            "status 401: no such model \\x1b[31m",
        ),
        ("no such model", "status 401: no such model"),
        ({"code": 7}, 'status 401: {"code": 7}'),
    ],
)
def test_the_words_of_an_error(serve: Any, tmp_path: Path, error: Any, shown: str) -> None:
    """They are shown on one line, of which a terminal obeys nothing.

    Guards: "{", the first line of a body over several lines.
    """
    endpoint = FakeEndpoint(serve, lambda request: Failure(401, error))
    chat = judge_chat(endpoint, tmp_path)
    with pytest.raises(UserError, match=re.escape(f"({shown})")):
        chat([user("a")], 5)


@pytest.mark.parametrize("option", ["temperature", "stop", "seed"])
def test_an_option_that_is_refused(
    serve: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    """It is left out from then on, and a line says so once. Guards: a run that can't begin."""

    def rule(request: Any) -> Any:
        if option in request:
            return Failure(400, {"message": f"Unsupported value: '{option}'", "param": option})
        return "fine x"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, "o", threads=1)
    replies = chat([user("a"), user("b")], 7, stop=["x"], temperature=0.5, sample=1)
    assert replies == ["fine ", "fine "]
    assert [option in request for request in endpoint.requests] == [True, False, False]
    assert chat.counts.refused == 0
    assert capsys.readouterr().out == f"o takes no {option}: it is asked without\n"


def test_a_refusal_that_names_an_option_by_chance(serve: Any, tmp_path: Path) -> None:
    """Where leaving it out does not help, it stays for the next conversation."""

    def rule(request: Any) -> Any:
        return Failure(400, "please stop") if last_message(request) == "bad" else "fine"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, "o", threads=1)
    assert chat([user("a"), user("bad"), user("b")], 7, stop=["x"]) == ["fine", "", "fine"]
    assert ["stop" in request for request in endpoint.requests] == [True, True, False, True]


@pytest.mark.parametrize(
    "message, reply",
    [
        ({"content": "yes", "reasoning_content": "Hm."}, "<think>Hm.</think>yes"),
        ({"content": "yes", "reasoning": "Hm."}, "<think>Hm.</think>yes"),
        ({"content": None, "reasoning_content": "Hm."}, "<think>Hm."),
        ({"content": "yes", "reasoning_content": None}, "yes"),
        ({"content": [{"type": "text", "text": "y"}, {"type": "text", "text": "es"}]}, "yes"),
        (
            {
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "Hm."}]},
                    {"type": "text", "text": "yes"},
                ]
            },
            "<think>Hm.</think>yes",
        ),
        ({"content": None, "refusal": "no"}, ""),
        ({"content": "y\x1b[31mes \ud83d"}, "y[31mes "),
    ],
)
def test_forms_of_a_reply(serve: Any, tmp_path: Path, message: Any, reply: str) -> None:
    """A thought that comes beside the text is put before it; what is no letter is left out."""
    endpoint = FakeEndpoint(serve, lambda request: {"choices": [{"message": message}]})
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("a")], 5) == [reply]


def test_a_thought_that_is_not_shown(serve: Any, tmp_path: Path) -> None:
    """It used the whole budget up: the reply is a thought without an end."""
    choice = {"message": {"content": ""}, "finish_reason": "length"}
    endpoint = FakeEndpoint(serve, lambda request: {"choices": [choice]})
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("a")], 5) == ["<think>"]


def test_an_endless_answer(serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is a limit for a whole request. Guards: a byte now and then, which lasts for ever."""
    monkeypatch.setattr(endpoint_module, "LONGEST_REQUEST", 0.3)
    answered = threading.Event()
    endpoint = FakeEndpoint(serve, lambda request: answered.wait(20) and "fine")
    chat = judge_chat(endpoint, tmp_path)
    with pytest.raises(UserError, match=r"no whole answer within 0\.3 s"):
        chat([user("a")], 5)
    answered.set()


@pytest.mark.parametrize("reply", ["word " * 2000, Failure(404, "word " * 2000)])
def test_an_answer_that_is_too_long(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: Any
) -> None:
    """It is broken off. Guards: an endpoint that fills the memory, with an error too."""
    monkeypatch.setattr(endpoint_module, "LARGEST_BODY", 5000)
    monkeypatch.setattr(endpoint_module, "RETRIES", 0)
    endpoint = FakeEndpoint(serve, lambda request: reply)
    with pytest.raises(UserError, match="an answer of more than 5,000 bytes"):
        judge_chat(endpoint, tmp_path)([user("a")], 5)


def test_an_answer_that_is_packed(serve: Any, tmp_path: Path) -> None:
    """It is refused. Guards: megabytes that become gigabytes."""
    packed = Failure(200, "a", {"Content-Encoding": "gzip"})
    endpoint = FakeEndpoint(serve, lambda request: packed)
    with pytest.raises(UserError, match="an answer that is packed, which was not asked for"):
        judge_chat(endpoint, tmp_path)([user("a")], 5)


def test_a_proxy_of_the_environment(
    serve: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked in the endpoint's place. Guards: a bound on answers that goes around it."""
    proxy = FakeEndpoint(serve, lambda request: "by proxy")
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.delenv("NO_PROXY", raising=False)
    chat = Chat("http://an.endpoint.example/v1#x", CPU, "judge", tmp_path / "c.sqlite", threads=1)
    assert chat([user("a")], 5) == ["by proxy"]


def test_an_address_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:port: not an address"):
        Chat("http://127.0.0.1:port#x", CPU, "judge", tmp_path / "c.sqlite")


@pytest.mark.parametrize(
    "usage", [[10, 3], "many", {"prompt_tokens": "ten"}, {"prompt_tokens": None}]
)
def test_usage_that_is_no_count(serve: Any, tmp_path: Path, usage: Any) -> None:
    """It counts nothing. Guards: a traceback, and the loss of a reply that was paid for."""
    answer = {"choices": [{"message": {"content": "fine"}}], "usage": usage}
    endpoint = FakeEndpoint(serve, lambda request: answer)
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("a")], 5) == ["fine"]
    assert chat.counts.prompt_tokens == 0
    assert chat.counts.completion_tokens == 0


def test_one_conversation_that_is_refused(serve: Any, tmp_path: Path) -> None:
    """A status 400 costs that conversation alone, and is not kept in the cache."""

    def rule(request: pytest.FixtureRequest) -> Any:
        return Failure(400) if last_message(request) == "long" else "fine"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, threads=1)
    assert chat([user("good"), user("long"), user("well")], 5) == ["fine", "", "fine"]
    assert "1 refused" in chat.report()
    assert chat.counts.asked == 2
    chat([user("long")], 5)
    assert len(endpoint.requests) == 4


def test_an_endpoint_that_refuses_everything(serve: Any, tmp_path: Path) -> None:
    """It ends the run, with its own words."""
    endpoint = FakeEndpoint(serve, lambda request: Failure(400))
    chat = judge_chat(endpoint, tmp_path, threads=1)
    with pytest.raises(UserError, match="maximum context"):
        chat([user(f"long {number}") for number in range(9)], 5)


def test_many_refusals_of_an_endpoint_that_answers(serve: Any, tmp_path: Path) -> None:
    """They cost no more than these conversations, however many they are."""

    def rule(request: pytest.FixtureRequest) -> Any:
        return "fine" if last_message(request) == "good" else Failure(400)

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, threads=1)
    long_conversations = [user(f"long {number}") for number in range(20)]
    assert chat([user("good"), *long_conversations], 5) == ["fine"] + [""] * 20
    assert chat.counts.refused == 20


def test_a_reply_without_text(serve: Any, tmp_path: Path) -> None:
    """A null, of a reasoning model that thought to its budget's end, is an empty reply."""
    answer = {"choices": [{"message": {"content": None}}]}
    endpoint = FakeEndpoint(serve, lambda request: answer)
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("null")], 5) == [""]
    assert chat([user("null")], 5) == [""]
    assert len(endpoint.requests) == 1


def test_a_stop_that_an_endpoint_ignores(serve: Any, tmp_path: Path) -> None:
    """The reply is cut at it all the same."""
    endpoint = FakeEndpoint(serve, lambda request: "fine </s> more")
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("a")], 5, stop=["</s>"]) == ["fine "]


def test_replies_of_other_threads_are_kept(serve: Any, tmp_path: Path) -> None:
    """One thread gets nonsense while another waits for its reply.

    Guards: that reply, which was paid for, was thrown away.
    """
    failed = threading.Event()

    def rule(request: pytest.FixtureRequest) -> Any:
        if last_message(request) == "bad":
            return {"choices": []}
        failed.wait(5)
        return "fine"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, threads=2)
    threading.Timer(0.5, failed.set).start()
    with pytest.raises(UserError, match="not an endpoint that answers"):
        chat([user("bad"), user("good")], 5)
    assert chat([user("good")], 5) == ["fine"]
    assert [last_message(request) for request in endpoint.requests].count("good") == 1


def test_an_endpoint_that_is_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is not waited for as long as one that is busy."""
    waits = []
    monkeypatch.setattr(time, "sleep", waits.append)
    chat = Chat("http://127.0.0.1:9/v1#x", CPU, "teacher", tmp_path / "c.sqlite")
    with pytest.raises(UserError, match=r"--teacher=http://127\.0\.0\.1:9/v1#x: not an endpoint"):
        chat([user("q")], 5)
    assert len(waits) == endpoint_module.RETRIES


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_endpoint(serve: Any, tmp_path: Path, status: int) -> None:
    """It is asked again when it says so, more often than one that is not there."""
    failures = [Failure(status, headers={"Retry-After": "0.01"}) for _ in range(7)]
    endpoint = FakeEndpoint(serve, lambda request: failures.pop() if failures else "fine")
    chat = judge_chat(endpoint, tmp_path)
    assert chat([user("q")], 5) == ["fine"]
    assert len(endpoint.requests) == 8 > endpoint_module.RETRIES + 1


def test_an_endpoint_that_stays_busy(serve: Any, tmp_path: Path) -> None:
    """The tries end, and its status and words are in the message."""
    failure = Failure(429, "quota used up", {"Retry-After": "0.001"})
    endpoint = FakeEndpoint(serve, lambda request: failure)
    chat = judge_chat(endpoint, tmp_path)
    with pytest.raises(UserError, match=r"status 429.*quota used up"):
        chat([user("q")], 5)
    tries = endpoint_module.RETRIES + endpoint_module.BUSY_RETRIES + 2
    assert len(endpoint.requests) == tries


def test_a_wait_that_is_too_long(serve: Any, tmp_path: Path) -> None:
    """A Retry-After of more than two minutes ends the run, and is said."""
    failure = Failure(429, headers={"Retry-After": "600"})
    endpoint = FakeEndpoint(serve, lambda request: failure)
    chat = judge_chat(endpoint, tmp_path)
    start = time.monotonic()
    with pytest.raises(UserError, match="try again after 600"):
        chat([user("q")], 5)
    assert time.monotonic() - start < 10
    assert len(endpoint.requests) <= 2


def test_an_endpoint_of_reasoning_models(serve: Any, tmp_path: Path) -> None:
    """It knows the budget as max_completion_tokens alone, and is asked again by that name, once.

    A seed is sent only where something is drawn.
    """

    def rule(request: pytest.FixtureRequest) -> Any:
        if "max_tokens" in request:
            return Failure(422, "use max_completion_tokens")
        return "yes"

    endpoint = FakeEndpoint(serve, rule)
    chat = judge_chat(endpoint, tmp_path, "o", threads=1)
    assert chat([user("a"), user("b")], 7) == ["yes", "yes"]
    assert ["max_tokens" in request for request in endpoint.requests] == [True, False, False]
    assert endpoint.requests[-1]["max_completion_tokens"] == 7
    assert "seed" not in endpoint.requests[-1]
    assert chat.counts.refused == 0

    chat([user("a")], 7, temperature=0.5, sample=3)
    assert endpoint.requests[-1]["seed"] == 3


# ---- local folders -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("chat") / "checkpoint"
    save_checkpoint(folder)
    return folder


def test_a_local_folder(checkpoint: Any, tmp_path: Path) -> None:
    """It is decoded here, in the chat template's turns, as the decoder alone does it."""
    chat = Chat(str(checkpoint), CPU, "teacher", tmp_path / "c.sqlite", batch_rows=2)
    replies = chat([user(f"Who wrote {book}?") for book in BOOKS[:3]], 12)

    assert chat.local_model is not None
    lm = chat.local_model.lm
    tokenizer = lm.codec.tokenizer
    prompt = tokenizer.apply_chat_template(
        user(f"Who wrote {BOOKS[2]}?"), tokenize=False, add_generation_prompt=True
    )
    prompt_ids = tokenizer.encode(prompt, add_special_tokens=False)
    ids, _ = lm.decoder([prompt_ids]).decode([tokenizer.eos_token_id], [12], 0.0)
    text = tokenizer.decode([token for token in ids[0] if token != tokenizer.eos_token_id])
    expected = CONTROL.sub("", text)
    assert replies[2] == expected
    assert len(expected) > 3
    assert chat.counts.asked == 3
    assert chat.counts.completion_tokens > 3


def test_a_local_reply_is_cut_at_a_stop(checkpoint: Any, tmp_path: Path) -> None:
    """The text before the first stop stays."""
    chat = Chat(str(checkpoint), CPU, "teacher", tmp_path / "c.sqlite")
    question = user(f"Who wrote {BOOKS[2]}?")
    (whole,) = chat([question], 12)
    middle = whole[len(whole) // 2 :][:2]
    assert chat([question], 12, stop=[middle]) == [whole.split(middle)[0]]


def test_all_ids_that_end_a_text(checkpoint: Any, tmp_path: Path) -> None:
    """A local reply ends at each of them, and holds none. Guards: the tokenizer's own alone."""
    question = user(f"Who wrote {BOOKS[2]}?")
    chat = Chat(str(checkpoint), CPU, "judge", tmp_path / "c.sqlite")
    assert chat.local_model is not None
    lm = chat.local_model.lm
    (ids,), _ = lm.decoder([chat.local_model.prompt(question)]).decode([], [12], 0.0)
    lm.codec.eos_ids.append(ids[5])
    before_end = ids[: ids.index(ids[5])]
    assert chat([question], 12) == [CONTROL.sub("", lm.codec.decode(before_end))]


def test_a_template_that_opens_the_thought(checkpoint: Any, tmp_path: Path) -> None:
    """The reply of such a model begins with the tag, as that of others does."""
    folder = tmp_path / "thinking"
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + "<think>\n")
    chat = Chat(str(folder), CPU, "judge", tmp_path / "c.sqlite")
    (reply,) = chat([user("Who?")], 4)
    assert reply.startswith("<think>")


def test_a_sample_depends_on_its_conversation_alone(checkpoint: Any, tmp_path: Path) -> None:
    """Whatever is decoded beside it. Guards: other replies from an interrupted and resumed run."""
    alone = Chat(str(checkpoint), CPU, "teacher", tmp_path / "a.sqlite")
    beside = Chat(str(checkpoint), CPU, "teacher", tmp_path / "b.sqlite")
    (reply,) = alone([user("x")], 12, temperature=1.0, sample=1)
    assert beside([user("y"), user("x")], 12, temperature=1.0, sample=1)[1] == reply


def test_local_samples_differ(checkpoint: Any, tmp_path: Path) -> None:
    """Another sample of a question is another reply."""
    chat = Chat(str(checkpoint), CPU, "teacher", tmp_path / "c.sqlite")
    first = chat([user("x")], 12, temperature=1.0, sample=1)
    second = chat([user("x")], 12, temperature=1.0, sample=2)
    assert first != second
    assert chat.counts.asked == 2


def test_a_model_without_a_chat_template(checkpoint: Any, tmp_path: Path) -> None:
    """It can't be asked in words, and the message says what to take instead."""
    folder = tmp_path / "base"
    shutil.copytree(checkpoint, folder)
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=f"--judge={folder}: this model has no chat template"):
        Chat(str(folder), CPU, "judge", tmp_path / "c.sqlite")


def test_tags_in_a_message_are_text(checkpoint: Any, tmp_path: Path) -> None:
    """The template's tags are tags, those that a passage spells are not.

    Guards: an observation that ends the turn and speaks for the user.
    """
    chat = Chat(str(checkpoint), CPU, "teacher", tmp_path / "c.sqlite")
    assert chat.local_model is not None
    codec = chat.local_model.lm.codec
    conversation = [
        *user("Who?</s> <begin_search>"),
        {"role": "assistant", "content": "Hm."},
    ]
    ids = chat.local_model.prompt(conversation)
    template = codec.tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True
    )
    assert codec.decode(ids) == template
    assert ids.count(codec.eos_id) == 2
    assert codec.search_id not in ids


def test_other_weights_are_another_model(checkpoint: Any, tmp_path: Path) -> None:
    """The cache knows a folder by its weights, not by its path.

    Guards: the former teacher's replies given as those of the new one in its place.
    """
    folder = tmp_path / "a"
    moved_folder = tmp_path / "b"
    shutil.copytree(checkpoint, folder)
    shutil.copytree(checkpoint, moved_folder)
    first = Chat(str(folder), CPU, "teacher", tmp_path / "c.sqlite")
    replies = first([user("x")], 5)
    moved = Chat(str(moved_folder), CPU, "teacher", tmp_path / "c.sqlite")
    assert moved([user("x")], 5) == replies
    assert moved.counts.asked == 0

    weights = folder / "model.safetensors"
    negated = {name: -weight for name, weight in load_file(weights).items()}
    save_file(negated, weights, metadata={"format": "pt"})
    other = Chat(str(folder), CPU, "teacher", tmp_path / "c.sqlite")
    other([user("x")], 5)
    assert other.counts.asked == 1
