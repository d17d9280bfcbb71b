"""`scripts/mutants`: changes the core's code in one place at a time and runs its unit tests.

A mutant that no test fails on has survived: the tests would not notice such a mistake.
"""
