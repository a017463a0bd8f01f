"""Specs to families: YAML text, its limits, its schema, every check, and the variants that axes make."""
