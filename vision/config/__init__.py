"""The configuration of a run, as pydantic models. Nothing is built here."""
