"""Memory of searches: how many images pass through a network at a time.

May import: the leaves of `audit`.
"""
