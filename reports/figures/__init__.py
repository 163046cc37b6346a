"""Figures of a run and of the studies, one module each. Imports leaves of `audit` and no torch."""
