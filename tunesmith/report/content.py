"""What a report says, gathered from the runs before it is drawn as a page or as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from tunesmith.report.answers import Evaluation, evaluations_of
from tunesmith.report.infer import infer_sections
from tunesmith.report.load import Node, Run
from tunesmith.report.profile import profile_sections
from tunesmith.report.rows import Row, rows_of
from tunesmith.report.scale import Scale, scale_of
from tunesmith.report.section import Section
from tunesmith.report.serve import serve_sections
from tunesmith.report.strings import Words
from tunesmith.report.tables import environment_items
from tunesmith.report.training import Training, training_of
from tunesmith.report.verdict import Sentence, bench_verdict, train_sentence

MEASURING = ("bench", "scale", "serve", "infer")
"""Kinds of runs that are there to measure: without a cell they say so."""


@dataclass(frozen=True)
class Bench:
    """A bench run and its rows."""

    name: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Content:
    """Everything a report shows, in the order in which it shows it."""

    words: Words
    name: str
    created: str | None
    headline: str
    device: str | None
    random_weights: bool
    sentences: tuple[Sentence, ...]
    benches: tuple[Bench, ...]
    scales: tuple[Scale, ...]
    sections: tuple[Section, ...]
    trains: tuple[Training, ...]
    evaluations: tuple[Evaluation, ...]
    certificates: tuple[tuple[str, Node], ...]
    environment: tuple[tuple[str, str], ...]


def gather(runs: Sequence[Run], words: Words) -> Content:
    """The content of a report on these runs."""
    benches = tuple(Bench(run.name, tuple(rows_of(run))) for run in runs if run.kind == "bench")
    evaluations = tuple(evaluations_of(runs, words))
    scales = tuple(scale_of(run, words) for run in runs if run.kind == "scale")
    sections = (*serve_sections(runs, words), *infer_sections(runs, words), *profile_sections(runs, words))
    trains = tuple(run for run in runs if run.metrics)
    headline, sentences = _verdict(benches, scales, sections, trains, evaluations, words)
    if headline is None:
        headline = _without_verdict(runs, words)
    return Content(
        words=words,
        name=" · ".join(dict.fromkeys(run.name for run in runs)),
        created=next((run.created_at[:16].replace("T", " ") for run in runs if run.created_at), None),
        headline=headline,
        device=_device(runs),
        random_weights=_random_weights(runs),
        sentences=tuple(sentences),
        benches=benches,
        scales=scales,
        sections=sections,
        trains=tuple(training_of(run, words) for run in trains),
        evaluations=evaluations,
        certificates=tuple(_certificates(runs, words)),
        environment=tuple(words.environment(name, text) for name, text in environment_items(runs)),
    )


def _certificates(runs: Sequence[Run], words: Words) -> Iterator[tuple[str, Node]]:
    """Each with its heading, which of several runs says whose it is."""
    for run in runs:
        if run.certificate is not None:
            yield words("certificate_of", name=run.name) if len(runs) > 1 else words("certificate"), run.certificate


def _verdict(
    benches: Sequence[Bench],
    scales: Sequence[Scale],
    sections: Sequence[Section],
    trains: Sequence[Run],
    evaluations: Sequence[Evaluation],
    words: Words,
) -> tuple[str | None, list[Sentence]]:
    """The headline is the first bench's; without one, the first sentence there is; None where nothing is said."""
    verdicts = [bench_verdict(bench.rows, words) for bench in benches]
    sentences = [Sentence(verdict.headline) for verdict in verdicts[1:]]
    sentences += [sentence for verdict in verdicts for sentence in verdict.sentences]
    sentences += [sentence for scale in scales for sentence in scale.sentences]
    sentences += [sentence for section in sections for sentence in section.sentences]
    sentences += [Sentence(text) for run in trains if (text := train_sentence(run, words))]
    sentences += [Sentence(text) for evaluation in evaluations for text in evaluation.sentences]
    if verdicts:
        return verdicts[0].headline, sentences
    return (sentences[0].text, sentences[1:]) if sentences else (None, [])


def _without_verdict(runs: Sequence[Run], words: Words) -> str:
    """The title of a page without a sentence; of runs that should have measured and did not, that."""
    if any(run.cells or run.kind not in MEASURING for run in runs):
        return words("title")
    return words("nothing_measured", status=", ".join(dict.fromkeys(run.status for run in runs if run.status)) or "?")


def _device(runs: Sequence[Run]) -> str | None:
    """The device that the first run measured on: as its cells name it, else as the environment does."""
    for run in runs:
        names = [cell.text("device", "name") or cell.text("summary", "device", "name") for cell in run.cells]
        gpus = run.environment.get("gpus")
        if isinstance(gpus, list) and gpus:
            names.append(Node(gpus[0]).text("name"))
        names.append(run.environment.text("cpu", "name"))
        found = next((name for name in names if name), None)
        if found:
            return found
    return None


def _random_weights(runs: Sequence[Run]) -> bool:
    """Whether a bench, or a training on random tokens, had random weights: pre-training on text only starts so."""
    recipes = [run.recipe for run in runs if run.kind != "train" or run.recipe.get("data", "format") == "tokens"]
    recipes += [Node(cell.get("recipe")) for run in runs for cell in run.cells]
    return any(recipe.get("model", "weights") == "random" for recipe in recipes)
