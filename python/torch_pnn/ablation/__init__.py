"""Ablation studies: arms trained side by side with the same seeds, and a report on what came out.

One concern a file:

    study        what a study is: settings, fingerprint, the ready-made ones
    arms         which networks are compared
    data         the images and their split
    training     one run: an arm with a seed
    worker       a process that does one run after another
    runner       all runs of a study, side by side
    records      the study's folder: rows, resuming, what is refused
    progress     the bar with the remaining time
    statistics   paired differences, intervals, the verdict
    tables       the figures arm by arm, the terminal's table
    showcase     what a mask does to one image
    plots        the report's drawings
    report       the report
    environment  versions, instruction set, compiled operators or not
    errors       what a person is told when something can't be done

Nothing here is imported by ``import torch_pnn``; the command line imports it when it needs it.
"""
