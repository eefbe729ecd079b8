"""Bytes in and out: local folders and object stores, their errors, crash points of the tests."""
