"""MIL's operators, a function each, in files by family.

A function has the operator's name, its parameters have the names and defaults of the operator's arguments, and their
annotations say how an argument reaches it: as a tensor, or as numbers. Only `routine.py` imports these files.
"""
