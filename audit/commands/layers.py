"""The command `layers`: list the layers of a model."""

import json

import click

from audit.commands.options import SourceOptions, image_shape, json_option, source_options
from audit.errors import UsageError


@click.command("layers")
@click.argument("model")
@click.option("--shape", default=None, help="Image shape such as 3x32x32, for a model that does not declare its own.")
@json_option("one JSON array")
@source_options
def layers_command(model: str, shape: str | None, as_json: bool, sources: SourceOptions) -> None:
    """List the layers of MODEL: output shape, dimension, calls per forward pass, later in-place changes.

    Example: rvaudit layers bundled:digits-vgg-robust
    """
    import torch

    from audit.commands.display import print_table
    from audit.commands.resolve import run_options
    from audit.representation.headless import Headless
    from audit.representation.layers import describe_layers
    from model_zoo.load import load_model
    from model_zoo.model_types import check_outputs

    loaded = load_model(model, run_options(sources).sources)
    size = image_shape(shape) if shape else loaded.image_shape
    if size is None:
        raise UsageError(f"{model!r} declares no image shape: add --shape, such as --shape 3x32x32")
    if shape and loaded.num_classes:
        check_outputs(loaded.network, loaded.num_classes, size, loaded.entry.name)
    network = loaded.network if loaded.num_classes else Headless(loaded.network).eval()
    layers = describe_layers(network, torch.zeros(1, *size))
    if as_json:
        click.echo(json.dumps([layer._asdict() for layer in layers]))
        return
    header = ("layer", "kind", "output", "dimension", "calls", "outputs", "overwritten")
    rows = [
        (x.name, x.kind, "x".join(map(str, x.shape)), x.dimension, x.calls, x.outputs, "yes" if x.overwritten else "")
        for x in layers
    ]
    print_table(header, rows)
