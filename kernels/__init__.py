"""Compiled backends: a row loop knows no formulas, an integrand knows no loops."""
