"""The command `models`: list the models of a source."""

import json
import re
from dataclasses import asdict

import click

from audit.commands.options import json_option
from model_zoo.entries import ModelEntry


@click.command("models")
@click.argument("words", metavar="[WORD]...", nargs=-1)
@click.option("--source", default=None, help="bundled, robustbench, timm or torchvision. [bundled and robustbench]")
@json_option("one JSON array")
def models_command(words: tuple[str, ...], source: str | None, as_json: bool) -> None:
    """List models with their training and the accuracies that others published.

    Models are those whose reference, architecture, data set or training has every WORD, in any case.

    Example: rvaudit models --source robustbench cifar10 linf wideresnet
    """
    from audit.commands.display import print_table
    from model_zoo.catalogue import list_models

    entries = [entry for each in ([source] if source else ["bundled", "robustbench"]) for entry in list_models(each)]
    entries = [entry for entry in entries if _matches(entry, words)]
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in entries], allow_nan=False))
        return
    header = ("reference", "data set", "trained for", "natural", "adversarial", "source of the numbers")
    print_table(header, [_row(entry) for entry in entries])
    click.echo(f"{len(entries)} models", err=True)


def _matches(entry: ModelEntry, words: tuple[str, ...]) -> bool:
    told = (entry.ref, entry.architecture, entry.family, entry.dataset, entry.training, entry.trained_norm)
    text = " ".join(told).lower()
    return all(re.search(_pattern(word.lower()), text) for word in words)


def _pattern(word: str) -> str:
    """Return a pattern of a word; one that ends in a digit is whole: l2 is not xl2, cifar10 is not cifar100."""
    return rf"(?<![a-z0-9]){re.escape(word)}(?!\d)" if word[-1:].isdigit() else re.escape(word)


def _row(entry: ModelEntry) -> tuple[str, ...]:
    published_numbers = {number.metric: number for number in entry.published}
    natural, adversarial = published_numbers.get("natural_accuracy"), published_numbers.get("adversarial_accuracy")
    radius = f" {entry.trained_norm} {entry.trained_eps:.4g}" if entry.trained_norm else ""
    accuracies = [f"{number.value:.4f}" if number else "" for number in (natural, adversarial)]
    cited = adversarial or natural
    return (entry.ref, entry.dataset, entry.training + radius, *accuracies, cited.source if cited else "")
