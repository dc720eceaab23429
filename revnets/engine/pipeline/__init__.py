"""Pipeline stages: reversible columns divided among processes."""
