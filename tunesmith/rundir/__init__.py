"""The run directory: the only thing that passes between stations. Its schema has a version; writes are atomic."""
