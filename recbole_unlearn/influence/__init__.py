"""The numerics of unlearning: torch, numpy and numba only, nothing of RecBole."""
