"""Renamings of a checkpoint's names to a network's: prefixes and wrappers, one rule for the whole file."""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from model_zoo.weights.contents import Renamed, Weights

PREFIXES = ("module.", "_orig_mod.", "model.")
# Modules that torch.compile, FSDP and activation checkpointing put around others, anywhere in a network.
_WRAPPERS = ("_orig_mod", "_fsdp_wrapped_module", "_fpw_module", "_checkpoint_wrapped_module")
_DROPS = ((), _WRAPPERS, (*_WRAPPERS, "module"))
_MAX_PREFIXES = 8
_MAX_CONSTANT = 16  # normalisation constants have one value per channel

_T = TypeVar("_T")


@dataclass(frozen=True)
class _Rule:
    """Drop wrapper components, then strip a prefix; look up the result among the names of the network.

    `names` maps the names of the network, stripped in the same way, to its own; `below` is put in front of others.
    """

    prefix: str
    dropped: tuple[str, ...]
    names: Mapping[str, str]
    below: str

    def rename(self, name: str) -> str | None:
        """Return the name in the network, None for one that the rule does not reach."""
        short = _without(name, self.dropped)
        if not short.startswith(self.prefix):
            return None
        short = short.removeprefix(self.prefix)
        return self.names.get(short, self.below + short) if short else None

    def rename_module(self, path: str) -> str | None:
        """Return the path of a module in the network; the prefix itself becomes the network."""
        if not path:
            return self.below.removesuffix(".") if not self.prefix else None
        renamed = self.rename(f"{path}.") if f"{_without(path, self.dropped)}." != self.prefix else self.below
        return None if renamed is None else renamed.removesuffix(".")


def strip_prefix(weights: Weights, prefix: str) -> Weights:
    """Strip a prefix from the names that have it, in tensors and metadata, with a note where any has."""
    found = _strip(Renamed(weights.tensors, weights.metadata, weights.extra), prefix)
    if found is None:
        return weights
    return replace(
        weights,
        tensors=found.tensors,
        metadata=found.metadata,
        extra=found.extra,
        notes=weights.notes + found.notes,
    )


def stripped(start: Renamed) -> list[Renamed]:
    """Return a checkpoint with each usual prefix stripped from the names that have it."""
    found = (_strip(start, prefix) for prefix in PREFIXES)
    return [renamed for renamed in found if renamed is not None]


def _strip(start: Renamed, prefix: str) -> Renamed | None:
    carriers = [name for name in start.tensors if name.startswith(prefix) and name != prefix]
    tensors = _strip_keys(start.tensors, prefix)
    if not carriers or len(tensors) != len(start.tensors):
        return None
    metadata = None
    if start.metadata is not None:
        # the wrapper's own entry, under '', gives way to that of the network in it
        ordered = sorted(start.metadata.items(), key=lambda item: f"{item[0]}.".startswith(prefix))
        metadata = {_strip_path(path, prefix): value for path, value in ordered}
    example = f"{carriers[0]} -> {carriers[0].removeprefix(prefix)}"
    note = f"stripped {prefix!r} from {len(carriers)} of {len(start.tensors)} names ({example})"
    extra = _strip_keys(start.extra, prefix)
    return replace(start, tensors=tensors, metadata=metadata, extra=extra, notes=(*start.notes, note))


def _strip_path(path: str, prefix: str) -> str:
    return "" if f"{path}." == prefix else path.removeprefix(prefix)


def _strip_keys(values: Mapping[str, _T], prefix: str) -> dict[str, _T]:
    return {name.removeprefix(prefix) if name != prefix else name: value for name, value in values.items()}


def renamings(weights: Weights, names: Sequence[str]) -> Iterator[Renamed]:
    """Yield a checkpoint under every consistent renaming that gives names of the network `names`.

    A renaming drops wrapper components (`_orig_mod`, `_fsdp_wrapped_module`, and in the last place `module`) and
    strips one prefix; the network may lie below a prefix of its own.
    """
    for dropped in _DROPS:
        targets = {_without(name, dropped): name for name in names}
        stored = dict.fromkeys(_without(name, dropped) for name in weights.tensors)
        if len(targets) < len(names) or len(stored) < len(weights.tensors):
            continue
        if dropped and stored.keys() == weights.tensors.keys() and targets.keys() == set(names):
            continue
        below = _common_prefix(targets)
        short = {name.removeprefix(below): own for name, own in targets.items()}
        chosen = [] if weights.prefix is None else [weights.prefix]
        for prefix in dict.fromkeys([*chosen, *_prefixes(stored, short)]):
            renamed = _apply(_Rule(prefix, dropped, short, below), weights)
            if prefix in chosen or not _is_part(prefix, renamed, weights):
                yield renamed


def _prefixes(stored: Collection[str], names: Mapping[str, str]) -> list[str]:
    """Return the prefixes after which most names of the network are stored, the most frequent first.

    The names of a single layer, `weight` and `bias`, are those of every layer: there the whole file has one prefix.
    """
    if len({name.rpartition(".")[0] for name in names}) < 2:
        return [_common_prefix(stored)]
    counts: Counter[str] = Counter()
    for name in stored:
        parts = name.split(".")
        counts.update(".".join((*parts[:i], "")) for i in range(len(parts)) if ".".join(parts[i:]) in names)
    return [prefix for prefix, count in counts.most_common(_MAX_PREFIXES) if 2 * count >= len(names)]


def _is_part(prefix: str, renamed: Renamed, weights: Weights) -> bool:
    """Return whether a prefix leads to a part of a larger network: a numbered one beside others that were learned."""
    numbered = prefix.removesuffix(".").rpartition(".")[2].isdigit()
    return numbered and any(weights.tensors[name].numel() > _MAX_CONSTANT for name in renamed.left)


def _apply(rule: _Rule, weights: Weights) -> Renamed:
    pairs = {name: rule.rename(name) for name in weights.tensors}
    tensors = {new: weights.tensors[old] for old, new in pairs.items() if new is not None}
    extra = {new: value for old, value in weights.extra.items() if (new := rule.rename(old)) is not None}
    metadata = None
    if weights.metadata is not None:
        moved = ((rule.rename_module(path), value) for path, value in weights.metadata.items())
        metadata = {path: value for path, value in moved if path is not None}
    left = tuple(name for name, new in pairs.items() if new is None)
    return Renamed(tensors, metadata, extra, _notes(rule, pairs), left, rule.prefix)


def _notes(rule: _Rule, pairs: Mapping[str, str | None]) -> tuple[str, ...]:
    changed = [(old, new) for old, new in pairs.items() if new is not None and new != old]
    if not changed:
        return ()
    what = [f"stripped {rule.prefix!r}"] if rule.prefix else []
    seen = [part for part in rule.dropped if any(part in old.split(".") for old, _ in changed)]
    what += [f"dropped the wrapper {part!r}" for part in seen]
    what += [f"put the rest below {rule.below!r}"] if rule.below else []
    old, new = changed[0]
    return (f"{', '.join(what) or 'renamed'} in {len(changed)} of {len(pairs)} names ({old} -> {new})",)


def _without(name: str, dropped: Sequence[str]) -> str:
    return ".".join(part for part in name.split(".") if part not in dropped) if dropped else name


def _common_prefix(names: Iterable[str]) -> str:
    """Return the path, with its last dot, of the module that holds every name; '' where the names share none."""
    paths = [name.split(".")[:-1] for name in names]
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join((*common, "")) if common else ""
