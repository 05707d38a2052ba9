"""A page about finished and running trainings: runs read from their folders, tables, curves, and one HTML file.

matplotlib and jinja2 (the extra `report`) are imported where a page is made, not before.
"""
