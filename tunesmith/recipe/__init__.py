"""The recipe: one YAML file that says what to do, validated at the edge, resolved once and never changed after."""
