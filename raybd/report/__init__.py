"""Figures and the HTML report, from the tables alone."""
