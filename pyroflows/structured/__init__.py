"""Models of many latent numbers: what is independent given what, and starts that use it."""
