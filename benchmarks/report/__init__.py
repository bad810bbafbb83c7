"""Reports on records: tables, comparisons of two runs, targets.

statistics   medians, quartiles, ratios, and the choice of a peer to compare with
markdown     numbers, marks and tables as Markdown
tables       report.md, one table for each problem
main_table   the table at its top: the truncated SVD beside its main peers
readme       the short block between the markers of README.md
drift        how much a machine changed between two runs
compare      two runs, record by record: faster, slower, less exact
targets      the figures that the project aims at, met or missed
"""
