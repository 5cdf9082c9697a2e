"""Smaller models that stay the same model: merging, and the divergence each step brings."""
