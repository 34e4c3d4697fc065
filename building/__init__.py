"""How setup.py compiles the extensions; not part of the package."""
