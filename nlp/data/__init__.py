"""Preparation of fairseq data sets from raw parallel text."""
