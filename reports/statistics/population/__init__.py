"""Statistics of a population of networks: inside training groups, beside rivals, and on networks held back."""
