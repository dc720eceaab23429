"""Figures in matplotlib and tables in rich."""
