"""Which tree is the fastest here? Acceptance, costs, shapes, a race, which tune.py joins."""
