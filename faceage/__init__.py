"""Age or rejuvenate every face in a video or a folder of images, and touch nothing else."""

__version__ = "0.1.0"
