"""The Python front of the commands: audits of networks and data given as objects, and records as a collection."""
