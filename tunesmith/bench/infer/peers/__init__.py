"""Runners of other engines: each runs in whatever Python has its package, and imports nothing but that and protocol."""
