"""Label information: probes and other classifiers of features, what they read, and the search against them.

May import: the leaves of `audit`, `adversary`, and the modules of `information` above this folder.
"""
