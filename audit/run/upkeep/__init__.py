"""Before, during and after a run: cost forecast, progress, verification, environment."""
