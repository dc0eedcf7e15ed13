"""What travels between client and server, and the arithmetic both sides agree on."""
