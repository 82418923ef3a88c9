"""How are requests decoded? Allocate once, then prefill or a round until every request is done.

    B batch  S tokens of a prefill chunk  P longest path, root included  T cache slots

Plain decoding is the same loop with the drafter `none`, whose tree is the root alone.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from fasteagle.ahead import Readback, Rounds
from fasteagle.cache import bucket_of, buckets
from fasteagle.clock import synchronize
from fasteagle.compile import Compiler, Step
from fasteagle.draft.base import Drafter
from fasteagle.draft.none import NoDrafter
from fasteagle.model import Transformer, pack
from fasteagle.request import (
    DEFAULT_MAX_NEW_TOKENS,
    Generation,
    Piece,
    Request,
    Row,
    check_fits,
    context_limit,
    notice_length,
    token_ids,
)
from fasteagle.rounds import State, Steps, new_state
from fasteagle.sample import SamplingParams
from fasteagle.seats import Seats, aligned_chunks

if TYPE_CHECKING:  # see request.py
    from fasteagle.tokenizer import Tokenizer

PREFILL_CHUNK = 128
TRACED_CHUNK = 64  # on a CPU twice the rows take twice the time, and the last chunk is padded
STEPS = ("extend", "prefill", "round")
DEFAULT_ROOM = 8192  # tokens a row that caches are made for when nobody says how many


class Engine:
    """Decodes requests with one target and one drafter, one call after another.

    A call that begins before another ended takes the caches over, and the other ends in a
    RuntimeError: give threads an engine each, over one target.

    batch: rows decoded together. max_length: tokens of prompt and output together, at most (and by
    default) the model's context. Caches are made for all of max_length or, where it is not given,
    for 8192 tokens a row; a longer request then makes new ones. compiled: make every step one
    graph; on the CPU this repacks the weights of target and drafter where they are. prefill_chunk:
    prompt tokens a target pass. ValueError for sizes that cannot be.
    """

    n_slots: int  # of the caches
    state: State
    builder: Steps
    buckets: list[int]
    steps: dict[tuple[str, int, bool], Step]

    def __init__(
        self,
        target: Transformer,
        drafter: Drafter | None = None,
        *,
        tokenizer: Tokenizer | None = None,
        batch: int = 1,
        max_length: int | None = None,
        compiled: bool = False,
        prefill_chunk: int | None = None,
    ) -> None:
        if batch < 1 or (prefill_chunk is not None and prefill_chunk < 1):
            raise ValueError(f"batch {batch}, prefill_chunk {prefill_chunk}: give 1 or more")
        self.target, self.tokenizer = target, tokenizer
        self.drafter: Drafter = drafter or NoDrafter()
        self.batch = batch
        self.max_length = context_limit(target.config.max_positions, max_length)
        self.compiler = Compiler(enabled=compiled, device=target.device)
        chunk = TRACED_CHUNK if self.compiler.traces else PREFILL_CHUNK
        self.prefill_chunk = prefill_chunk or max(1, min(chunk, self.max_length // 4))
        if self.compiler.traces:
            for module in (target, self.drafter.weights):
                pack(module)
        self.ahead = self.compiler.captures  # the next round is launched before the last is read
        self.turn = 0  # counts calls of decode: only the newest owns the caches
        self.lock = threading.Lock()  # no thread changes them while another's step runs
        self._allocate(max_length or min(self.max_length, DEFAULT_ROOM))

    def _allocate(self, length: int) -> None:
        """Caches, state and (none yet) steps for sequences of up to `length` tokens."""
        self.room = length
        # Room for the last tree and for one slot that takes what padded rows write.
        self.n_slots = -(-(length + self.drafter.n_ahead + 1) // 16) * 16
        self.state = new_state(
            self.drafter,
            batch=self.batch,
            n_slots=self.n_slots,
            chunk=self.prefill_chunk,
            device=self.target.device,
        )
        self.builder = Steps(self.target, self.drafter, self.state, self.n_slots)
        self.buckets = buckets(self.n_slots, compiled=self.compiler.enabled)
        self.steps = {}

    def reserve(self, length: int) -> None:
        """Have caches for `length` tokens (at most max_length); new ones need steps built anew."""
        if min(length, self.max_length) <= self.room:
            return
        synchronize(self.target.device)  # a round may fly that a call before this one left
        self.steps.clear()
        before = self.room
        del self.builder, self.state  # before the new ones: both may not fit
        try:
            self._allocate(min(self.max_length, 1 << (length - 1).bit_length()))
        except (MemoryError, RuntimeError):  # shorter requests go on
            self._allocate(before)
            raise

    def generate(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
    ) -> list[Generation]:
        """Decode any number of prompts (texts or token ids); results in the prompts' order.

        `batch` of them are decoded together; when one is done, the next takes its row. stop_ids
        None takes the checkpoint's. ValueError for an empty prompt or one too long, before any is
        decoded.
        """
        if isinstance(prompts, str):
            raise ValueError("prompts is one text; give a list of prompts")  # noqa: TRY004
        requests = [
            self.request(
                prompt,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                stop=stop,
                stop_ids=stop_ids,
            )
            for prompt in prompts
        ]
        rows = self.rows(requests)
        for _ in self.decode(rows):
            pass
        return [row.result() for row in rows]

    def stream(self, prompt: str | Sequence[int], **limits: object) -> Iterator[Piece]:
        """Decode one prompt, yielding text as it becomes certain; takes the keywords of `generate`.

        The last piece carries the result. Without a tokenizer only that piece comes.
        """
        request = self.request(prompt, **limits)  # type: ignore[arg-type]
        rows = self.rows([request])
        for _ in self.decode(rows):
            yield from rows[0].pieces
        if self.tokenizer is None:
            yield Piece("", drafted=False, result=rows[0].result())

    def request(
        self,
        prompt: str | Sequence[int],
        *,
        max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS,
        sampling: SamplingParams | None = None,
        stop: Sequence[str] = (),
        stop_ids: Sequence[int] | None = None,
    ) -> Request:
        """A Request from what a caller gives: text is encoded with BOS, ids are left alone."""
        config = self.target.config
        return Request(
            prompt=token_ids(prompt, tokenizer=self.tokenizer, n_tokens=config.vocab_size),
            max_new_tokens=max_new_tokens,
            sampling=sampling or SamplingParams(),
            stop_ids=frozenset(config.eos_ids if stop_ids is None else stop_ids),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )

    def decode(self, rows: list[Row]) -> Iterator[list[Row]]:
        """Run any number of rows to their end; yields them all after every step that emits tokens.

        Row i takes seat i of the batch; those for whom there is none wait until one is done, and
        take its seat at once: the next step is their prefill, and the others go on after it.
        Between two yields a row's `pieces` are those of the last step and `tokens` all so far. The
        state then holds the tree that the next round will verify, unless `ahead` is set.
        """
        if not rows:
            return
        seats = Seats(rows, self.batch)
        # By the whole queue, not by who is seated: every request then runs the same graphs.
        sampled = any(not row.request.sampling.greedy for row in rows)
        with self.lock:
            self.turn += 1
            turn = self.turn
            self.reserve(max(len(row.request.prompt) + row.room for row in rows))
            self._vacate()
            rounds = self._rounds(sampled)
        while not seats.over:
            with self.lock:
                if self.turn != turn:
                    raise RuntimeError(
                        "another request began on this engine before this one ended, in the same "
                        "caches; finish or close a stream first, or use one engine for each"
                    )
                self._step(seats, rounds, sampled)
            yield rows
        rounds.drop()

    def _step(self, seats: Seats, rounds: Rounds, sampled: bool) -> None:
        """Feed the prompts of those who just took a seat, or else run a round for all."""
        new = seats.fill()
        if new:
            rounds.land()
            for seat, row in new.items():
                self._admit(seat, row)
            self._prefill(new, sampled)
            Readback(self.state, new).deliver()
            return
        rounds.next(seats.busy())

    def _rounds(self, sampled: bool) -> Rounds:
        """Rounds for one call of `decode`; each drafts its next tree after the path it accepts."""
        n_path = self.drafter.n_path
        return Rounds(
            self.state,
            lambda longest: self._run("round", longest, sampled),
            self.buckets,
            reach=n_path + self.drafter.n_ahead,
            n_path=n_path,
            ahead=self.ahead,
        )

    def warm_up(
        self, *, sampled: bool = False, longest: int | None = None, kinds: Sequence[str] = STEPS
    ) -> None:
        """Build and run all steps up to `longest` tokens (default: as long as caches are).

        kinds: some of STEPS; prompts of `prefill_chunk` tokens or fewer need no "extend".
        """
        with self.lock:
            self.turn += 1  # its runs leave noise in the caches
            self.reserve(longest or 0)
            self._vacate()
            for n_slots in self.buckets:
                for kind in kinds:
                    self._run(kind, n_slots, sampled)
                if n_slots >= (longest or self.n_slots):
                    break

    def rows(self, requests: Sequence[Request]) -> list[Row]:
        """Rows for `decode`, whose clocks start now; ValueError for a request that cannot fit."""
        limit, depth = self.max_length, self.drafter.n_path - 1
        for request in requests:
            check_fits(request, limit=limit, depth=depth, window=self.target.config.sliding_window)
            notice_length(request, limit=limit, trained=self.drafter.trained_length)
        return [Row(r, limit, self.tokenizer, depth, self.compiler.clock) for r in requests]

    @torch.inference_mode()
    def _vacate(self) -> None:
        """Make all rows idle, whoever an earlier call left there."""
        self.state.length.zero_()
        self.state.active.zero_()

    @torch.inference_mode()
    def _admit(self, seat: int, row: Row) -> None:
        """Give a seat to a request; what the last one left behind lies past the length of 0."""
        self.state.length[seat] = 0
        self.state.active[seat] = True
        self.state.knobs.load(seat, row.request.sampling)

    @torch.inference_mode()
    def _prefill(self, rows: Mapping[int, Row], sampled: bool) -> None:
        """Feed the prompts of rows, by seat, chunk by chunk; all take their last piece together."""
        lengths = {seat: len(row.request.prompt) for seat, row in rows.items()}
        chunks = aligned_chunks(lengths, self.prefill_chunk)
        for chunk in chunks:
            last = chunk is chunks[-1]
            self.state.chunk.n_valid.zero_()  # rows without a piece stay as they are
            for seat, part in chunk.items():
                tokens = rows[seat].request.prompt[part.start : part.stop + 1]
                self.state.chunk.load(seat, tokens, len(part))
            longest = max(part.stop for part in chunk.values()) + self.drafter.n_ahead
            self._run("prefill" if last else "extend", longest, sampled and last)

    @torch.inference_mode()
    def _run(self, kind: str, longest: int, sampled: bool) -> None:
        """Run a step on the smallest bucket of `longest` slots or more."""
        n_slots = bucket_of(self.buckets, longest)
        key = (kind, n_slots, sampled and kind != "extend")
        if key not in self.steps:
            self.steps[key] = self.builder.build(*key, self.compiler)
        self.steps[key]()
