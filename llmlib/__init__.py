"""LLM Workbook: the best language model that N hours on this one GPU can buy.

The notebooks ask and answer, this package computes, ``runs/`` is all that passes between them.
Read in this order: config, sizing, model, data, schedule, optim, train, bench, runs, analysis, plots.
"""
