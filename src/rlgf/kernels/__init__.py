"""Optional fast paths of model parts and formulas."""
