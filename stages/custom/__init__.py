"""Somebody else's classifiers, energies and images."""
