"""Who goes on with a stream that broke: the decision, the requests it makes, and the joined events, by named cases."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_api.enums import MidStream
from moe_gateway.joining import GO_ON, GO_ON_TOKENS, TEXT_MAX_CHARS, Joiner, Seam, Transcript, bar, continued, spliced
from moe_gateway.openai_api import ApiRequest, Endpoint, parse
from moe_gateway.overlap import LEAST_CHARS, WINDOW_CHARS, Overlap
from moe_gateway.sse import without_last
from moe_gateway.takeover import Break, Broken, How, Sent, Verdict, Why, about_request, decide
from tests.gateway.fake_upstream import DONE, FINISH, chunk, text_chunk, usage_chunk
from tests.gateway.harness import chat

SENT = Sent("Once upon a time ", 5)
BOTH = Broken(
    mode=MidStream.SPLICE,
    why=Break.LOST,
    sent=SENT,
    finished=False,
    at_revision=True,
    output_limit=50,
    revision="r0",
    target="t0",
)


def stop(why: Why, detail: str | None = None) -> Verdict:
    return Verdict(How.STOP, why=why, detail=detail)


CONTINUED, SPLICED = Verdict(How.CONTINUE, "r0"), Verdict(How.SPLICE, "t0")
CASES: dict[str, tuple[dict[str, Any], Verdict]] = {
    "both could: the own revision has the same model, and costs nothing more": ({}, CONTINUED),
    "no revision is up: the target": ({"revision": None}, SPLICED),
    "no revision is up, and only continuing is asked for": (
        {"revision": None, "mode": MidStream.CONTINUE},
        stop(Why.NOBODY),
    ),
    "nobody is up": ({"revision": None, "target": None}, stop(Why.NOBODY)),
    "it broke at a target: a revision continues it": ({"at_revision": False}, CONTINUED),
    "it broke at a target, and no revision is up": ({"at_revision": False, "revision": None}, stop(Why.NOBODY)),
    "not asked for": ({"mode": MidStream.OFF}, stop(Why.OFF)),
    "the client has left": ({"client_gone": True}, stop(Why.CLIENT_GONE)),
    "the gateway drains": ({"draining": True}, stop(Why.DRAINING)),
    "the gateway's own end": ({"why": Break.STOPPING}, stop(Why.DRAINING)),
    "a finish reason was sent": ({"finished": True}, stop(Why.COMPLETE)),
    "the model refused the request itself": ({"why": Break.REFUSED}, stop(Why.REFUSED)),
    "one takeover was made": ({"takeovers_left": 0}, stop(Why.SPENT)),
    "the deadline is over": ({"elapsed_s": 600.0}, stop(Why.LATE)),
    "a moment before the deadline": ({"elapsed_s": 599.9}, CONTINUED),
    "silent": ({"why": Break.SILENT}, CONTINUED),
    "malformed": ({"why": Break.MALFORMED}, CONTINUED),
    "the model's own error": ({"why": Break.ERROR}, CONTINUED),
    "ended early": ({"why": Break.ENDED_EARLY}, CONTINUED),
    "a tool call was begun": ({"sent": Sent("a", 1, "tool_calls")}, stop(Why.ANSWER, "tool_calls")),
    "all tokens that were asked for are there": ({"output_limit": 5}, stop(Why.NOTHING_LEFT)),
    "one token is left": ({"output_limit": 6}, CONTINUED),
    "no limit": ({"output_limit": None}, CONTINUED),
    "a field that binds it": ({"continue_bar": "n", "splice_bar": "n"}, stop(Why.REQUEST, "n")),
    "a field that only a splice breaks, with a revision": ({"splice_bar": "seed"}, CONTINUED),
    "a field that only a splice breaks, without one": (
        {"splice_bar": "seed", "revision": None},
        stop(Why.REQUEST, "seed"),
    ),
    "a field that only continuing breaks": ({"continue_bar": "x"}, SPLICED),
    "gone comes before all else": ({"client_gone": True, "sent": Sent("", 0, "no text")}, stop(Why.CLIENT_GONE)),
}


@pytest.mark.parametrize("name", CASES)
def test_decision(name: str) -> None:
    changed, want = CASES[name]
    assert decide(replace(BOTH, **changed)) == want


@given(
    st.builds(
        Broken,
        mode=st.sampled_from(MidStream),
        why=st.sampled_from(Break),
        sent=st.builds(Sent, st.text(max_size=3), st.integers(0, 9), st.none() | st.just("reasoning")),
        finished=st.booleans(),
        at_revision=st.booleans(),
        output_limit=st.none() | st.integers(0, 9),
        continue_bar=st.none() | st.just("n"),
        splice_bar=st.none() | st.just("n"),
        client_gone=st.booleans(),
        draining=st.booleans(),
        takeovers_left=st.integers(0, 2),
        elapsed_s=st.sampled_from([0.0, 700.0]),
        revision=st.none() | st.just("r0"),
        target=st.none() | st.just("t0"),
    )
)
def test_nobody_goes_on_who_may_not(broken: Broken) -> None:
    verdict = decide(broken)
    assert (verdict.to is None) == (verdict.how is How.STOP) == (verdict.why is not None)
    if verdict.how is How.STOP:
        return
    assert broken.mode is not MidStream.OFF
    assert not any((broken.client_gone, broken.draining, broken.finished))
    assert broken.takeovers_left > 0
    assert broken.sent.bar is None
    assert broken.elapsed_s < broken.deadline_s
    if verdict.how is How.SPLICE:
        assert (broken.mode, broken.at_revision, broken.splice_bar) == (MidStream.SPLICE, True, None)
    else:
        assert broken.continue_bar is None


def asked(endpoint: Endpoint = Endpoint.CHAT, **more: Any) -> ApiRequest:
    document = chat(**more)
    if endpoint is Endpoint.COMPLETIONS:
        del document["messages"]
        document.setdefault("prompt", "Tell me:")
    return parse(endpoint, orjson.dumps(document))


BARS: list[tuple[dict[str, Any], str | None, str | None]] = [
    ({}, None, None),
    ({"stop": ["END"], "max_tokens": 5, "tools": [{}], "tool_choice": "auto", "presence_penalty": 1}, None, None),
    ({"response_format": {"type": "text"}, "logprobs": False, "logit_bias": {"5": 1}}, None, None),
    ({"n": 2}, "n", "n"),
    ({"logprobs": True, "top_logprobs": 2}, "logprobs", "logprobs"),
    ({"logprobs": 0}, "logprobs", "logprobs"),
    ({"prompt_logprobs": 1}, "prompt_logprobs", "prompt_logprobs"),
    ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "response_format"),
    ({"structured_outputs": {"regex": "a"}}, "structured_outputs", "structured_outputs"),
    ({"tools": [{}], "tool_choice": "required"}, "tool_choice", "tool_choice"),
    ({"tools": [{}], "tool_choice": {"type": "function"}}, "tool_choice", "tool_choice"),
    ({"function_call": {"name": "f"}}, "function_call", "function_call"),
    ({"continue_final_message": True, "add_generation_prompt": False}, *["continue_final_message"] * 2),
    ({"add_generation_prompt": False}, "add_generation_prompt", "add_generation_prompt"),
    ({"stop": "x", "include_stop_str_in_output": True}, *["include_stop_str_in_output"] * 2),
    ({"stream_options": {"continuous_usage_stats": True}}, *["stream_options.continuous_usage_stats"] * 2),
    ({"echo": True}, "echo", "echo"),
    ({"return_token_ids": True}, "return_token_ids", "return_token_ids"),
    ({"use_beam_search": True}, "use_beam_search", "use_beam_search"),
    ({"seed": 5}, "seed", "seed"),
    ({"seed": 5, "temperature": 0}, None, "seed"),
]


@pytest.mark.parametrize(("more", "continue_bar", "splice_bar"), BARS, ids=[str(sorted(row[0])) for row in BARS])
def test_what_an_answer_of_two_attempts_cannot_keep_is_named(
    more: dict[str, Any], continue_bar: str | None, splice_bar: str | None
) -> None:
    assert bar(asked(**more), How.CONTINUE) == continue_bar
    assert bar(asked(**more), How.SPLICE) == splice_bar


def test_completions_are_continued_where_their_prompt_is_one_text() -> None:
    assert bar(asked(Endpoint.COMPLETIONS), How.CONTINUE) is None
    assert bar(asked(Endpoint.COMPLETIONS), How.SPLICE) == "prompt"
    assert bar(asked(Endpoint.COMPLETIONS, prompt=[1, 2]), How.CONTINUE) == "prompt"
    assert bar(asked(Endpoint.COMPLETIONS, prompt=["a", "b"]), How.CONTINUE) == "n"
    second = continued(asked(Endpoint.COMPLETIONS, max_tokens=20), SENT).document
    assert (second["prompt"], second["max_tokens"]) == ("Tell me:Once upon a time", 15)
    assert "continue_final_message" not in second


def test_the_request_to_continue_is_the_clients_with_its_answer_as_a_beginning() -> None:
    first = asked(max_tokens=20, max_completion_tokens=9, min_tokens=3, stop=["END"], vllm_xargs={"a": 1})
    second = continued(first, SENT)
    assert second.document == json.loads(second.raw)
    said = {"role": "assistant", "content": "Once upon a time"}
    assert second.document == {
        **first.document,
        "messages": [*first.document["messages"], said],
        "continue_final_message": True,
        "add_generation_prompt": False,
        "max_tokens": 15,
        "max_completion_tokens": 4,
        "min_tokens": 0,
    }
    assert second.output_limit == 15
    assert len(first.document["messages"]) == 1, "the client's own request is as it was"


def test_white_space_alone_is_no_text_to_go_on_from() -> None:
    second = continued(asked(max_tokens=9), Sent("\n\n", 1, blank=1)).document
    assert second == {**asked().document, "max_tokens": 9}


def test_tokens_of_white_space_at_the_end_are_written_again_and_counted_once() -> None:
    transcript = Transcript()
    for text in ("Once", " upon", "\n", " "):
        transcript.add(chunk(text))
    sent = transcript.sent(4)
    assert sent == Sent("Once upon\n ", 4, None, blank=2)
    assert continued(asked(max_tokens=10), sent).document["max_tokens"] == 8
    assert spliced(asked(max_tokens=10), sent).document["max_tokens"] == 6
    events = joined(How.CONTINUE, chunk("\n"), chunk(" "), chunk("a"), usage_chunk(12, 3), sent=sent)
    assert [event["choices"][0]["delta"]["content"] for event in events[:-1]] == ["a"]
    assert events[-1]["usage"] == {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def test_the_request_to_splice_asks_by_a_users_turn() -> None:
    second = spliced(asked(max_tokens=20), SENT).document
    assert second["messages"][-2:] == [
        {"role": "assistant", "content": SENT.text},
        {"role": "user", "content": GO_ON},
    ]
    assert second["max_tokens"] == 15
    assert "continue_final_message" not in second


# What was sent


def delta(**fields: Any) -> bytes:
    return b"data: " + orjson.dumps({"id": "a", "choices": [{"index": 0, "delta": fields}]}) + b"\n\n"


@pytest.mark.parametrize(
    ("event", "want"),
    [
        pytest.param(b": ping\n\n", None, id="a comment"),
        pytest.param(delta(tool_calls=[{"index": 0}]), "tool_calls", id="a tool call"),
        pytest.param(delta(reasoning="hm"), "reasoning", id="reasoning"),
        pytest.param(delta(reasoning_content="hm"), "reasoning_content", id="reasoning, older name"),
        pytest.param(delta(refusal="no"), "refusal", id="a refusal"),
        pytest.param(delta(content=[{"type": "text"}]), "content", id="parts"),
        pytest.param(delta(content="x").replace(b'"index":0', b'"index":1'), "choices", id="a second choice"),
        pytest.param(
            delta(content="x").replace(b'"index":0', b'"index":0,"logprobs":{"content":[]}'), "logprobs", id="logprobs"
        ),
        pytest.param(chunk("x" * (TEXT_MAX_CHARS + 1)), "length", id="too long"),
    ],
)
def test_what_was_sent_names_what_nobody_can_go_on_from(event: bytes, want: str | None) -> None:
    transcript = Transcript()
    transcript.add(chunk() + chunk("Hé "))
    transcript.add(event)
    transcript.add(text_chunk("ü"))
    sent = transcript.sent(2)
    assert sent.bar == want
    if want is None:
        assert sent.text == "Hé ü"
    assert transcript.head == {"id": "c1", "object": "chat.completion.chunk"}


def test_nothing_sent_is_nothing_to_go_on_from() -> None:
    transcript = Transcript()
    transcript.add(chunk())
    assert transcript.sent(0).bar == "no text"


@pytest.mark.parametrize(
    ("error", "want"),
    [
        ({"code": 400, "message": "too long"}, True),
        ({"code": 422}, True),
        ({"code": 500}, False),
        ({"code": 429}, False),
        ({"code": 401}, False),
        ({"type": "invalid_request_error"}, True),
        ({"type": "overloaded_error"}, False),
        ("out of memory", False),
    ],
)
def test_an_error_that_another_model_would_say_too(error: object, want: bool) -> None:
    assert about_request(error) is want


@given(st.lists(st.sampled_from([chunk("a"), b": x\r\n\r\n", DONE]), min_size=1, max_size=4))
def test_the_last_event_comes_apart(events: list[bytes]) -> None:
    assert without_last(b"".join(events)) == (b"".join(events[:-1]), events[-1])


# The joined events


def joined(how: How, *events: bytes, sent: Sent = SENT) -> list[Any]:
    joiner = Joiner(Seam(how, sent, {"id": "first", "model": "tiny", "created": 7}))
    out = b"".join(joiner.feed(event) for event in events)
    assert joiner.refused is None
    lines = [line[6:] for line in out.split(b"\n") if line.startswith(b"data: ")]
    return [line.decode() if line == b"[DONE]" else orjson.loads(line) for line in lines]


@pytest.mark.parametrize("how", [How.CONTINUE, How.SPLICE])
def test_the_second_attempts_events_are_the_rest_of_the_first_stream(how: How) -> None:
    events = joined(how, chunk(), chunk("there "), chunk("was", finish="stop"), usage_chunk(60, 2), DONE)
    assert [event["id"] for event in events[:-1]] == ["first"] * 3
    assert {event["model"] for event in events[:-1]} == {"tiny"}
    assert all("role" not in choice["delta"] for event in events[:-1] for choice in event["choices"])
    assert [event["choices"][0]["delta"]["content"] for event in events[:2]] == ["there ", "was"]
    prompt = 60 - 5 - (GO_ON_TOKENS if how is How.SPLICE else 0)
    assert events[2]["usage"] == {"prompt_tokens": prompt, "completion_tokens": 7, "total_tokens": prompt + 7}
    assert events[-1] == "[DONE]"


def test_white_space_that_was_sent_is_not_sent_again() -> None:
    assert joined(How.CONTINUE, chunk(" there"), FINISH)[0]["choices"][0]["delta"] == {"content": "there"}
    assert joined(How.CONTINUE, chunk("there"), FINISH)[0]["choices"][0]["delta"] == {"content": "there"}


def test_an_answer_that_was_all_there_gets_its_end() -> None:
    (event,) = joined(How.CONTINUE, chunk(), FINISH)
    assert event["choices"] == [{"index": 0, "delta": {}, "finish_reason": "stop"}]


def test_what_is_held_back_comes_before_a_tool_call_and_before_the_end() -> None:
    call = delta(tool_calls=[{"index": 0, "id": "x"}])
    events = joined(How.SPLICE, chunk("upon "), call, FINISH)
    assert events[0]["choices"][0]["delta"] == {"tool_calls": [{"index": 0, "id": "x"}], "content": "upon "}
    events = joined(How.SPLICE, chunk("upon "), FINISH, DONE)
    assert events[0]["choices"][0] == {"index": 0, "delta": {"content": "upon "}, "finish_reason": "stop"}


def test_thoughts_of_a_closed_api_are_no_part_of_the_answer() -> None:
    events = joined(How.SPLICE, delta(reasoning="where was I"), chunk("there"), FINISH)
    assert events[0]["choices"][0]["delta"] == {"content": "there"}


def test_a_revision_that_begins_to_reason_is_not_going_on() -> None:
    joiner = Joiner(Seam(How.CONTINUE, SENT, {}))
    assert joiner.feed(delta(reasoning="there") + chunk("was")) == b""
    assert joiner.refused == "reasoning"


def test_completions_are_joined_too() -> None:
    (event,) = joined(How.CONTINUE, text_chunk(" there"))
    assert event["choices"][0]["text"] == "there"


# What is said twice


def reference(sent: str, said: str, least: int = LEAST_CHARS) -> str:
    """By trying every length."""
    tail = sent[-WINDOW_CHARS:]
    for size in range(min(len(tail), len(said)), max(0, min(least, len(tail)) - 1), -1):
        if tail.endswith(said[:size]):
            return said[size:]
    return said


def in_pieces(sent: str, said: str, cuts: list[int], least: int = LEAST_CHARS) -> str:
    overlap, at = Overlap(sent, least), 0
    out = []
    for cut in sorted(cut % (len(said) + 1) for cut in cuts):
        out.append(overlap.feed(said[at:cut]))
        at = max(at, cut)
    return "".join([*out, overlap.feed(said[at:]), overlap.end()])


few = st.text(alphabet="ab é", max_size=12)
cutting = st.lists(st.integers(0, 40), max_size=5)


@given(few, few, cutting, st.integers(1, 9))
def test_however_it_comes_in_pieces_the_longest_repetition_is_removed_once(
    sent: str, said: str, cuts: list[int], least: int
) -> None:
    assert in_pieces(sent, said, cuts, least) == reference(sent, said, least)


words = st.lists(st.text(alphabet="abcdefghijklmno", min_size=1, max_size=6), min_size=1, max_size=30, unique=True)


@given(words, st.integers(0, 30), st.integers(0, 200), cutting)
def test_joined_text_is_the_text_whether_its_end_is_said_again_or_not(
    made: list[str], at: int, again: int, cuts: list[int]
) -> None:
    """Text of words that each come once: nothing in it repeats by itself, so nothing may be doubled or lost."""
    text = " ".join(f"{word}{index}" for index, word in enumerate(made))
    cut = at % (len(text) + 1)
    sent, rest = text[:cut], text[cut:]
    said_again = sent[len(sent) - min(again, len(sent)) :]
    if 0 < len(said_again) < min(LEAST_CHARS, len(sent)):
        said_again = ""
    if not said_again and reference(sent, rest) != rest:
        return  # the rest begins as the text ended: by chance, and short enough that it is all there was
    assert sent + in_pieces(sent, said_again + rest, cuts) == text


@given(few, few)
def test_without_a_repetition_nothing_is_touched_and_nothing_held(sent: str, said: str) -> None:
    overlap = Overlap(sent)
    out = overlap.feed("|" + said)
    assert out == "|" + said


def test_what_is_held_back_is_bounded() -> None:
    overlap, given_back = Overlap("a" * 10 * WINDOW_CHARS), 0
    for fed in range(64, 3 * WINDOW_CHARS, 64):
        given_back += len(overlap.feed("a" * 64))
        assert fed - given_back <= WINDOW_CHARS
