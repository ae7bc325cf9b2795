"""Studies of the method: energies along chains, chaos, Fréchet distances, a test of attacks."""
