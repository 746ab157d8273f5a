"""What a trained model says beyond an embedding, all on its frozen latent: energies."""
