"""Watching a process and its device: memory, utilisation, trackers, the environment's check-up."""
