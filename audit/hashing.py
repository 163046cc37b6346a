"""Hashes of tensors and networks."""

from hashlib import sha256

import torch
from torch import Tensor, nn

from audit.types import Images, image_slices

_AT_ONCE = 1 << 24  # values, so that large sets of images are not copied


def weights_sha256(network: nn.Module) -> str:
    """Return the sha256, in hex, of a network's parameters and buffers, in the order of their names."""
    state = network.state_dict()
    return tensors_sha256(*(state[name] for name in sorted(state)))


def image_hashes(images: Images) -> list[bytes]:
    """Return the sha256 of the bytes of each image (N, C, H, W)."""
    parts = (images[part].cpu().contiguous().numpy() for part in image_slices(images))
    return [sha256(image.tobytes()).digest() for part in parts for image in part]


def tensors_sha256(*tensors: Tensor) -> str:
    """Return the sha256, in hex, of the types, shapes and bytes of tensors."""
    total = sha256()
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        total.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
        for part in plain.flatten().split(_AT_ONCE) if plain.numel() else ():
            total.update(part.view(torch.uint8).numpy().tobytes())
    return total.hexdigest()
