"""LLM Workbook: the best language model that N hours on this one GPU can buy.

The notebooks ask and answer, this package computes, ``runs/`` is all that passes between them.
Read in this order: config, model, optim, step, schedule, clock, train for the run itself; corpus,
tokenizer, prepare, data for its tokens; bench_model, bench for its speed; sizing, surface, study
for what to spend it on; runs, analysis, plots, supervise, workbook for records and notebooks.
"""
