"""Studies: the papers' tables and figures, each measured into rows that `reports` draws."""
