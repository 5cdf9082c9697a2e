"""Served = trained: what a run's model says behind the server, beside what it said when its training ended.

the trained form (base as it was trained on + adapter, products in float32)
  |-- merged          the adapter folded in, in the checkpoint's dtype
  |-- copied head     the same with the copy of the head in int8, where there is one: what few requests' answers are of
  '-- as served       the weights in the form they are loaded in  --  engine: the same through the engine's pass, which
                                                                     scores prompts by the head as it is stored

reference = trained_reference(model, adapter)    before the engine takes the memory; kept in the run directory
report = check_served(llm, reference)            raises where a hop is broken; report.line() is one line
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.errors import RequestError, VerificationError
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import MOST_REQUESTS, copied_logits
from tunesmith.model.language_model import logits
from tunesmith.model.packed import pack_documents
from tunesmith.rundir.io import write_json_atomic
from tunesmith.rundir.layout import RunDir
from tunesmith.text.chat import encode_prompt
from tunesmith.verify.served_hops import Hop, compare, summarise
from tunesmith.verify.served_reference import Reference, trained_reference
from tunesmith.verify.served_rows import PromptCheck, check_prompts

__all__ = ["Reference", "ServedReport", "check_served", "trained_reference"]

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
ENGINE_LIMIT = 0.1
"""Nats, on average: the engine's log-probabilities against those of the same weights in a plain pass."""
REPORT_NAME = "served.json"
_COPIED = "head in int8"
_DTYPES = ("float32", "bfloat16", "float16")
_SAME = 0.01
"""Nats: another weight format whose log-probabilities are all so near is the form that was trained (a QLoRA run)."""


@dataclass(frozen=True)
class ServedReport:
    """What `check_served` found. `prompts` is None where the run was trained on no conversations."""

    run: str
    rows: str
    form: str
    prompts: PromptCheck | None
    hops: tuple[Hop, ...]

    def line(self) -> str:
        """All of it in one line, for people."""
        *_, weights, engine = self.hops
        parts = [
            f"on {weights.num_tokens} tokens of {self.rows} the best next token is the same for "
            f"{weights.agreement_ratio:.1%}, a log-probability differs by {weights.max_dlogprob:.2g} at most "
            f"(by {engine.max_dlogprob:.2g} more in the engine's own pass)"
        ]
        parts += [f"by {hop.max_dlogprob:.2g} where few requests run: {hop.name}" for hop in self._copied()]
        if self.prompts is not None:
            dated = ", dates apart" if self.prompts.dated else ""
            if self.prompts.num_straddling:
                dated += f", {self.prompts.num_straddling} rows with a token across the answer's start left out"
            parts.append(f"{self.prompts.num_equal} of {self.prompts.num_prompts} prompts the same ids{dated}")
        return f"{self._verdict(weights)}: " + "; ".join(parts)

    def _verdict(self, weights: Hop) -> str:
        if self.problems():
            return f"served != trained, in {self.form}"
        farthest = max(hop.max_dlogprob for hop in (weights, *self._copied()))
        if self.form in _DTYPES or farthest <= _SAME:
            return f"served = trained, in {self.form}"
        return f"served in {self.form}, near what was trained"

    def _copied(self) -> list[Hop]:
        return [hop for hop in self.hops if hop.name.startswith(_COPIED)]

    def problems(self) -> list[str]:
        """What is broken, in words."""
        found = []
        if self.prompts is not None and not self.prompts.passed:
            found.append(
                f"{self.prompts.num_prompts - self.prompts.num_equal} of {self.prompts.num_prompts} prompts have other "
                f"token ids than the training data ({self.prompts.first_difference})"
            )
        for hop in self.hops:
            if not hop.passed:
                what = "KL" if hop.kl_mean is not None else "mean |dlogprob|"
                found.append(f"{hop.name}: {what} {hop.value:.3g} nats, at most {hop.limit:g} is allowed")
        return found

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        hops = [{**asdict(hop), "passed": hop.passed} for hop in self.hops]
        prompts = None if self.prompts is None else {**asdict(self.prompts), "passed": self.prompts.passed}
        return {
            "schema": "tunesmith.served", "schema_version": SCHEMA_VERSION, "run": self.run, "rows": self.rows,
            "form": self.form, "prompts": prompts, "hops": hops, "passed": not self.problems(),
        }  # fmt: skip


def check_served(
    llm: LLM, reference: Reference, *, refuse: bool = True, chat_template: str | Path | None = None
) -> ServedReport:
    """Compare a loaded model with what was trained, and write served.json into the run directory.

    Call it before requests are served: it runs a few short ones.
    Args: `refuse`: False: only report; `chat_template`: a file that is served in place of the model's own.
    Raises: VerificationError, in one line, for prompts that differ and for a hop above its limit.
    """
    served = _served_rows(llm, reference)
    hops = [] if reference.merged is None else [reference.merged]
    if (copied := _copied_rows(llm, reference)) is not None:
        name = f"{_COPIED}, up to {MOST_REQUESTS} requests"
        hops.append(compare(name, reference.summary, copied, reference.documents))
    hops.append(compare(f"weights as served ({_form(llm)})", reference.summary, served, reference.documents))
    hops.append(_engine_hop(llm, reference, served))
    prompts = _prompts(llm, reference, chat_template) if reference.rows.rows else None
    report = ServedReport(str(reference.run.path), reference.rows.origin, _form(llm), prompts, tuple(hops))
    _write(reference.run, report)
    _forget(llm)
    if refuse and (problems := report.problems()):
        raise VerificationError(
            f"what would be served is not what the run {reference.run.path} trained: {'; '.join(problems)}. "
            f"Serve it in another form (see --quantization, --chat-template), or all the same: --served-check report"
        )
    return report


def _prompts(llm: LLM, reference: Reference, chat_template: str | Path | None) -> PromptCheck:
    """The prompts of the rows' answers by the template that is served, with the switches of the run."""
    tokenizer = llm.tokenizer
    if tokenizer is None:
        raise RequestError("served = trained: the model was loaded without a tokenizer")
    if chat_template is not None:
        tokenizer = tokenizer.with_chat_template(Path(chat_template).expanduser().read_text(encoding="utf-8"))
    own = reference.source.template_arguments or {}
    return check_prompts(
        reference.rows.rows, reference.source.system, tokenizer,
        lambda messages, switches: encode_prompt(tokenizer, messages, **{**own, **switches}),
    )  # fmt: skip


def _served_rows(llm: LLM, reference: Reference) -> list[Tensor]:
    """Logits of the served weights in a plain pass, in the dtype they are served in, by all who hold a part."""
    documents = [list(document) for document in reference.documents]
    if llm.shared is not None:
        return [llm.shared.logits([document])[0].float().cpu() for document in documents]
    return [logits(llm.model, [document])[0].float().cpu() for document in documents]


def _copied_rows(llm: LLM, reference: Reference) -> list[Tensor] | None:
    """The same by the copy of the head that steps of few requests take; None where they take none."""
    model, copy = llm.model, getattr(llm.runner, "head_copy", None)
    if copy is None or not isinstance(model, Decoder):
        return None
    device = llm.runner.device
    with torch.no_grad():
        found = [model.hidden(pack_documents([list(document)], device)) for document in reference.documents]
        return [copied_logits(copy, hidden_TD).float().cpu() for hidden_TD in found]


def _engine_hop(llm: LLM, reference: Reference, served: Sequence[Tensor]) -> Hop:
    """The engine's own log-probabilities of the rows, against the same weights in a plain pass."""
    params = SamplingParams(max_tokens=1, prompt_logprobs=1)
    summary = summarise(served, reference.documents)
    fits = [len(document) < llm.max_model_len for document in reference.documents]
    documents = [list(document) for document, ok in zip(reference.documents, fits, strict=True) if ok]
    positions = [ok for document, ok in zip(reference.documents, fits, strict=True) for _ in document[1:]]
    best_P, expected_P = summary[0][:, 0].long()[positions], summary[2][positions].double()
    scored = [one for done in llm.generate(documents, params, progress=False) for one in (done.prompt_logprobs or [])]
    known = [one for one in scored if one is not None]
    if len(known) != len(expected_P):
        raise VerificationError(f"the engine gave {len(known)} log-probabilities of {len(expected_P)} tokens")
    difference_P = (torch.tensor([one.logprob for one in known], dtype=torch.float64) - expected_P).abs()
    best = torch.tensor([one.top[0][0] for one in known])
    return Hop(
        name="engine", num_tokens=len(known), max_dlogprob=float(difference_P.max()),
        mean_dlogprob=float(difference_P.mean()), kl_mean=None,
        agreement_ratio=float((best == best_P).float().mean()),
        limit=ENGINE_LIMIT,
    )  # fmt: skip


def _forget(llm: LLM) -> None:
    """The check's own requests leave nothing behind: no cached prefix, no counts."""
    llm.engine.forget_prefixes()
    llm.engine.counts = dict.fromkeys(llm.engine.counts, 0)


def _form(llm: LLM) -> str:
    quantize = llm.source.quantize if llm.source is not None else None
    dtype = str(next(iter(llm.model.parameters())).dtype).removeprefix("torch.")
    return quantize or dtype


def _write(run: RunDir, report: ServedReport) -> None:
    try:
        write_json_atomic(run.path / REPORT_NAME, report.to_dict())
    except OSError as error:
        log.warning("%s can't be written to %s: %s", REPORT_NAME, run.path, error)
