"""Families to a tree on disk: templates, host code, the checks of what was made, and the write."""
