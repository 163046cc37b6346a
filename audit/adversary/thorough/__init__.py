"""Thorough searches in l2 and l1, for images that all other searches of an attack leave.

May import: the leaves of `audit`, and the modules of `adversary` above this folder but `label_attack` and its users.
"""
