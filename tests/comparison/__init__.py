"""A record of what every method does with every head, and the test that holds later code to it bit for bit."""
