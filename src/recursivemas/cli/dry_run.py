"""`recursivemas train --dry-run`: what training would take, and what it would read. Nothing is trained or written."""

from collections.abc import Sequence

from recursivemas.cli.estimate_views import lengths_table, sample_text, say, say_preview, tables
from recursivemas.cli.terminal import out, print_json
from recursivemas.errors import ConfigError, InputError, ModelError
from recursivemas.training.estimate import estimate, team_of
from recursivemas.training.preview import Preview, preview
from recursivemas.training.recipe import Recipe
from recursivemas.worlds.material import material_of


def tell(recipe: Recipe, stages: Sequence[str], *, as_json: bool) -> None:
    """Say it as tables and samples, or as JSON."""
    found = estimate(recipe, stages=stages)
    read, why_not = _previewed(recipe, stages)
    if as_json:
        data = None if recipe.data is None else recipe.data.model_dump()
        text = {"not_read": why_not} if read is None else read.to_plain()
        print_json({"stages": list(stages), "data": data, **found.to_plain(), "text": text})
        return
    for table in [*tables(found), *([] if read is None else [lengths_table(read)])]:
        out.print(table)
        out.print()
    for line in say(found, recipe):
        out.print(line, highlight=False, markup=False)
    if read is None:
        out.print(f"data sets or tokenizers could not be read here: {why_not}", highlight=False, markup=False)
        return
    for line in say_preview(read):
        out.print(line, highlight=False, markup=False)
    for sample in read.samples:
        out.print()
        out.print(sample_text(sample), highlight=False)


def _previewed(recipe: Recipe, stages: Sequence[str]) -> tuple[Preview | None, str]:
    """The text of a recipe as far as it can be read here, or why it cannot.

    What is on the hub may not be at hand; of what is not, nothing may be wrong. Raises `InputError` or `ConfigError`.
    """
    team = team_of(recipe)
    is_local = recipe.data is None or all(source.is_local for source in recipe.data.sources)
    try:
        return preview(recipe, team, material_of(recipe, team.pattern), stages), ""
    except ModelError as error:
        return None, str(error)
    except (InputError, ConfigError) as error:
        if is_local:
            raise
        return None, str(error)
