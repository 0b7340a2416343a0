"""Gradients of single examples inside local training: clipped sums, and rows for defenses that want them."""
