"""Tokens and subwords of parallel text: Moses' tokenizer, byte-pair encoding and sentencepiece.

Worker processes import these modules, so nothing here imports torch, which takes seconds and hundreds of megabytes.
"""
