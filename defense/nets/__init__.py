"""Beside the energy: the Wide ResNet, and trained networks from their files."""
