"""Networks: the Wide ResNet, and weights in files."""
