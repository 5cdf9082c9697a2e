"""Serving by several processes that share every matrix of the blocks and the heads of the cache.

    first process   engine, scheduler, pages, sampling     --pass: sizes by message, tensors by broadcast-->  the others
    all processes   embeddings (the first one's, broadcast) -> blocks: own heads, own features, sums -> hidden states
    first process   head and draw: the others never learn which token it was

All processes see all tokens (no sequence parallelism: a step may have one token), so a block has two sums over the
team. The head and the embedding are whole in every process, as `parallel/tensor.py` leaves them; only the first uses
them. Source: arXiv 1909.08053, section 3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple, dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tunesmith.engine.batch import FreshTail, SampledRow, StepBatch, StepResult
from tunesmith.engine.cache_size import num_pages as fitting_pages
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.graphs import DecodeGraphs
from tunesmith.engine.interfaces import Pending
from tunesmith.engine.pages import PAGE_SLOTS, PagedCache
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.tensor_graphs import FollowingGraphs, LeadingGraphs
from tunesmith.engine.tensor_messages import Message
from tunesmith.errors import ParallelError
from tunesmith.model.block import Block
from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import PackedTokens
from tunesmith.parallel.collectives import Team
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.tensor import SharedStream, share_linears


@dataclass(frozen=True)
class ReducedStream:
    """The stream of processes that all have all tokens: parts of a block's outputs are summed, nothing is gathered."""

    team: Team

    def padded(self, pack: PackedTokens) -> PackedTokens:
        """As it is."""
        return pack

    def own(self, x_TD: Tensor) -> Tensor:
        """The first process's embeddings, in all: only it knows every token (the last ones are on its device)."""
        rows = x_TD.contiguous()
        torch.distributed.broadcast(rows, group=self.team.group, group_src=0)
        return rows

    def gathered(self, x_TD: Tensor) -> Tensor:
        """As it is."""
        return x_TD

    def summed(self, x_TD: Tensor) -> Tensor:
        """The sum over the processes, in all of them."""
        total = x_TD.contiguous()
        self.team.sum_(total)
        return total

    def gather(self, x_TD: Tensor) -> Tensor:
        """As it is."""
        return x_TD

    def scatter(self, x_TD: Tensor) -> Tensor:
        """As `summed`."""
        return self.summed(x_TD)

    def gather_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """As it is."""
        return lambda: x_TD

    def scatter_beside(self, x_TD: Tensor) -> Callable[[], Tensor]:
        """As `summed`."""
        return lambda: self.summed(x_TD)


def share_to_serve(decoder: Decoder, mesh: Mesh) -> Decoder:
    """A decoder that holds this process's part of every linear of the blocks, and is to answer, not to train.

    Its configuration counts the heads that are here, so that caches are made for them. A whole decoder is cut.
    Raises: ParallelError where heads or matrices can't be divided.
    """
    try:
        shared = decoder.stream if isinstance(decoder.stream, SharedStream) else share_linears(decoder, mesh)
    except ParallelError as error:
        raise for_serving(error) from None
    stream = ReducedStream(shared.team)
    decoder.stream = stream
    for block in decoder.blocks:
        assert isinstance(block, Block)
        block.stream = stream
    config = decoder.config
    decoder.config = replace(
        config,
        num_attention_heads=config.num_attention_heads // shared.team.size,
        num_key_value_heads=config.num_key_value_heads // shared.team.size,
    )
    return decoder


def for_serving(error: ParallelError) -> ParallelError:
    """The same, naming the options of serving in place of the recipe's keys."""
    said = str(error).replace("parallel.tensor", "tensor_parallel_size")
    return ParallelError(said.replace("method.kind to lora", "quantize to int8 or fp8"))


class ShareRunner(NativeRunner):
    """One process's part of the runner: its heads' pages, of which all processes have equally many."""

    def __init__(
        self, model: Decoder, config: EngineConfig, num_pages: int | None = None, *, beside_page_bytes: int = 0
    ) -> None:
        assert isinstance(model.stream, ReducedStream)
        self.team = model.stream.team
        super().__init__(model, config, num_pages, beside_page_bytes=beside_page_bytes)

    def _make_cache(self, pages: int | None) -> PagedCache:
        """All processes call it together: with the pages that fit where the least do."""
        if pages is None:
            model, beside = self.model.config, self.beside_page_bytes
            pages = fitting_pages(self.config, model, self.page_dtype, self.device, self.worst_pass, beside)
            agreed = torch.tensor([pages], device=self.device)
            torch.distributed.all_reduce(agreed, op=torch.distributed.ReduceOp.MIN, group=self.team.group)
            pages = int(agreed)
        return super()._make_cache(pages)

    def _make_graphs(self) -> DecodeGraphs:
        return FollowingGraphs(self._decode, self.sampling, **self.graph_options())

    def graph_options(self) -> dict[str, Any]:
        """What graphs of this runner are made with."""
        return {
            "max_num_seqs": self.config.max_num_seqs,
            "max_context": self.max_model_len,
            "slots_of_page": PAGE_SLOTS,
            "device": self.device,
            "team": self.team,
        }

    def follow(self, message: Message) -> None:
        """Take part in the pass that the first process launches now."""
        batch = receive_batch(message, self.team, self.device)
        with self._passing():
            if not message["rows"]:
                self._all_hidden(batch)
            elif isinstance(self.graphs, FollowingGraphs):
                self.graphs.follow(batch, message["rows"])
            else:
                raise ParallelError("the first process replays a recorded step, and this one records none")

    def follow_recording(self, message: Message) -> None:
        """Take part in what the first process records now."""
        if isinstance(self.graphs, FollowingGraphs):
            self.graphs.follow_recording(message)


class TensorParallelRunner(ShareRunner):
    """The first process's runner: it tells the others of every pass before it takes part.

    tell: gives a message to every other process. check: raises where one of them has failed. give_up: told why a pass
        was broken off here: the others are in the middle of it, and can't go on.
    """

    def __init__(
        self,
        model: Decoder,
        config: EngineConfig,
        tell: Callable[[Message], None],
        check: Callable[[], None] = lambda: None,
        num_pages: int | None = None,
        give_up: Callable[[str], None] = lambda reason: None,
        beside_page_bytes: int = 0,
    ) -> None:
        self.tell = tell
        self.check = check
        self.give_up = give_up
        super().__init__(model, config, num_pages, beside_page_bytes=beside_page_bytes)

    def _make_graphs(self) -> DecodeGraphs:
        return LeadingGraphs(self._decode, self.sampling, tell=self.tell, **self.graph_options())

    def forward(self, batch: StepBatch) -> None:
        """Launch the pass in all processes."""
        self.check()
        try:
            rows = self.graphs.prepare(batch) if isinstance(self.graphs, LeadingGraphs) else 0
            self.tell({**describe_batch(batch), "rows": rows})
            send_batch(batch, self.team)
            super().forward(batch)
        except BaseException as error:
            self.give_up(f"{type(error).__name__}: {error}")
            if isinstance(error, Exception):
                self.check()  # says which process is gone, where the collective only says that a connection is
            raise

    def idle(self) -> bool:
        """As any runner; a process that has failed is noticed in moments without work too."""
        self.check()
        return super().idle()

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> Pending:
        """Launch the choice of tokens, here alone."""
        return _Checked(super().sample(batch, rows, masks), self.check)


@dataclass(frozen=True)
class _Checked:
    """A step that counts only if no process has failed until it was there."""

    pending: Pending
    check: Callable[[], None]

    def wait(self) -> StepResult:
        """The step's tokens on the host."""
        try:
            result = self.pending.wait()
        except Exception:
            self.check()
            raise
        self.check()
        return result


def describe_batch(batch: StepBatch) -> Message:
    """What the other processes must know of a pass before its tensors come."""
    chosen = batch.token_adapters
    return {
        "kind": "pass",
        "num_tokens": batch.num_tokens,
        "num_pages": batch.block_tables_RP.shape[1],
        "max_query": batch.max_query,
        "min_query": batch.min_query,
        "max_context": batch.max_context,
        "fresh": None if batch.fresh is None else list(astuple(batch.fresh)),
        "slots": list(batch.sequence_slots),
        "is_decode": batch.is_decode,
        "adapters": None if chosen is None else np.asarray(chosen, dtype=np.int32).tobytes(),
        "passes": [describe_batch(part) for part in batch.passes],
    }


def send_batch(batch: StepBatch, team: Team) -> None:
    """The tensors of a pass, and of the parts that it is cut into, to all processes: one message each."""
    wide = [batch.positions_T, batch.slots_T]
    narrow = [batch.query_starts_R1, batch.context_R, batch.block_tables_RP.reshape(-1)]
    flat = torch.cat([*wide, *(tensor.to(torch.int64) for tensor in narrow)])
    torch.distributed.broadcast(flat, group=team.group, group_src=0)
    for part in batch.passes:
        send_batch(part, team)


def receive_batch(message: Message, team: Team, device: torch.device) -> StepBatch:
    """The pass that the first process sends. Its tokens are not told: embeddings come from the first process."""
    tokens, requests, pages = message["num_tokens"], len(message["slots"]), message["num_pages"]
    sizes = [tokens, tokens, requests + 1, requests, requests * pages]
    flat = torch.empty(sum(sizes), dtype=torch.int64, device=device)
    torch.distributed.broadcast(flat, group=team.group, group_src=0)
    positions, slots, starts, contexts, tables = flat.split(sizes)
    none, chosen = flat.new_empty(0), message["adapters"]
    adapters = None if chosen is None else np.frombuffer(chosen, dtype=np.int32)
    # A recorded step draws in every process; only the first one's tokens count.
    drawn = torch.zeros_like(positions) if message["is_decode"] else none
    return StepBatch(
        tokens_T=torch.zeros_like(positions),
        positions_T=positions,
        slots_T=slots,
        query_starts_R1=starts.int(),
        context_R=contexts.int(),
        block_tables_RP=tables.int().view(requests, pages),
        max_query=message["max_query"],
        min_query=message["min_query"],
        max_context=message["max_context"],
        fresh=_fresh_of(message["fresh"]),
        sample_rows_B=none,
        sample_slots_B=drawn,
        sample_positions_B=drawn,
        sequence_slots=message["slots"],
        is_decode=message["is_decode"],
        adapter_T=None if adapters is None else torch.from_numpy(adapters.copy()).to(device),
        token_adapters=adapters,
        passes=tuple(receive_batch(part, team, device) for part in message["passes"]),
    )


def _fresh_of(told: Sequence[Any] | None) -> FreshTail | None:
    """The prompts that all processes let attend over their own keys."""
    if told is None:
        return None
    lengths, num_before, max_query, max_context = told
    return FreshTail(tuple(lengths), num_before, max_query, max_context)
