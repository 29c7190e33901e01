"""Arithmetic on a CPU as C++ that the machine's compiler vectorises."""
