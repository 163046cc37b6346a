"""Pages of the papers' studies, drawn from committed rows."""
