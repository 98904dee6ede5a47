"""distclip for trainers and optimizers; each imports its framework only when used."""
