"""Commands that inspect benchmark files, run folders and the machine, and compute no record."""
