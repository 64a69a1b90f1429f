"""A sequence: the tokens of one request, what has been computed of them, and who waits for the
rest.

Owns: tokens, limits, and the queue to the consumer. Does not know: the model, other sequences.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence as AnySequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fomoe.errors import FomoeError
from fomoe.sampling import Sampler
from fomoe.state import SequenceState

# Generated tokens that wait for their consumer before the sequence does.
_MAX_UNREAD = 256


@dataclass(frozen=True, slots=True)
class Output:
    """What a step gave a sequence: a sampled token, or logits float32 [n, vocab] of the prompt."""

    token: int = -1
    logits: npt.NDArray[np.float32] | None = None
    last: bool = False


class Sequence:
    """One request. With a sampler it is continued by up to `max_tokens` tokens, or until one of
    `stop_ids`; without one, the logits of its tokens from `logits_from` on are wanted and it ends.
    `stepwise` computes a given text token by token, as if it were being generated. One that is
    `fed` is continued by whoever has it, by up to `max_tokens`; the logits of the last token it was
    given are wanted. `number` tells sequences apart.
    """

    def __init__(
        self,
        tokens: AnySequence[int],
        *,
        sampler: Sampler | None,
        max_tokens: int = 0,
        stop_ids: frozenset[int] = frozenset(),
        stepwise: bool = False,
        logits_from: int = 0,
        fed: bool = False,
        number: int = 0,
    ) -> None:
        self.tokens = list(tokens)
        self.num_prompt = len(self.tokens)
        self.num_computed = 0
        self.max_total = self.num_prompt + max_tokens
        self.stop_ids = stop_ids
        self.stepwise = stepwise
        self.logits_from = logits_from
        self.number = number
        self.sampler = sampler
        self.fed = fed
        self.state: SequenceState | None = None
        self.cancelled = False
        self.finished = False
        self._outputs: asyncio.Queue[Output | FomoeError] = asyncio.Queue()
        # A consumer that falls behind holds its sequence up: logits take megabytes a row.
        self._max_unread = _MAX_UNREAD if sampler else 1

    @property
    def num_pending(self) -> int:
        """Known tokens that have not been computed."""
        return len(self.tokens) - self.num_computed

    @property
    def is_held_up(self) -> bool:
        """The consumer has not taken what was computed for it."""
        return self._outputs.qsize() >= self._max_unread

    @property
    def wants_all_logits(self) -> bool:
        return self.sampler is None and not self.fed

    def extend(self, tokens: AnySequence[int]) -> None:
        """More tokens for a sequence that is fed. What comes first, and several tokens at once
        wherever they come, count as a prompt."""
        if not self.tokens or len(tokens) > 1:
            self.num_prompt = len(self.tokens) + len(tokens)
        self.tokens.extend(tokens)

    def advance(self, length: int, logits: npt.NDArray[np.float32] | None) -> None:
        """A step computed `length` tokens. `logits`: float32 [n, vocab], of all of them where all
        are wanted, else of the last one if the sequence has to be continued."""
        self.num_computed += length
        if self.fed:
            if logits is not None:
                self._outputs.put_nowait(Output(logits=logits))
        elif self.sampler is None:
            self.finished = self.num_pending == 0
            self._outputs.put_nowait(Output(logits=logits, last=self.finished))
        elif logits is not None:
            token = self.sampler.sample(logits[-1], self.tokens)
            self.tokens.append(token)
            self.finished = token in self.stop_ids or len(self.tokens) >= self.max_total
            self._outputs.put_nowait(Output(token=token, last=self.finished))

    def rewind(self) -> None:
        """What was computed is lost: compute it anew. What was given out is not given out again."""
        self.logits_from = max(self.logits_from, self.num_computed)
        self.num_computed = 0

    def fail(self, error: FomoeError) -> None:
        """End the sequence with an error that its consumer will see."""
        self.finished = True
        self._outputs.put_nowait(error)

    async def next_output(self) -> Output:
        """The next output; raises what the sequence failed with."""
        output = await self._outputs.get()
        if isinstance(output, FomoeError):
            raise output
        return output
