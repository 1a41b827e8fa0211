"""Cleanings: configs that make training text of raw pages."""
