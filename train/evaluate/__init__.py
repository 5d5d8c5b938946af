"""What the product does to faces and clips, measured."""
