"""The certificate of a run: checks, on the user's own machine, that what is computed is what was meant."""
