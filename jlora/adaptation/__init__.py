"""A tree of weights → a tree of adapted weights."""
