"""Resolve options to the types of the lower rooms. Loads torch, so commands import it inside functions."""

from audit.adversary.threat import ThreatModel, threat_model
from audit.commands.options import SourceOptions
from audit.config.values import parse_number
from audit.errors import UsageError
from audit.run.cell import InputRules
from audit.run.loading import RunOptions
from model_zoo.load import SourceSettings


def run_options(sources: SourceOptions) -> RunOptions:
    """Return sources, data folder and device as a run takes them."""
    settings = SourceSettings(
        trust_code=sources.trust_code,
        offline=sources.offline,
        cache_dir=None,
        model_dir=sources.model_dir,
        base=sources.base,
    )
    return RunOptions(settings, sources.data_dir, sources.device, batch_size=sources.batch_size)


def input_rules(preprocess: str, *, restrict_classes: bool = False, balanced: bool = False) -> InputRules:
    """Return the rules of `--preprocess`, `--restrict-classes` and `--balanced`."""
    return InputRules(preprocess == "model", restrict_classes, balanced)


def threat_of(norm: str, eps: str) -> ThreatModel:
    """Return the threat model of `--norm` and `--eps`; raises UsageError."""
    try:
        return threat_model(norm, parse_number(eps))
    except ValueError as error:
        raise UsageError(f"--eps: {error}") from error
