"""The `recursivemas` command: verbs, each in a file of its own."""

import typer

from recursivemas.cli import bench, data, demo, eval, export, import_, inspect, pattern, push, run, train, tune, world

app = typer.Typer(
    name="recursivemas",
    help="Frozen language models that hand each other hidden states instead of text.",
    epilog="Start with: recursivemas demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command("demo")(demo.demo)
app.command("run")(run.run)
app.command("train")(train.train)
app.command("eval")(eval.evaluate)
app.command("tune")(tune.tune)
app.command("bench")(bench.bench)
app.command("import")(import_.import_)
app.command("export")(export.export)
app.command("push")(push.push)
app.command("world")(world.world)
app.add_typer(data.app, name="data")
app.add_typer(inspect.app, name="inspect")
app.add_typer(pattern.app, name="pattern")


def main() -> None:
    """Run the command line."""
    app()


if __name__ == "__main__":
    main()
