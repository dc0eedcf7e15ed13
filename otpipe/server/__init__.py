"""The gateway: the one port that clients reach, and the lanes behind it, one per rank."""
