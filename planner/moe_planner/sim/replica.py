"""One replica in the making: which requests a step takes, when it ends, and what the KV cache holds.

The scheduling of vLLM's V1 engine: decodes first, one token each; then the prompt that is half done; then waiting ones
in order of arrival while the token budget, the limit of sequences and the KV cache allow. Where the cache is full, the
request that came last goes back to the head of the queue and is computed again.

Steps that are alike are one jump. `steps` counts steps with a decode in them, and a request is kept by the count at
which it ends, so that the cost of a request does not depend on its length.
"""

from __future__ import annotations

import heapq
import math
from collections import deque
from collections.abc import Sequence

from moe_planner.sim.engine import Engine


class Replica:
    """Live state of one engine. `prompt`, `output` and `made` are by request: its lengths, and tokens made so far."""

    __slots__ = (
        "active_limit",
        "active_s",
        "block",
        "blocks",
        "busy_s",
        "completes",
        "decode_s",
        "end",
        "engine",
        "free",
        "joined",
        "jump",
        "left",
        "made",
        "output",
        "partial",
        "phase",
        "preemptions",
        "prefill_token_s",
        "prompt",
        "prompt_tokens",
        "queue",
        "start",
        "step_s",
        "steps",
        "token_limit",
        "tokens_out",
        "up",
    )

    def __init__(self, engine: Engine, prompt: Sequence[int], output: Sequence[int], made: list[int]) -> None:
        self.engine, self.prompt, self.output, self.made = engine, prompt, output, made
        self.block, self.blocks = engine.block, engine.blocks
        self.active_limit, self.token_limit = engine.max_active, engine.max_batched_tokens
        self.prefill_token_s = engine.prefill_token_s
        self.decode_s, self.active_s = engine.launch_s + engine.decode_s, engine.active_s
        self.up = True
        self.busy_s = 0.0
        self.preemptions = self.tokens_out = 0
        self._empty()

    def _empty(self) -> None:
        self.free = self.blocks
        self.phase = [0] * self.block
        """Decoding sequences by the remainder of the step count at which each takes its next block."""
        self.queue: deque[int] = deque()
        self.joined: dict[int, int] = {}
        """Decoding requests in order of admission, and the step count after which each made its first token here."""
        self.left: list[tuple[int, int]] = []
        """Heap of (step count at which it ends, request)."""
        self.partial, self.prompt_tokens = -1, 0
        self.completes: list[int] = []
        self.steps = self.jump = 0
        self.start, self.step_s, self.end = 0.0, 0.0, math.inf

    @property
    def running(self) -> int:
        return len(self.joined) + len(self.completes) + (self.partial >= 0)

    @property
    def load(self) -> int:
        """Requests here, waiting or running: what a router compares."""
        return len(self.joined) + len(self.completes) + (self.partial >= 0) + len(self.queue)

    @property
    def kv_usage(self) -> float:
        return 1.0 - self.free / self.blocks

    def fits(self, request: int) -> bool:
        """Whether the cache could ever hold the request."""
        return -(-(self.prompt[request] + self.output[request]) // self.block) <= self.blocks

    def add(self, request: int, now: float) -> None:
        """A request arrives. An idle engine wakes now, a jump ends early where the request may join."""
        self.queue.append(request)
        if self.end == math.inf:
            self.start, self.end, self.jump = now, now, 0  # to begin once all that come at this moment are there
        elif (
            self.jump > 1
            and len(self.queue) == 1
            and self.running < self.active_limit
            and -(-self.prompt[request] // self.block) <= self.free
        ):
            self.cut(now)

    def cut(self, now: float) -> None:
        """End a jump with the step that is under way, so that what changed acts from the next one on."""
        if self.jump < 2:
            return
        done = max(1, math.ceil((now - self.start) / self.step_s))
        if done < self.jump:
            self.jump = done
            self.end = self.start + done * self.step_s

    def begin(self, now: float) -> None:
        """Plan the next step, or the next jump of steps that are alike; `end` is infinite where there is none."""
        preempted = self._make_room() if self.joined else False
        count = len(self.joined)
        prompt_tokens = 0
        if self.partial >= 0 or (self.queue and not preempted):
            prompt_tokens = self._admit(count, preempted)
        if prompt_tokens:
            engine = self.engine
            step_s = engine.prompt_s + prompt_tokens * self.prefill_token_s
            step_s += self.decode_s + count * self.active_s if count else engine.launch_s
            self.jump = 1
        elif count:
            step_s = self.decode_s + count * self.active_s
            jump = 1 if preempted else self.left[0][0] - self.steps  # it may come straight back
            if count * (jump // self.block + 1) > self.free:
                jump = min(jump, self._steps_that_fit())
            self.jump = jump
        else:
            self.jump, self.end = 0, math.inf
            return
        self.start, self.step_s = now, step_s
        self.end = now + self.jump * step_s

    def _make_room(self) -> bool:
        """Preempt until every decoding sequence has its block of the next step; whether any was."""
        phase, after = self.phase, (self.steps + 1) % self.block
        preempted = False
        while phase[after] > self.free:
            self._preempt()
            preempted = True
        return preempted

    def _admit(self, count: int, preempted: bool) -> int:
        """Prompt tokens of the next step beside `count` decodes: of the half-done prompt, then of waiting ones."""
        budget = self.token_limit - count
        prompt_tokens = 0
        completes = self.completes
        if self.partial >= 0:
            prompt_tokens = min(self.prompt_tokens, budget)
            budget -= prompt_tokens
            self.prompt_tokens -= prompt_tokens
            if self.prompt_tokens:
                return prompt_tokens
            completes.append(self.partial)
            self.partial = -1
        queue, block = self.queue, self.block
        if not queue or preempted:
            return prompt_tokens
        room = self.active_limit - count - len(completes)
        spare = self.free - (self.phase[(self.steps + 1) % block] if count else 0)
        while queue and room > 0 and budget > 0:
            request = queue[0]
            tokens = self.prompt[request] + self.made[request]
            blocks = -(-tokens // block)
            if blocks > spare:
                break
            queue.popleft()
            spare -= blocks
            self.free -= blocks
            room -= 1
            taken = min(tokens, budget)
            prompt_tokens += taken
            budget -= taken
            if taken == tokens:
                completes.append(request)
            else:
                self.partial, self.prompt_tokens = request, tokens - taken
        return prompt_tokens

    def finish(self) -> tuple[list[int], list[int]]:
        """The jump has ended: (requests whose prompt is done, in order; requests that made their last token)."""
        self.busy_s += self.jump * self.step_s
        ended: list[int] = []
        joined, left, block = self.joined, self.left, self.block
        count = len(joined)
        if count:
            steps = self.steps
            self.tokens_out += count * self.jump
            if self.jump == 1:
                self.free -= self.phase[(steps + 1) % block]
            else:
                self.free -= self._blocks_of(self.jump)
            self.steps = steps = steps + self.jump
            while left and left[0][0] <= steps:
                request = heapq.heappop(left)[1]
                self._release(request, joined.pop(request))
                self.made[request] = self.output[request]
                ended.append(request)
        first = self.completes
        if first:
            self.completes = []
            for request in first:
                self.made[request] += 1
                self.tokens_out += 1
                left_over = self.output[request] - self.made[request]
                if left_over:
                    steps = self.steps
                    joined[request] = steps
                    self.phase[(steps + 1 - self._held(request)) % block] += 1
                    heapq.heappush(left, (steps + left_over, request))
                else:
                    self.free += -(-self._held(request) // block)
                    ended.append(request)
        return first, ended

    def fail(self, now: float) -> list[int]:
        """The engine dies: every request that was here, in order of admission. Work under way is lost."""
        if self.jump:
            done = min(self.jump, max(0, int((now - self.start) / self.step_s)))
            self.busy_s += min(now, self.end) - self.start
            self.steps += done if self.joined else 0
            self.tokens_out += done * len(self.joined)
        self._settle_made()
        lost = [*self.joined, *self.completes, *([self.partial] if self.partial >= 0 else []), *self.queue]
        self._empty()
        self.up = False
        return lost

    def tokens_left(self) -> int:
        """Output tokens that requests here have yet to make, as of the last step that was counted."""
        decoding = sum(end - self.steps for end, _ in self.left)
        others = [*self.completes, *([self.partial] if self.partial >= 0 else []), *self.queue]
        return decoding + sum(self.output[r] - self.made[r] for r in others)

    def made_by(self, now: float) -> int:
        """Output tokens made until a moment, those of the jump under way counted."""
        if not self.joined or self.end == math.inf or not self.step_s > 0:
            return self.tokens_out
        return self.tokens_out + len(self.joined) * min(self.jump, max(0, int((now - self.start) / self.step_s)))

    def blocks_held(self) -> int:
        """Blocks that requests hold, counted one by one: `blocks` less `free`."""
        block = self.block
        total = sum(-(-(self._held(r) + self.steps - at) // block) for r, at in self.joined.items())
        total += sum(-(-(self.prompt[r] + self.made[r]) // block) for r in self.completes)
        if self.partial >= 0:
            total += -(-(self.prompt[self.partial] + self.made[self.partial]) // block)
        return total

    def _held(self, request: int) -> int:
        """Tokens in the cache when the prompt was done: all but the one that was just made."""
        return self.prompt[request] + self.made[request] - 1

    def _release(self, request: int, at: int) -> None:
        held = self._held(request)
        self.phase[(at + 1 - held) % self.block] -= 1
        self.free += -(-(held + self.steps - at) // self.block)

    def _preempt(self) -> None:
        """Send the request that was admitted last back to the head of the queue."""
        self.preemptions += 1
        if self.partial >= 0:
            request = self.partial
            self.free += -(-(self.prompt[request] + self.made[request]) // self.block)
            self.partial, self.prompt_tokens = -1, 0
        else:
            request, at = self.joined.popitem()
            self._release(request, at)
            self.made[request] += self.steps - at
            self.left = [entry for entry in self.left if entry[1] != request]
            heapq.heapify(self.left)
        self.queue.appendleft(request)

    def _settle_made(self) -> None:
        for request, at in self.joined.items():
            self.made[request] += self.steps - at

    def _blocks_of(self, jump: int) -> int:
        """Blocks that the decoding sequences take in the next `jump` steps."""
        block, phase = self.block, self.phase
        rounds, rest = divmod(jump, block)
        after = (self.steps + 1) % block
        over = max(0, after + rest - block)
        return rounds * len(self.joined) + sum(phase[after : after + rest]) + sum(phase[:over])

    def _steps_that_fit(self) -> int:
        """Steps until a sequence would find no free block."""
        block, phase = self.block, self.phase
        rounds, spare = divmod(self.free, len(self.joined))
        fit, after = rounds * block, self.steps + 1
        for i in range(block):
            spare -= phase[(after + i) % block]
            if spare < 0:
                break
            fit += 1
        return fit
