"""Candidate masks and their files."""
