"""Forecast the cost of a benchmark's unfinished cells, model by model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from audit.adversary.memory.batch_size import fitting_batch
from audit.adversary.threat import Linf
from audit.config.benchmark import BenchmarkConfig
from audit.run.cell import input_rules
from audit.run.loading import (
    BATCH,
    RunOptions,
    batch_bytes,
    open_images,
    open_images_for,
    open_model,
    open_representation,
)
from audit.run.upkeep import forecast
from audit.run.upkeep.forecast import CalibrationSet, Forecast, Rates, Work
from audit.run.upkeep.progress import DONE, CellStatus

_CALIBRATION_MODEL, _CALIBRATION_DATA, _CALIBRATION_EPS = "bundled:digits-vgg-standard", "digits", 0.2
Watch = Callable[[str, int], None]
"""Called with the step that begins and the number of completed ones."""


class ModelForecast(NamedTuple):
    """The cost of one model's unfinished cells on one data set."""

    model: str
    dataset: str
    cells: int
    cost: Forecast


def estimator_rates(config: BenchmarkConfig, statuses: Sequence[CellStatus], watch: Watch) -> dict[str, Rates]:
    """Return the rates of every estimator with unfinished cells, calibrated on a small bundled model on the CPU."""
    used = {each.estimator for each in statuses if each.state != DONE}
    if not used:
        return {}
    options = RunOptions(device="cpu")
    images = open_images(_CALIBRATION_DATA, options, options.request(forecast.SIZES[-1]))
    model = open_model(_CALIBRATION_MODEL, images, options)
    calibration = CalibrationSet(model.network, images.images, images.labels)
    found: dict[str, Rates] = {}
    for settings in config.settings():
        name = settings.estimator.name
        if name in used:
            watch(f"calibrating {name}", len(found))
            one_seed = replace(settings, seeds=settings.seeds[:1], certificate=False)
            found[name] = forecast.calibrate(calibration, Linf(_CALIBRATION_EPS), one_seed)
    return found


def model_forecasts(
    config: BenchmarkConfig,
    statuses: Sequence[CellStatus],
    rates: Mapping[str, Rates],
    options: RunOptions,
    watch: Watch,
) -> list[ModelForecast]:
    """Return the forecast of every model with unfinished cells, in the order of the run. Raises what loading raises."""
    groups: dict[tuple[str, str], list[CellStatus]] = {}
    for each in statuses:
        if each.state != DONE:
            groups.setdefault((each.model, each.dataset), []).append(each)
    found: list[ModelForecast] = []
    for (ref, dataset), unfinished in groups.items():
        watch(f"timing {ref}", len(found))
        cost = _model_cost(unfinished, config, rates, options)
        found.append(ModelForecast(ref, dataset, len(unfinished), cost))
    return found


def _model_cost(
    unfinished: Sequence[CellStatus], config: BenchmarkConfig, rates: Mapping[str, Rates], options: RunOptions
) -> Forecast:
    first = unfinished[0]
    asked = options.request(first.images)
    images = open_images_for(first.model, first.dataset, options, asked, input_rules(config))
    network = open_representation(first.model, images, options).network
    attacks = len({(each.norm, each.eps) for each in unfinished})
    work = Work(len(images.images), len(config.seeds), attacks, tuple(rates[each.estimator] for each in unfinished))
    pixels = images.images[:64]
    batch = options.batch_size or min(BATCH, fitting_batch(network, pixels))
    seconds = forecast.seconds_per_pass(network, pixels[:batch])
    return forecast.forecast(work, seconds, batch_bytes(network, pixels, batch))
