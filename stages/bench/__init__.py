"""How fast the library is, and what an experiment costs."""
