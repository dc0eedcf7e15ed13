"""One process per device: who owns which map, how bytes cross ranks, and what a rank does."""
