"""`tunesmith data FILE --model MODEL`: a dataset as training would see it."""

from __future__ import annotations

from typing import Annotated

import typer

from tunesmith.cli import console

app = typer.Typer(add_completion=False)


@app.command()
def data(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="files, folders, builtin:NAME or Hub ids")],
    model: Annotated[str, typer.Option(help="the model whose tokenizer and chat template are used")] = "builtin:tiny",
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of a recipe, such as data.max_length=2048")
    ] = None,
    example: Annotated[int, typer.Option(help="which training document to show, from 1", min=1)] = 1,
) -> int:
    """Show the format found, counts, lengths, what is left out, and one example with its mask coloured."""
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.recipe.load import recipe_from_mapping
    from tunesmith.text.dataset import load_data
    from tunesmith.text.preview import check_trainable, mask_preview
    from tunesmith.text.tokenizer import load_tokenizer

    recipe = recipe_from_mapping({"model": {"path": model}, "data": {"train": files}}, overrides or [])
    tokenizer = load_tokenizer(resolve_model(recipe.model.path, recipe.model.revision))
    loaded = load_data(recipe.data, tokenizer, seed=recipe.train.seed)
    for line in loaded.summary.lines():
        console.err.print(line, markup=False)
    preview = mask_preview(loaded.train[min(example, len(loaded.train)) - 1], loaded.tokenizer)
    console.err.print()
    console.err.print(preview.text)
    console.emit({**loaded.summary.as_dict(), "example": preview.data})
    check_trainable(loaded.train, loaded.tokenizer, recipe.data)
    return 0
