"""Apply a preprocessing with the transforms of the libraries that define it."""

from functools import cache, partial
from typing import Any

from model_zoo.images.preprocessing import Preprocessing


def preprocess(image: Any, chosen: Preprocessing) -> Any:
    """Return an image, of Pillow or a float tensor (C, H, W) in [0, 1], after resize and crop."""
    return _transform(chosen)(image)


@cache
def _transform(chosen: Preprocessing) -> Any:
    """Return the transforms of torchvision, and of timm where torchvision has none."""
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize

    steps: list[Any] = []
    if chosen.resize and chosen.fit in ("inside", "cover"):
        from model_zoo.libraries import timm_resize

        steps += timm_resize(chosen.resize, chosen.crop, chosen.interpolation, chosen.fill)
    elif chosen.resize:
        mode = InterpolationMode(chosen.interpolation)
        size = chosen.resize[0] if chosen.fit == "shorter" else list(chosen.resize)
        steps.append(Resize(size, interpolation=mode, antialias=True))
    if chosen.crop and chosen.fit != "inside":
        floored = partial(_crop_floored, size=chosen.crop)
        steps.append(CenterCrop(list(chosen.crop)) if chosen.centre == "rounded" else floored)
    return Compose(steps)


def _crop_floored(image: Any, size: tuple[int, ...]) -> Any:
    """Return the central part of an image, with the smaller of two unequal borders above and to the left."""
    from torchvision.transforms import functional

    _, height, width = functional.get_dimensions(image)
    if height < size[0] or width < size[1]:
        return functional.center_crop(image, list(size))
    return functional.crop(image, (height - size[0]) // 2, (width - size[1]) // 2, size[0], size[1])
