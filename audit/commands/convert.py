"""The command `convert`: write a checkpoint as safetensors."""

import json
from pathlib import Path

import click

from audit.commands.options import FILE, json_option
from audit.errors import UsageError


@click.command("convert")
@click.argument("checkpoint", type=FILE)
@click.argument("out", type=FILE)
@click.option("--key", default="", help="The entry of CHECKPOINT to take, or a prefix of names: model_ema, teacher.")
@json_option("one JSON object")
def convert_command(checkpoint: Path, out: Path, key: str, as_json: bool) -> int:
    """Write the tensors of CHECKPOINT as OUT.safetensors; no code in the checkpoint is run.

    The versions of modules that torch stores beside tensors, by which networks read older layouts, go into the header.

    Exit code 3 for a file that is missing or corrupt, 4 for one that would run code.

    Example: rvaudit convert net.pth net.safetensors --key model_ema
    """
    from hashlib import sha256

    import safetensors.torch

    from audit.commands.display import print_facts
    from audit.storage import write_atomically
    from model_zoo.weights.checkpoints import read_weights
    from model_zoo.weights.versions import versions_header

    if out.suffix != ".safetensors":
        raise UsageError(f"{out.name!r} must end in .safetensors")
    if out.exists():
        raise UsageError(f"{out} exists: choose another name, or remove it")
    weights = read_weights(checkpoint, key=key)
    prefix = weights.prefix or ""
    tensors = {name.removeprefix(prefix): t for name, t in weights.tensors.items() if name.startswith(prefix)}
    # tensors may share memory, which safetensors cannot express
    separate = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(separate, versions_header(weights.metadata, prefix))
    write_atomically(out, data)
    facts = {
        "path": str(out),
        "tensors": len(tensors),
        "sha256": sha256(data).hexdigest(),
        "from_sha256": weights.sha256,
        "unwrapped": "; ".join(weights.notes),
    }
    if as_json:
        click.echo(json.dumps(facts))
    else:
        print_facts(facts)
    return 0
