"""Whole numbers, such as pixels: noise between the levels, and models of the levels themselves."""
