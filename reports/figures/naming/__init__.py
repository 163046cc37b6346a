"""Names on the points of a figure: where they stand so that none overlaps a name, a point or a line."""
