"""A small language model, adapted to text that every machine with Python has."""
