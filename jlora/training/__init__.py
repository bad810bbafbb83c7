"""Loss + batches → trained factors."""
