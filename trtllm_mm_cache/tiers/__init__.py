"""Where a missing embedding comes from: a chain of tiers, nearest first; the encode workers are the last.

`base` is the seam, `chain` the order, `receive` what every tier's answer goes through before it is visible.
"""
