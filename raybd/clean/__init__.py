"""Cleaning methods, one file for each family."""
