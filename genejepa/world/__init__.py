"""A model of transitions between states of cells, on the frozen latent of a trained model."""
