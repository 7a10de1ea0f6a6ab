"""Thresholds by intent: ask for a budget or for a bounded loss, get the exits."""
