"""Lattice encryption of pads, its noise budget, and the randomness behind it.

``params`` says which ring and why it is secure, ``noise`` proves that answers decrypt, ``rlwe`` is
the client's side and ``evaluate`` the server's.
"""
