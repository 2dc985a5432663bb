"""A fair comparison of methods: equal parameters, equal data in equal order, several seeds, intervals.

spec -> sizes -> runs (each an ordinary run, in a process of its own) -> summary -> page
"""
