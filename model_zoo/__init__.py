"""Everything that comes from outside: models, their weights, and images."""
