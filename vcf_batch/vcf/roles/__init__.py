"""Roles and masks: which attribute of a reference transfers, and where in the picture (docs/roles.md)."""
