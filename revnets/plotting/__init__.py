"""Figures of networks, audits, memory plans and analyses, drawn with matplotlib."""
