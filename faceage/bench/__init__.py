"""Measurements of speed and memory, each against its baseline, on the same input and in the same run.

What has a peak of memory of its own runs in a process of its own. Runs of the two sides alternate, so that a machine
that gets slower or faster on the way does so for both; medians are reported.
"""
