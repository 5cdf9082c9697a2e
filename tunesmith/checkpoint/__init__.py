"""Checkpoints: Hugging Face directories in and out, adapters, and the complete training state."""
