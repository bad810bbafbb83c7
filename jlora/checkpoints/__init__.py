"""Files ↔ weights and factors."""
