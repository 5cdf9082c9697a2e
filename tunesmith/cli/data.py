"""`tunesmith data FILE --model MODEL`: a dataset as training would see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console

if TYPE_CHECKING:
    from tunesmith.recipe.schema import Recipe
    from tunesmith.text.preview import MaskPreview
    from tunesmith.text.tokenizer import Tokenizer

app = typer.Typer(add_completion=False)


@app.command()
def data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="files, folders, builtin:NAME or Hub ids")],
    model: Annotated[str, typer.Option(help="the model whose tokenizer and chat template are used")] = "builtin:tiny",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of a recipe, such as data.max_length=2048")
    ] = None,
    example: Annotated[int, typer.Option(help="which training document or pair to show, from 1", min=1)] = 1,
) -> int:
    """Show the format found, counts, lengths, what is left out, and one example with its mask coloured.

    Of a file of preference pairs, one pair: the chosen and the rejected answer.
    """
    from tunesmith.checkpoint.source import resolve_tokenizer
    from tunesmith.recipe.load import recipe_from_mapping
    from tunesmith.text.preferences import holds_preferences
    from tunesmith.text.tokenizer import load_tokenizer

    recipe = recipe_from_mapping({"model": {"path": model}, "data": {"train": files}}, overrides or [])
    tokenizer = load_tokenizer(resolve_tokenizer(recipe))
    show = _show_pairs if holds_preferences(recipe.data) else _show_documents
    show(recipe, tokenizer, example)
    return 0


def _show_documents(recipe: Recipe, tokenizer: Tokenizer, example: int) -> None:
    from tunesmith.text.dataset import load_data
    from tunesmith.text.preview import check_trainable, mask_preview

    loaded = load_data(recipe.data, tokenizer, seed=recipe.train.seed)
    preview = mask_preview(loaded.train[min(example, len(loaded.train)) - 1], loaded.tokenizer)
    _print(loaded.summary.lines(), preview)
    console.emit({**loaded.summary.as_dict(), "example": preview.data})
    check_trainable(loaded.train, loaded.tokenizer, recipe.data)


def _show_pairs(recipe: Recipe, tokenizer: Tokenizer, example: int) -> None:
    from tunesmith.text.preferences import load_preferences
    from tunesmith.text.preview import check_trainable, pair_preview

    loaded = load_preferences(recipe.data, tokenizer, seed=recipe.train.seed)
    preview = pair_preview(loaded.train[min(example, len(loaded.train)) - 1], loaded.tokenizer)
    _print(loaded.summary.lines(), preview)
    console.err.print("\nthese pairs can't be trained on yet: there is no preference training (DPO)", markup=False)
    console.emit({**loaded.summary.as_dict(), "example": preview.data})
    check_trainable(loaded.train.documents, loaded.tokenizer, recipe.data)


def _print(lines: list[str], preview: MaskPreview) -> None:
    for line in lines:
        console.err.print(line, markup=False)
    console.err.print()
    console.err.print(preview.text)
