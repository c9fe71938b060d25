"""The comparison study: the family against SGD. ``python -m experiments``."""
