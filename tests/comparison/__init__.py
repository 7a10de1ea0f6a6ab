"""A record of what every method does with every head, and the test that holds later code to it bit for bit.

One thing was recorded anew on purpose: the multiply-adds of `truncated` (`macs`, `macs by part`), since prefix tokens
do not run on behind the exit where all others left. Everything else is as the recorded code said it.
"""
