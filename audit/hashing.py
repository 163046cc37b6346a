"""Hashes of tensors and networks."""

from hashlib import sha256

import torch
from torch import Tensor, nn


def weights_sha256(network: nn.Module) -> str:
    """Return the sha256 of all that a network is made of: its parameters and buffers, in the order of their names."""
    state = network.state_dict()
    return tensors_sha256(*(state[name] for name in sorted(state)))


def tensors_sha256(*tensors: Tensor) -> str:
    """Return the sha256 of tensors: their types, shapes and bytes."""
    seen = sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        seen.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        seen.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return seen.hexdigest()
