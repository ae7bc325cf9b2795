"""Gradients through the Langevin chain, for adaptive attacks."""
