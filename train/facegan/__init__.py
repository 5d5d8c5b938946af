"""Training of FaceGAN: a StyleGAN conditioned on age, pairs from it, and the U-Net."""
