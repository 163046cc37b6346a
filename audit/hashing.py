"""Hashes of tensors and networks."""

from hashlib import sha256

import torch
from torch import Tensor, nn


def weights_sha256(network: nn.Module) -> str:
    """Return the sha256, in hex, of a network's parameters and buffers, in the order of their names."""
    state = network.state_dict()
    return tensors_sha256(*(state[name] for name in sorted(state)))


def tensors_sha256(*tensors: Tensor) -> str:
    """Return the sha256, in hex, of the types, shapes and bytes of tensors."""
    total = sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        total.update(plain.flatten().view(torch.uint8).numpy().tobytes() if plain.numel() else b"")
    return total.hexdigest()
