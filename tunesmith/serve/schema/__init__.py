"""What requests may hold: pydantic models that refuse every field they don't know, by its name."""
