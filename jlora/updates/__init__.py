"""Factors → factors."""
