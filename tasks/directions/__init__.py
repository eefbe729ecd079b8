"""Finding directions of the latent space."""
