"""LLM Workbook: the best language model that N hours on this one GPU can buy.

The notebooks ask and answer, this package computes, ``runs/`` is all that passes between them. Read
in this order: config, model, optim, devices, step, budget, checkpoint, trainer, train for
the run itself; readers, corpus, data, prepare for its tokens; sizing, isotime, bench, study for what
to spend it on; runs, analysis, style, plots, launch, inference and __main__ for records, figures and
the command line.
"""
