"""The HTML report: one self-contained file per run, with its templates."""
