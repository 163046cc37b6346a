"""The usual entries of a checkpoint, and other weights beside them: averaged copies for example."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

# Averaged weights, which the loaders of timm and of torchvision's references take before the raw ones.
AVERAGED_KEYS = ("state_dict_ema", "model_ema")
# Tried in this order; none of them holds an optimiser state.
STATE_KEYS = (
    "state_dict",
    "model_state_dict",
    "model_state",
    "model",
    "net",
    "network",
    "weights",
    "params",
    "classifier",
    "module",
)
# Entries whose tensors may have the names of the network though no loader takes them for its weights: optimiser
# states, and the raw weights of formats whose usual entry holds the averaged ones (mmengine's EMAHook, Lightning's
# WeightAveraging, the adversarial training code of Rebuffi et al.).
_NO_RIVAL = re.compile(
    r"optim|(^|_)opt(_|$)|momentum|exp_avg|grad|sched|scaler|^ema_state_dict$|^current_model_state$|^unaveraged"
)
_WRAPPERS = ("module.", "_orig_mod.", "model.")


def find_rival(contents: Mapping[object, object], chosen: object) -> str | None:
    """Return the key of an entry with the same names as the chosen one and other values, None where there is none."""
    own = _state_dict_in(contents[chosen])
    for key, value in contents.items():
        if key == chosen or not isinstance(key, str) or _NO_RIVAL.search(key.lower()):
            continue
        other = _state_dict_in(value)
        if own and own.keys() <= other.keys() and not all(_equal(own[name], other[name]) for name in own):
            return key
    return None


def _state_dict_in(value: object) -> dict[str, Tensor]:
    """Return the tensors of an entry under their names without wrappers; one level may lie between."""
    for _ in range(2):
        if isinstance(value, list | tuple) and len(value) == 1:
            value = value[0]
        if isinstance(value, Mapping):
            inner = next((key for key in STATE_KEYS if isinstance(value.get(key), Mapping)), None)
            value = value[inner] if inner is not None else value
    if not isinstance(value, Mapping):
        return {}
    return {_without_wrappers(str(key)): tensor for key, tensor in tensors_in(value).items()}


def _without_wrappers(name: str) -> str:
    while prefix := next((prefix for prefix in _WRAPPERS if name.startswith(prefix)), ""):
        name = name.removeprefix(prefix)
    return name


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and bool(torch.equal(one.to(other.dtype), other))


def tensors_in(contents: Mapping[object, object]) -> dict[object, Tensor]:
    """Return the entries of a mapping that are tensors."""
    return {key: value for key, value in contents.items() if isinstance(value, Tensor)}
