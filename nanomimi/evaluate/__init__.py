"""Step 7, a run -> numbers: python -m nanomimi.evaluate (see __main__.py)."""
