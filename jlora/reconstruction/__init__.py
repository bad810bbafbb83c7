"""Factors → matrix, or → activations."""
