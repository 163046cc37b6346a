"""Safe readers of weight files, and the matching of their keys to a network."""
