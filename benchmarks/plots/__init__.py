"""Draws records as figures; matplotlib is optional.

draw       the list of all plots, and their PNG files
pareto     time against excess error of the truncated SVD
scaling    time against size, rank, batch or tokens
roofline   achieved rates against the limits of the device
memory     peak memory of compiled programs
style      panels, colours, markers and axes that all plots share
"""
