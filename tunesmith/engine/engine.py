"""The engine's loop: plan a step, launch it, read what an earlier one drew, hand out text; finish or abort.

    step ahead    plan 2, launch 2, read 1   plan 3, launch 3, read 2   ...       the device never waits for the host
    plainly       plan 1, launch 1, read 1   plan 2, launch 2, read 2   ...

A step ahead, a request's last token is not known when the next step is planned: the batch names it by slot, and a
request that turns out to have ended wastes one row, whose token is dropped. Rows with a grammar need the token before
theirs for their mask: their pass is launched ahead all the same, and only the choice waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from tunesmith.engine.answers import advance, complete, rest
from tunesmith.engine.batching import BatchBuilder
from tunesmith.engine.collection import FrozenWhileBusy
from tunesmith.engine.config import EngineConfig, EngineStats
from tunesmith.engine.guesses import behind_guesses, take_guesses
from tunesmith.engine.interfaces import Adapters, Drafter, Grammars, Pending, Runner
from tunesmith.engine.limits import answer_limit
from tunesmith.engine.masks import grammar_masks
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.engine.prefix import PageChain, PrefixCache
from tunesmith.engine.request import Completion, Request, SamplingParams, StepOutput
from tunesmith.engine.sampling import draw_seed
from tunesmith.engine.scheduler import Scheduled, Scheduler
from tunesmith.engine.sequence import Sequence as Running
from tunesmith.engine.sequence import adapters_of
from tunesmith.engine.step_clock import StepClock
from tunesmith.engine.step_sizes import StepSizes
from tunesmith.engine.text import AnswerText, TextDecoder
from tunesmith.errors import RequestError

WAIT_S = 0.0005
MakeDecoder = Callable[[Request], TextDecoder]


@dataclass
class Launched:
    """A step on the device."""

    parts: list[Scheduled]
    pending: Pending


class Engine:
    """Requests in, step outputs out. Not thread-safe: one owner calls `step`.

    stop_ids: the model's own end-of-turn tokens.
    make_decoder: a request's text decoder; without it answers have no text, only tokens.
    grammars, adapters, drafter: what constrained answers, adapters and speculation need (interfaces.py).
    """

    def __init__(
        self,
        runner: Runner,
        *,
        config: EngineConfig,
        stop_ids: Collection[int] = (),
        make_decoder: MakeDecoder | None = None,
        grammars: Grammars | None = None,
        adapters: Adapters | None = None,
        drafter: Drafter | None = None,
    ) -> None:
        self.runner = runner
        self.config = config
        self.stop_ids = frozenset(stop_ids)
        self.make_decoder = make_decoder
        self.grammars = grammars
        self.adapters = adapters
        self.drafter = drafter
        uses_prefixes = config.enable_prefix_cache and runner.shares_prefixes
        self.prefix = PrefixCache(runner.pages) if uses_prefixes else None
        self.scheduler = Scheduler(config, runner.pages, self.prefix)
        self.builder = BatchBuilder(config.max_num_seqs, config.max_model_len, runner.device)
        self.collection = FrozenWhileBusy()
        self.unready: list[Running] = []
        self.launched: Launched | None = None
        self.mail: dict[int, list[StepOutput]] = {}
        self.num_requests = 0
        self.counts: dict[str, Any] = {"steps": 0, "prompt_tokens": 0, "generation_tokens": 0}
        self.counts |= {"num_finished": 0, "num_failed": 0, "drafted_tokens": 0, "accepted_tokens": 0}
        self.sizes = StepSizes()
        self.last_step_s = 0.0
        self.clock = StepClock()

    # Requests

    def submit(
        self,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        text_context: Sequence[int] = (),
        priority: int = 0,
        adapter: str | None = None,
        cache_salt: str = "",
        streams: bool = True,
    ) -> int:
        """Queue a request; returns its id. Raises RequestError when it can never be served."""
        self._check(prompt_ids, params, adapter)
        limits = self.config.max_model_len, self.runner.pages.num_pages
        max_tokens = answer_limit(len(prompt_ids), params, *limits)
        self.num_requests += 1
        request = Request(
            id=self.num_requests,
            prompt_ids=tuple(prompt_ids),
            params=params,
            max_tokens=max_tokens,
            arrived_s=time.perf_counter(),
            text_context=tuple(text_context),
            priority=priority,
            adapter=adapter,
            cache_salt=cache_salt,
            streams=streams,
        )
        sequence = self._sequence(request)
        if not sequence.is_ready:
            if params.structured is not None and self.grammars is not None:
                self.grammars.submit(request.id, params.structured)
            self.unready.append(sequence)
        if not self.has_work:
            self.collection.begin()
        self.scheduler.submit(sequence)
        return request.id

    def _check(self, prompt_ids: Sequence[int], params: SamplingParams, adapter: str | None) -> None:
        if not prompt_ids:
            raise RequestError("the prompt has no token: give at least one, for instance the beginning-of-text token")
        if params.stop and self.make_decoder is None:
            raise RequestError("stop texts need a tokenizer, and this model was loaded without one")
        if params.structured is not None and self.grammars is None:
            raise RequestError("structured answers need a tokenizer and the grammar library (llguidance)")
        if adapter is not None:
            if self.adapters is None:
                raise RequestError(f"no adapter is served here, so {adapter!r} is not known")
            self.adapters.check(adapter)

    def _sequence(self, request: Request) -> Running:
        params = request.params
        decoder = None if self.make_decoder is None else self.make_decoder(request)
        return Running(
            request=request,
            text=AnswerText(decoder, params.stop),
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids),
            seed=draw_seed() if params.seed is None else params.seed,
            chain=PageChain(request.cache_salt, request.adapter, request.prompt_tokens),
            all_ids=list(request.prompt_ids),
            prompt_logprobs=[] if params.prompt_logprobs is None else [None],
            is_ready=params.structured is None and request.adapter is None,
        )

    def abort(self, request_id: int) -> Completion | None:
        """End a request wherever it is and free its pages; what it has said so far, or None when it had not begun."""
        self.mail.pop(request_id, None)
        sequence = self.scheduler.find(request_id)
        if sequence is None:
            return None
        had_begun = sequence.was_admitted
        self._finish(sequence)
        rest(sequence)
        return complete(sequence, "abort") if had_begun else None

    def _finish(self, sequence: Running) -> None:
        """Take a sequence out of everything that knows it."""
        self.scheduler.finish(sequence)
        request = sequence.request
        if sequence in self.unready:
            self.unready.remove(sequence)
        if request.params.structured is not None and self.grammars is not None:
            self.grammars.forget(request.id)
        if sequence.adapter_index >= 0 and self.adapters is not None:
            self.adapters.release(sequence.adapter_index)
        if self.drafter is not None:
            self.drafter.forget(request.id)
        self._release_slots()
        if self.launched is not None and all(part.sequence.is_finished for part in self.launched.parts):
            self.launched = None
        if not self.has_work:
            self.collection.end()
        if self.config.debug_pages:
            self.scheduler.check()

    def _release_slots(self) -> None:
        left, self.scheduler.left_slots = self.scheduler.left_slots, []
        for slot in left:
            self.runner.release(slot)

    # Steps

    @property
    def has_work(self) -> bool:
        """Whether any request waits or runs."""
        return self.scheduler.has_work or self.launched is not None

    def step(self) -> list[StepOutput]:
        """Plan and launch one step, and read one: what is new of every request that it had.

        An exception that belongs to one request ends that request alone (finish_reason "error"). Any other, and an
        interruption, leaves caches and answers out of step, so what was running then is dropped.
        """
        self.clock.begin()
        try:
            outputs = self._step()
        except BaseException:
            self._drop_running()
            raise
        self.last_step_s = self.clock.end()
        return outputs

    def _step(self) -> list[StepOutput]:
        outputs = self._prepare_waiting()
        if not self.scheduler.running and self.runner.refresh() and self.prefix is not None:
            self.prefix.clear()
        self._draft()
        plan = self.scheduler.plan()
        self._release_slots()
        self._count_admitted()
        self.clock.mark("plan")
        if not plan:
            if self.launched is None and self.unready and not outputs:
                time.sleep(WAIT_S)  # for a thread that compiles a grammar or loads an adapter
            return outputs + self._read()
        batch, rows = self.builder.build(plan, self.runner.fixed_rows)
        if self.drafter is not None:
            rows = behind_guesses(plan.scheduled, rows)
        self.clock.mark("build")
        self.runner.forward(batch)
        self.clock.launch(batch)
        has_grammars = any(row.has_grammar for row in rows)
        if has_grammars:
            outputs += self._read()
        masks, failed = grammar_masks(plan.scheduled, self.runner.vocab_size) if has_grammars else (None, [])
        before, self.launched = self.launched, Launched(plan.scheduled, self.runner.sample(batch, rows, masks))
        self.counts["steps"] += 1
        self.sizes.add(plan.scheduled)
        self.clock.mark("sample")
        if has_grammars:  # a request may have ended after its rows were planned, and was drawn for all the same
            self.scheduler.left_slots += {row.slot for row in rows}.intersection(self.scheduler.free_slots)
            self._release_slots()
        for sequence, error in failed:
            outputs.append(self._fail(sequence, error))
        if not self.config.step_ahead or self.drafter is not None:
            return outputs + self._read()
        return outputs + self._read_one(before)

    def _draft(self) -> None:
        if self.drafter is not None:
            num_guesses = take_guesses(self.drafter, self.scheduler.running, self.config)
            self.counts["drafted_tokens"] += num_guesses

    def _prepare_waiting(self) -> list[StepOutput]:
        """Let those in whose adapter is loaded and whose grammar is compiled; end those whose failed."""
        outputs = []
        if self.adapters is not None:
            self.adapters.poll()
        for sequence in list(self.unready):
            try:
                sequence.is_ready = self._get_ready(sequence)
            except Exception as error:
                outputs.append(self._fail(sequence, error))
                continue
            if sequence.is_ready:
                self.unready.remove(sequence)
        return outputs

    def _get_ready(self, sequence: Running) -> bool:
        request = sequence.request
        if request.params.structured is not None and sequence.grammar is None:
            assert self.grammars is not None
            sequence.grammar = self.grammars.ready(request.id)
            if sequence.grammar is None:
                return False
        if request.adapter is not None and sequence.adapter_index < 0:
            assert self.adapters is not None
            index = self.adapters.acquire(request.adapter)
            if index is None:
                return False
            sequence.adapter_index = index
            key = self.adapters.cache_key(index)
            sequence.chain = PageChain(request.cache_salt, key, request.prompt_tokens)
        return True

    def _count_admitted(self) -> None:
        now = time.perf_counter()
        admitted, self.scheduler.admitted = self.scheduler.admitted, []
        for sequence in admitted:
            sequence.started_s = now
            self.counts["prompt_tokens"] += sequence.num_prompt

    def _read(self) -> list[StepOutput]:
        """Read the launched step, if there is one."""
        launched, self.launched = self.launched, None
        return self._read_one(launched)

    def _read_one(self, launched: Launched | None) -> list[StepOutput]:
        if launched is None:
            return []
        result = launched.pending.wait()
        self.clock.mark("wait")
        outputs: list[StepOutput] = []
        row = scored = num_sampled = 0
        for part in launched.parts:
            sequence = part.sequence
            if not sequence.is_finished:
                try:
                    output = advance(part, result, row, scored)
                except Exception as error:
                    output = self._fail(sequence, error)
                if output is not None:
                    outputs.append(output)
                    if output.completion is None:
                        num_sampled += 1
                    elif not sequence.is_finished:
                        num_sampled += 1
                        self._settle(sequence)
            scored += part.num_scored
            if part.samples:
                row += 1 + part.num_drafts
        num_tokens = num_sampled if self.drafter is None else sum(len(output.token_ids) for output in outputs)
        self.counts["generation_tokens"] += num_tokens
        if self.drafter is not None:
            self.counts["accepted_tokens"] += num_tokens - num_sampled
        return outputs

    def _settle(self, sequence: Running) -> None:
        """An answer is complete: what it has computed can be found by others."""
        self.counts["num_finished"] += 1
        if sequence.slot is not None:
            self.scheduler.remember(sequence)
        self._finish(sequence)

    def _fail(self, sequence: Running, error: Exception) -> StepOutput:
        """End one request because of an error that is its own."""
        self.counts["num_failed"] += 1
        self._finish(sequence)
        said = str(error) or type(error).__name__
        return StepOutput(sequence.request.id, [], rest(sequence), complete(sequence, "error", error=said))

    def _drop_running(self) -> None:
        self.launched = None
        for sequence in list(self.scheduler.running):
            self._finish(sequence)
        for sequence in [s for s in self.scheduler.waiting if s.in_flight]:
            self._finish(sequence)
        if self.prefix is not None:
            self.prefix.clear()  # pages of the step that failed may be remembered already

    def forget_prefixes(self) -> None:
        """The weights changed: what is cached was computed with others. Raises RequestError while requests run."""
        if self.scheduler.running:
            raise RequestError("cached prefixes can't be forgotten while requests run")
        if self.prefix is not None:
            self.prefix.clear()

    def idle(self) -> bool:
        """Something that makes later steps faster, for a moment without work; False where nothing is left to do."""
        return not self.has_work and self.runner.idle()

    def collect(self, wanted: Collection[int]) -> list[StepOutput]:
        """New outputs of the wanted requests, after a step if none wait; other requests' outputs are kept for them."""
        waiting = [request_id for request_id in self.mail if request_id in wanted]
        found = [output for request_id in waiting for output in self.mail.pop(request_id)]
        if found:
            return found
        if not self.has_work:
            raise RequestError("the request is gone: a step that it shared with others was interrupted; send it again")
        for output in self.step():
            if output.request_id in wanted:
                found.append(output)
            else:
                self.mail.setdefault(output.request_id, []).append(output)
        return found

    def stats(self) -> EngineStats:
        """The state now, and the counts since the start."""
        scheduler, pages = self.scheduler, self.runner.pages
        page_bytes = getattr(getattr(self.runner, "cache", None), "token_bytes", 0) * PAGE_SLOTS
        num_cached = sum(sequence.num_computed for sequence in scheduler.running)
        return EngineStats(
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_preempted=scheduler.num_preempted,
            pages_used=pages.num_used,
            pages_total=pages.num_pages,
            page_slots=PAGE_SLOTS,
            prefix_hits_tokens=scheduler.prefix_hits_tokens,
            prefix_queries_tokens=scheduler.prefix_queries_tokens,
            last_step_s=self.last_step_s,
            kv_used_bytes=num_cached * page_bytes // PAGE_SLOTS,
            kv_reserved_bytes=pages.num_used * page_bytes,
            running_adapters=adapters_of(scheduler.running),
            waiting_adapters=adapters_of(scheduler.waiting),
            **self.sizes.stats(),
            **self.counts,
        )
