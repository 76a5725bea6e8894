"""Data sets and the loader: what a recipe trains on, in an order that survives every restart."""
