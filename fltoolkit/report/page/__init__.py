"""The page of a trade-off run: one HTML file that needs nothing beside it."""

from fltoolkit.report.page.page import page

__all__ = ["page"]
