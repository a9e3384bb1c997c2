"""Clients before a gateway: requests at a steady rate or many at once, each answered whole or told of."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import requests

from tests.e2e.story import MODEL

REQUEST_S = 60.0
SPILLED_TO = "x-moestack-target"


@dataclass
class Answers:
    """What came of requests: who answered how often, and what was no whole answer."""

    by_target: Counter[str] = field(default_factory=Counter)
    failed: list[str] = field(default_factory=list)


def ask(url: str, answers: Answers, max_tokens: int = 8) -> None:
    """One streamed chat. A failure is a status, a stream that ends early, or an error in it."""
    body = {
        "model": MODEL,
        "messages": [{"role": "user", "content": "Say hello"}],
        "max_tokens": max_tokens,
        "stream": True,
        "ignore_eos": True,
    }
    try:
        answer = requests.post(
            f"{url}/chat/completions", json=body, headers={"x-moestack-explain": "1"}, timeout=REQUEST_S
        )
    except requests.RequestException as error:
        answers.failed.append(repr(error))
        return
    whole = answer.ok and answer.text.rstrip().endswith("[DONE]") and '"error"' not in answer.text
    if whole:
        answers.by_target[answer.headers[SPILLED_TO]] += 1
    else:
        answers.failed.append(f"{answer.status_code} {answer.text[-300:]}")


@contextmanager
def trickle(url: str, per_s: float) -> Iterator[Answers]:
    """Requests at that rate while the block lasts; by its end all are answered."""
    answers, stop = Answers(), threading.Event()

    def flow() -> None:
        with ThreadPoolExecutor(64) as pool:
            while not stop.wait(1 / per_s):
                pool.submit(ask, url, answers)

    thread = threading.Thread(target=flow)
    thread.start()
    try:
        yield answers
    finally:
        stop.set()
        thread.join()


def burst(url: str, seconds: float, at_once: int, max_tokens: int) -> Answers:
    """As many requests at once, one after another on each connection, for that long."""
    answers, end = Answers(), time.monotonic() + seconds

    def client() -> None:
        while time.monotonic() < end:
            ask(url, answers, max_tokens)

    with ThreadPoolExecutor(at_once) as pool:
        for _ in range(at_once):
            pool.submit(client)
    return answers
