"""Local training vectorised over clients, one round, and the federation loop with its checkpoints."""
