"""Commands: one module per verb of `rvaudit`. They parse options, call one function of a lower room, and print.

May import: every room of `audit`, `model_zoo`, `reports`. Heavy imports stand inside functions.
"""
