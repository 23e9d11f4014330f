"""Policies over a network: one loop (server.py), and a file for each protocol."""
