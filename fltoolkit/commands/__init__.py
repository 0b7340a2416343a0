"""The commands behind `python -m fltoolkit` and `python -m attacks.NAME`, one file each."""
