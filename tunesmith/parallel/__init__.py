"""The device mesh and what is applied to it."""
