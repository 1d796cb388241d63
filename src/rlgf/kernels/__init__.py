"""Optional fast implementations of model layers and formulas on a CPU."""
