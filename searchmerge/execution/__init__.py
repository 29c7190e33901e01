"""Execution: the workers that merge and score plans, and the executors that run them."""
