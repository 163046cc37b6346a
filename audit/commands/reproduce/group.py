"""The command group `reproduce`; each study is imported only when it is used."""

import importlib

import click

# study: its module, and one line of help
STUDIES = {
    "table1": ("audit.commands.reproduce.table1", "Representations learned with and without the worst case."),
    "figure1": ("audit.commands.reproduce.model_set", "RV against the adversarial gap of the paper's model set."),
    "figure2": ("audit.commands.reproduce.model_set", "Worst-case information against accuracy, from the same run."),
    "figure3": ("audit.commands.reproduce.single_features", "Information and vulnerability of single channels."),
    "figure4": ("audit.commands.reproduce.saliency_maps", "Saliency maps of a layer."),
    "figure5": ("audit.commands.reproduce.saliency_maps", "Saliency maps of single features."),
    "theorem-3.2": ("audit.commands.reproduce.theorem32", "Theorem 3.2 on a Gaussian mixture."),
    "guess-first": ("audit.commands.reproduce.guess_first", "The table of Guess First, with an adaptive attack."),
}


class StudyGroup(click.Group):
    """The studies of `STUDIES`, each imported from its module when it is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002
        """Return the names of all studies."""
        return sorted(STUDIES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a study by its name, or None."""
        if cmd_name not in STUDIES:
            return None
        module = importlib.import_module(STUDIES[cmd_name][0])
        found: click.Command = getattr(module, f"{cmd_name.replace('-', '_').replace('.', '_')}_command")
        return found

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002
        """Write the list of studies without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, STUDIES[name][1]) for name in sorted(STUDIES)])


@click.group("reproduce", cls=StudyGroup)
def reproduce_command() -> None:
    """Compute a table or figure of the paper.

    Example: rvaudit reproduce theorem-3.2
    """
