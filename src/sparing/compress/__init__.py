"""Compress: less to store and less to compute, with the bytes and the time to prove it."""
