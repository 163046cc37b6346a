"""Worst-case search of `mine`: images are merged, their features mixed, and moved down the value of critics."""
