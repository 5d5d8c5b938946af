"""Training of Age-cGAN (Antipov et al. 2017, arXiv:1702.01983)."""
