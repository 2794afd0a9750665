"""Checks of the product that stop a run before it is silently wrong: each names what differs, by how much, what to try."""
