"""Distributed context of a run: ranks, collectives, DDP and FSDP2."""
